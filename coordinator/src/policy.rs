//! Policies: what an operator forbids. Read from one TOML file, which also names the tenants
//! ([`crate::tenants`]); a client can add concepts to a policy, never remove one.
//!
//! ```toml
//! default_policy = "default"
//! known_concepts = ["kitchen-knife"]   # what "*" stands for: with it, no energy node adds to a policy.
//!                                      # ["*"], or without TLS if left out: all that was ever served
//!
//! [policies.default]
//! concepts = ["*"]                     # every known concept
//! energies = ["clip", "siglip"]       # optional: energy models that must all be satisfied; all that
//!                                      # serve a concept if not named
//! weights = { siglip = 0.5 }           # optional: factors of their gradients, 1 if not named
//! allow_overrides = false              # may clients set steering knobs? Only stronger than the policy's
//! allow_calibration_fallback = false
//! checks = 1                           # nodes of each concept that must pass a finished image, 1 to 8
//! outside = "refuse"                   # a job outside its calibrations' envelope: refused, or
//!                                      # "withhold-unless-clear": only the strictest final check lets it out
//!
//! [policies.default.steering]
//! generators = ["sd-1.5"]              # optional: whom these and the samplers' knobs are for; other
//!                                      # generators get the defaults
//! eta = 0.3
//!
//! [policies.default.sampler.flow-euler] # optional: other knobs where this sampler is used
//! eta = 0.5
//!
//! [policies.observe]                   # records scores, corrects and withholds nothing
//! concepts = ["*"]
//! observe_only = true
//! ```

use std::{
    collections::{BTreeMap, BTreeSet},
    path::{Path, PathBuf},
};

use fairlead_common::{
    bounds,
    limits::FieldError,
    parse,
    steering::{self, Leave},
    text,
};
use fairlead_proto::{
    SAMPLERS,
    v1::{EnergyWeight, SteeringParams},
};
use serde::Deserialize;

use crate::{
    steering::SteeringFile,
    tenants::{Tenant, TenantFile, Tenants},
};

/// Most nodes that check one image for one concept.
const MAX_CHECKS: u32 = 8;

/// Stands for every known concept.
const ALL: &str = "*";

/// A policies file that cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum PolicyError {
    /// The file cannot be read.
    #[error("policies file {path}: {source}")]
    Read {
        /// The file.
        path: PathBuf,
        /// The system's error.
        source: std::io::Error,
    },
    /// It is not the TOML that is expected.
    #[error("policies file{at}: {source}")]
    Parse {
        /// " PATH", or empty.
        at: String,
        /// What is wrong, with line and column.
        source: parse::Problem,
    },
    /// It has no policy.
    #[error("policies file: no policies; write at least [policies.default] concepts = [\"*\"]")]
    NoPolicies,
    /// The default policy is not in the file, or cannot be told.
    #[error("policies file: default_policy {0} of: {1}")]
    Default(String, String),
    /// A policy with no concepts that does not say so on purpose.
    #[error(
        "policy `{0}`: concepts is empty, so its images would leave unchecked; list concepts, \
         write [\"*\"] for all, or say allow_unchecked = true or observe_only = true"
    )]
    Unchecked(String),
    /// A tenant that cannot be.
    #[error("tenant `{tenant}`: {problem}")]
    Tenant {
        /// The tenant.
        tenant: String,
        /// What is wrong.
        problem: String,
    },
    /// What "*" stands for that is no concept's name.
    #[error("policies file: known_concepts: {0}")]
    Known(String),
    /// A cluster whose nodes would decide what is forbidden.
    #[error(
        "policies file: with TLS the operator says what \"*\" stands for, so that no energy node alone can have \
         jobs refused: write known_concepts = [\"NAME\", ...] at its top, or [\"*\"] for whatever nodes serve"
    )]
    Unlisted,
    /// A file that would open to everybody what was for tenants.
    #[error(
        "policies file {0}: it names no tenants any longer; restart without them if that is meant"
    )]
    TenantsGone(PathBuf),
    /// A value that cannot be.
    #[error("policy `{policy}`: {problem}")]
    Value {
        /// The policy.
        policy: String,
        /// What is wrong.
        problem: String,
    },
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct File {
    default_policy: Option<String>,
    known_concepts: Option<BTreeSet<String>>,
    #[serde(default)]
    policies: BTreeMap<String, PolicyFile>,
    #[serde(default)]
    tenants: BTreeMap<String, TenantFile>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct PolicyFile {
    concepts: Vec<String>,
    #[serde(default)]
    energies: BTreeSet<String>,
    #[serde(default)]
    weights: BTreeMap<String, f32>,
    #[serde(default)]
    steering: SteeringFile,
    #[serde(default)]
    sampler: BTreeMap<String, SteeringFile>,
    #[serde(default)]
    allow_overrides: bool,
    #[serde(default)]
    allow_calibration_fallback: bool,
    #[serde(default)]
    outside: Outside,
    #[serde(default)]
    observe_only: bool,
    #[serde(default)]
    allow_unchecked: bool,
    checks: Option<u32>,
}

/// What becomes of a job whose size, guidance or negative prompt no calibration was made with.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Outside {
    /// It is refused.
    #[default]
    Refuse,
    /// It runs, and the final check decides at its strictest level.
    WithholdUnlessClear,
}

/// One operator policy.
#[derive(Debug, Clone, PartialEq)]
pub struct Policy {
    /// Its name in the file.
    pub name: String,
    /// Mandatory concepts by name.
    pub concepts: BTreeSet<String>,
    /// Every concept that was ever served in this cluster is mandatory as well.
    pub all_served: bool,
    /// Energy models, by name, that must be satisfied; empty for all that serve a concept.
    pub energies: BTreeSet<String>,
    /// Factors of the energies' gradients; 1 for those that are not here.
    pub weights: BTreeMap<String, f32>,
    /// The policy's steering knobs.
    pub steering: SteeringParams,
    /// All knobs for jobs that use these samplers, by name: the same push moves the samples of one
    /// sampler further than those of another.
    pub by_sampler: BTreeMap<String, SteeringParams>,
    /// Generators by name that `steering` and `by_sampler` are for; others get `elsewhere`. `None` for all.
    pub generators: Option<BTreeSet<String>>,
    /// The knobs for generators that are not among them.
    pub elsewhere: SteeringParams,
    /// Clients may set steering knobs, none weaker than the policy's; any in range if it is
    /// `observe_only`, which steers nothing.
    pub allow_overrides: bool,
    /// A missing calibration may be replaced by a recorded fallback.
    pub allow_calibration_fallback: bool,
    /// What becomes of a job outside its calibrations' envelope.
    pub outside: Outside,
    /// Record scores, never correct, never withhold.
    pub observe_only: bool,
    /// The policy may end up with no concept at all.
    pub allow_unchecked: bool,
    /// How many nodes of each concept must pass a finished image, each by itself.
    pub checks: u32,
}

impl Policy {
    /// The concepts of a job: the mandatory ones, with `*` all that are `known`, and the client's
    /// `extra`.
    pub fn concepts_for<'a>(
        &self,
        known: impl IntoIterator<Item = &'a str>,
        extra: &[String],
    ) -> BTreeSet<String> {
        let mut names = self.concepts.clone();
        if self.all_served {
            names.extend(known.into_iter().map(str::to_owned));
        }
        names.extend(extra.iter().cloned());
        names
    }

    /// Whether this energy is one that must be satisfied.
    pub fn asks(&self, energy: &str) -> bool {
        self.energies.is_empty() || self.energies.contains(energy)
    }

    /// How far a client's knobs may differ from its own.
    pub(crate) fn leave(&self) -> Leave {
        match (self.allow_overrides, self.observe_only) {
            (false, _) => Leave::None,
            (true, false) => Leave::Stronger,
            (true, true) => Leave::Any,
        }
    }

    /// The steering knobs of jobs that use `generator`, which uses `sampler`.
    pub fn steering_for(&self, generator: &str, sampler: &str) -> &SteeringParams {
        match self.is_tuned_for(generator) {
            true => self.by_sampler.get(sampler).unwrap_or(&self.steering),
            false => &self.elsewhere,
        }
    }

    /// Whether its knobs are for `generator`.
    fn is_tuned_for(&self, generator: &str) -> bool {
        self.generators.as_ref().is_none_or(|tuned| tuned.contains(generator))
    }

    /// What a job with `generator` should know of its knobs.
    pub(crate) fn notice(&self, generator: &str) -> Option<String> {
        let tuned = self.generators.as_ref().filter(|tuned| !tuned.contains(generator))?;
        let tuned: Vec<&str> = tuned.iter().map(String::as_str).collect();
        Some(format!(
            "the steering knobs of policy `{}` are for {}; `{generator}` gets the defaults",
            self.name,
            tuned.join(", ")
        ))
    }

    /// [`Policy::weights`] for the wire.
    pub(crate) fn weights(&self) -> Vec<EnergyWeight> {
        let weight = |(energy, weight): (&String, &f32)| EnergyWeight {
            energy: energy.clone(),
            weight: *weight,
        };
        self.weights.iter().map(weight).collect()
    }

    /// Whether a job of this policy may have no concept.
    pub fn may_be_unchecked(&self) -> bool {
        self.observe_only || self.allow_unchecked
    }

    fn from_file(name: &str, file: PolicyFile, known: &Known) -> Result<Self, PolicyError> {
        let value = |problem: String| PolicyError::Value { policy: name.to_owned(), problem };
        if file.concepts.is_empty() && !file.observe_only && !file.allow_unchecked {
            return Err(PolicyError::Unchecked(name.to_owned()));
        }
        let checks = file.checks.unwrap_or(1);
        if !(1..=MAX_CHECKS).contains(&checks) {
            return Err(value(format!("checks is {checks}; it must be 1 to {MAX_CHECKS}")));
        }
        if file.concepts.iter().any(|concept| concept.trim().is_empty()) {
            return Err(value("concepts holds an empty name".to_owned()));
        }
        let generators = file.steering.generators.clone();
        if generators.as_ref().is_some_and(BTreeSet::is_empty) {
            return Err(value("steering.generators names none; leave it out for all".to_owned()));
        }
        let steering = SteeringParams::from(file.steering);
        steering::resolve(&steering).map_err(|FieldError { field, problem }| {
            value(format!("steering.{field} {problem}"))
        })?;
        let mut by_sampler = BTreeMap::new();
        for (sampler, knobs) in file.sampler {
            if !SAMPLERS.contains(&sampler.as_str()) {
                let known = SAMPLERS.join(", ");
                return Err(value(format!("sampler.{sampler} is no sampler; there are: {known}")));
            }
            if knobs.generators.is_some() {
                return Err(value(format!(
                    "sampler.{sampler}.generators: name them under steering, which is for both"
                )));
            }
            let knobs = steering::over(&steering, &SteeringParams::from(knobs));
            steering::resolve(&knobs).map_err(|FieldError { field, problem }| {
                value(format!("sampler.{sampler}.{field} {problem}"))
            })?;
            by_sampler.insert(sampler, knobs);
        }
        if let Some((energy, weight)) =
            file.weights.iter().find(|(_, w)| !(**w > 0.0 && w.is_finite()))
        {
            return Err(value(format!("weights.{energy} is {weight}; it must be above 0")));
        }
        if let Some(energy) = file
            .weights
            .keys()
            .find(|energy| !file.energies.is_empty() && !file.energies.contains(*energy))
        {
            return Err(value(format!("weights.{energy}: energies does not name it")));
        }
        let (all, named): (Vec<_>, Vec<_>) = file.concepts.into_iter().partition(|c| c == ALL);
        let mut concepts: BTreeSet<String> = named.into_iter().collect();
        let listed = known.listed.as_ref().filter(|_| !all.is_empty());
        concepts.extend(listed.into_iter().flatten().cloned());
        Ok(Self {
            name: name.to_owned(),
            concepts,
            all_served: !all.is_empty() && listed.is_none(),
            energies: file.energies,
            weights: file.weights,
            steering,
            by_sampler,
            generators,
            elsewhere: SteeringParams::default(),
            allow_overrides: file.allow_overrides,
            allow_calibration_fallback: file.allow_calibration_fallback,
            outside: file.outside,
            observe_only: file.observe_only,
            allow_unchecked: file.allow_unchecked,
            checks,
        })
    }
}

/// What "*" stands for.
#[derive(Debug, Clone, PartialEq, Default)]
struct Known {
    /// These; `None` for whatever was ever served.
    listed: Option<BTreeSet<String>>,
    /// The operator has said so.
    said: bool,
}

impl Known {
    fn from_file(names: Option<BTreeSet<String>>) -> Result<Self, PolicyError> {
        let Some(names) = names else { return Ok(Self::default()) };
        if names.iter().map(String::as_str).eq([ALL]) {
            return Ok(Self { listed: None, said: true });
        }
        names.iter().try_for_each(|name| bounds::kebab_case(name)).map_err(PolicyError::Known)?;
        match names.is_empty() {
            true => Err(PolicyError::Known("is empty; name concepts, or [\"*\"]".to_owned())),
            false => Ok(Self { listed: Some(names), said: true }),
        }
    }
}

/// All policies of a coordinator.
#[derive(Debug, Clone, PartialEq)]
pub struct Policies {
    known: Known,
    default: String,
    policies: BTreeMap<String, Policy>,
    tenants: Tenants,
}

impl Default for Policies {
    /// Without a file: one policy, `default`, over every served concept.
    fn default() -> Self {
        let policy = Policy {
            name: "default".to_owned(),
            concepts: BTreeSet::new(),
            all_served: true,
            energies: BTreeSet::new(),
            weights: BTreeMap::new(),
            steering: SteeringParams::default(),
            by_sampler: BTreeMap::new(),
            generators: None,
            elsewhere: SteeringParams::default(),
            allow_overrides: false,
            allow_calibration_fallback: false,
            outside: Outside::Refuse,
            observe_only: false,
            allow_unchecked: false,
            checks: 1,
        };
        Self {
            default: policy.name.clone(),
            known: Known::default(),
            policies: BTreeMap::from([(policy.name.clone(), policy)]),
            tenants: Tenants::default(),
        }
    }
}

impl Policies {
    /// Reads the policies file at `path`.
    pub fn load(path: &Path) -> Result<Self, PolicyError> {
        let text = text::read(path)
            .map_err(|source| PolicyError::Read { path: path.to_owned(), source })?;
        Self::parse_at(&text, format!(" {}", path.display()))
    }

    /// Reads policies from the text of a file.
    pub fn parse(text: &str) -> Result<Self, PolicyError> {
        Self::parse_at(text, String::new())
    }

    pub(crate) fn parse_at(text: &str, at: String) -> Result<Self, PolicyError> {
        let file: File = parse::toml(text).map_err(|source| PolicyError::Parse { at, source })?;
        let known = Known::from_file(file.known_concepts)?;
        let policies = file
            .policies
            .into_iter()
            .map(|(name, policy)| Ok((name.clone(), Policy::from_file(&name, policy, &known)?)))
            .collect::<Result<BTreeMap<_, _>, PolicyError>>()?;
        let names = || policies.keys().cloned().collect::<Vec<_>>().join(", ");
        let default = match (file.default_policy, policies.len()) {
            (_, 0) => return Err(PolicyError::NoPolicies),
            (Some(name), _) if policies.contains_key(&name) => name,
            (Some(name), _) => {
                return Err(PolicyError::Default(format!("`{name}` is none"), names()));
            }
            (None, 1) => names(),
            (None, _) if policies.contains_key("default") => "default".to_owned(),
            (None, _) => return Err(PolicyError::Default("is missing; name one".into(), names())),
        };
        let all: Vec<&str> = policies.keys().map(String::as_str).collect();
        let tenants = Tenants::from_file(file.tenants, &default, &all)
            .map_err(|(tenant, problem)| PolicyError::Tenant { tenant, problem })?;
        Ok(Self { known, default, policies, tenants })
    }

    /// The policy `name`, or the default one if it is empty.
    pub fn get(&self, name: &str) -> Option<&Policy> {
        self.policies.get(if name.is_empty() { self.default.as_str() } else { name })
    }

    /// Refuses policies to which any energy node could add a concept, unless their operator has said so.
    ///
    /// # Errors
    /// If "*" stands for what nodes serve, and nobody has said that it should.
    pub fn check_known(&self) -> Result<(), PolicyError> {
        match !self.known.said && self.policies.values().any(|policy| policy.all_served) {
            true => Err(PolicyError::Unlisted),
            false => Ok(()),
        }
    }

    /// Of `names`, those that no policy asks for.
    pub(crate) fn unasked<'a>(&self, names: impl Iterator<Item = &'a str>) -> Vec<&'a str> {
        let asks = |name: &str| {
            let mut policies = self.policies.values();
            policies.any(|policy| policy.all_served || policy.concepts.contains(name))
        };
        names.filter(|name| !asks(name)).collect()
    }

    /// Who may ask; nobody in particular where there are none.
    pub fn tenants(&self) -> &Tenants {
        &self.tenants
    }

    /// Lets the process itself in where there are tenants, with `key`: it may see everything.
    pub fn admit_operator(&mut self, key: &str) {
        if !self.tenants.is_empty() {
            let name = "operator".to_owned();
            self.tenants.insert(key, Tenant { name, ..Tenant::everyone() });
        }
    }

    /// Sets knobs of every policy that steers, whatever these allow clients: an operator's way to
    /// try others. Knobs that `knobs` leaves unset stay.
    ///
    /// # Errors
    /// [`PolicyError::Value`] where a policy cannot have them.
    pub fn set_knobs(&mut self, knobs: &SteeringParams) -> Result<(), PolicyError> {
        for policy in self.policies.values_mut().filter(|policy| !policy.observe_only) {
            let others = [&mut policy.steering, &mut policy.elsewhere];
            for own in policy.by_sampler.values_mut().chain(others) {
                *own = steering::over(own, knobs);
                steering::resolve(own).map_err(|FieldError { field, problem }| {
                    PolicyError::Value {
                        policy: policy.name.clone(),
                        problem: format!("{field} {problem}"),
                    }
                })?;
            }
        }
        Ok(())
    }

    /// Names of all policies, sorted.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.policies.keys().map(String::as_str)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use fairlead_fuzz::{bounded, fuzz, spoiled_text};
    use proptest::prelude::*;

    fn problem(text: &str) -> String {
        Policies::parse(text).expect_err("it is wrong").to_string()
    }

    #[test]
    fn a_full_file_is_read() {
        let policies = Policies::parse(
            r#"
            default_policy = "strict"
            [policies.strict]
            concepts = ["*", "kitchen-knife"]
            allow_calibration_fallback = true
            outside = "withhold-unless-clear"
            energies = ["clip", "siglip"]
            weights = { siglip = 0.5 }
            steering = { eta = 0.5, mode = "shift-state" }
            sampler.flow-euler = { eta = 0.75, crops = 2 }
            [policies.observe]
            concepts = []
            observe_only = true
            "#,
        )
        .expect("it is right");
        let strict = policies.get("").expect("the default");
        assert_eq!((strict.name.as_str(), strict.all_served), ("strict", true));
        assert_eq!(strict.steering.eta, Some(0.5));
        assert_eq!(strict.steering_for("any", "ddim"), &strict.steering);
        let flow = strict.steering_for("any", "flow-euler");
        assert_eq!((flow.eta, flow.crops), (Some(0.75), Some(2)));
        assert_eq!(flow.mode, strict.steering.mode, "what it does not name stays");
        assert!(!strict.allow_overrides && strict.allow_calibration_fallback);
        assert_eq!(strict.outside, Outside::WithholdUnlessClear);
        assert!(strict.asks("clip") && !strict.asks("other"));
        assert_eq!(strict.weights()[0].weight, 0.5);
        assert!(policies.get("observe").expect("it is there").may_be_unchecked());
        assert_eq!(policies.get("other"), None);
    }

    #[test]
    fn an_operator_sets_the_knobs_of_every_policy_that_steers() {
        let mut policies = Policies::parse(
            "default_policy = 'a'\n[policies.a]\nconcepts = ['*']\nsteering.eta = 0.5\n\
             sampler.flow-euler = { eta = 1.0 }\n\
             [policies.o]\nconcepts = ['*']\nobserve_only = true",
        )
        .expect("it is right");
        let weak = SteeringParams { eta: Some(0.1), crops: Some(1), ..Default::default() };
        policies.set_knobs(&weak).expect("in range");
        let eta = |name: &str, sampler: &str| {
            policies.get(name).expect("it is there").steering_for("any", sampler).eta
        };
        assert_eq!(
            (eta("a", "ddim"), eta("a", "flow-euler"), eta("o", "ddim")),
            (Some(0.1), Some(0.1), None)
        );
        let nothing = SteeringParams { eta: Some(0.0), ..Default::default() };
        let refused = policies.set_knobs(&nothing).expect_err("out of range").to_string();
        assert!(refused.contains("policy `a`: eta is 0; it must be above 0"), "{refused}");
    }

    #[test]
    fn with_known_concepts_no_node_adds_to_a_policy() {
        let all = "[policies.a]\nconcepts = ['*', 'pill']\n[policies.default]\nconcepts = ['axe']";
        let listed = Policies::parse(&format!("known_concepts = ['axe', 'hat']\n{all}"));
        let listed = listed.expect("it is right");
        let policy = listed.get("a").expect("there");
        let asked = policy.concepts_for(["invented"], &["extra".to_owned()]);
        assert_eq!(asked.into_iter().collect::<Vec<_>>(), ["axe", "extra", "hat", "pill"]);
        listed.check_known().expect("they are named");
        assert_eq!(listed.unasked(["hat", "invented"].into_iter()), ["invented"]);

        let open = Policies::parse(&format!("known_concepts = ['*']\n{all}")).expect("right");
        open.check_known().expect("the operator says so");
        assert!(open.get("a").expect("there").concepts_for(["invented"], &[]).contains("invented"));
        let error = Policies::parse(all).expect("right").check_known().expect_err("nobody said");
        assert!(error.to_string().contains("known_concepts = [\"NAME\""), "{error}");
        Policies::default().check_known().expect_err("nobody said");
        let named = "[policies.a]\nconcepts = ['axe']";
        Policies::parse(named).expect("right").check_known().expect("none stands for all");
        for (list, part) in [("[]", "is empty"), ("['*', 'axe']", "kebab-case"), ("['A']", "`A`")] {
            let wrong = problem(&format!("known_concepts = {list}\n{all}"));
            assert!(wrong.contains("known_concepts: ") && wrong.contains(part), "{wrong}");
        }
    }

    #[test]
    fn knobs_are_for_the_generators_that_they_name() {
        let policies = Policies::parse(
            "[policies.a]\nconcepts = ['*']\nsteering = { eta = 0.5, generators = ['tiny', 'small'] }\n\
             sampler.ddim.eta = 1.0",
        )
        .expect("it is right");
        let policy = policies.get("").expect("the default");
        let eta = |generator, sampler| policy.steering_for(generator, sampler).eta;
        assert_eq!((eta("tiny", "flow-euler"), eta("tiny", "ddim")), (Some(0.5), Some(1.0)));
        assert_eq!((eta("real", "flow-euler"), eta("real", "ddim")), (None, None));
        assert_eq!(policy.notice("small"), None);
        assert_eq!(
            policy.notice("real").as_deref(),
            Some("the steering knobs of policy `a` are for small, tiny; `real` gets the defaults")
        );
        let none = problem("[policies.a]\nconcepts = ['*']\nsteering.generators = []");
        assert!(none.contains("policy `a`: steering.generators names none"), "{none}");
        let twice = problem("[policies.a]\nconcepts = ['*']\nsampler.ddim.generators = ['x']");
        assert!(twice.contains("sampler.ddim.generators: name them under steering"), "{twice}");
    }

    #[test]
    fn mistakes_are_named() {
        let typo = problem("[policies.a]\nconcept = ['x']");
        let expected =
            "line 2, column 1: `policies.a.concept` is not known here; known are concepts, ";
        assert!(typo.contains(expected), "{typo}");
        assert!(problem("").contains("no policies"));
        assert!(problem("[policies.a]\nconcepts = []").contains("allow_unchecked = true"));
        assert!(problem("[policies.a]\nconcepts = [' ']").contains("empty name"));
        let eta = problem("[policies.a]\nconcepts = ['*']\nsteering.eta = 3.0");
        assert!(eta.contains("policy `a`: steering.eta is 3"), "{eta}");
        let sampler = problem("[policies.a]\nconcepts = ['*']\nsampler.euler = { eta = 0.5 }");
        assert!(sampler.contains("sampler.euler is no sampler; there are: ddim"), "{sampler}");
        let eta = problem("[policies.a]\nconcepts = ['*']\nsampler.ddim = { eta = 3.0 }");
        assert!(eta.contains("policy `a`: sampler.ddim.eta is 3"), "{eta}");
        let weight = problem("[policies.a]\nconcepts = ['*']\nweights = { clip = 0.0 }");
        assert!(weight.contains("weights.clip is 0; it must be above 0"), "{weight}");
        let stray = "energies = ['clip']\nweights = { siglip = 1.0 }";
        let stray = problem(&format!("[policies.a]\nconcepts = ['*']\n{stray}"));
        assert!(stray.contains("weights.siglip: energies does not name it"), "{stray}");
        let missing = problem("default_policy = 'b'\n[policies.a]\nconcepts = ['*']");
        assert!(missing.contains("`b` is none of: a"), "{missing}");
        let two = problem("[policies.a]\nconcepts = ['*']\n[policies.b]\nconcepts = ['*']");
        assert!(two.contains("default_policy is missing; name one of: a, b"), "{two}");
        let file = Policies::load(Path::new("no/such.toml")).expect_err("it is absent").to_string();
        assert!(file.contains("no/such.toml"), "{file}");
    }

    proptest! {
        #[test]
        fn a_client_can_add_but_never_remove(
            mandatory in prop::collection::btree_set("[a-e]", 0..5),
            served in prop::collection::btree_set("[a-h]", 0..8),
            extra in prop::collection::vec("[a-j]", 0..5),
            all_served: bool,
        ) {
            let policies = Policies::default();
            let policy = Policy {
                concepts: mandatory.clone(), all_served, ..policies.get("").expect("built in").clone()
            };
            let names = policy.concepts_for(served.iter().map(String::as_str), &extra);
            prop_assert!(mandatory.is_subset(&names));
            prop_assert!(!all_served || served.is_subset(&names));
            prop_assert!(extra.iter().all(|name| names.contains(name)));
            let allowed = |name: &String| mandatory.contains(name) || extra.contains(name)
                || (all_served && served.contains(name));
            prop_assert!(names.iter().all(allowed));
        }
    }

    #[test]
    fn spoiled_files_are_sound_or_refused() {
        let valid = format!(
            "default_policy = 'strict'\n\
             [policies.strict]\nconcepts = ['*', 'axe']\nenergies = ['clip', 'siglip']\n\
             weights = {{ siglip = 0.5 }}\nsteering = {{ eta = 0.5, mode = 'shift-state' }}\n\
             sampler.flow-euler = {{ eta = 0.75, crops = 2 }}\noutside = 'withhold-unless-clear'\n\
             [policies.observe]\nconcepts = []\nobserve_only = true\n\
             [tenants.acme]\nkeys = ['sha256:{}']\npolicies = ['strict']\nmax_queued = 2\n\
             images_per_minute = 60\nwithheld_per_minute = 5\nsees_scores = true\n\
             highest_priority = 'low'\n",
            "0a".repeat(32)
        );
        Policies::parse(&valid).expect("it is right");
        fuzz(spoiled_text(&valid), |text| {
            let parsed = bounded(text.len(), || Policies::parse_at(&text, " p.toml".to_owned()));
            let Ok(policies) = parsed else { return };
            let default = policies.get("").expect("there is a default");
            assert!(policies.names().any(|name| name == default.name));
            for policy in policies.policies.values() {
                let asks = policy.all_served || !policy.concepts.is_empty();
                assert!(asks || policy.may_be_unchecked(), "{policy:?}");
                assert!(policy.weights.values().all(|w| *w > 0.0 && w.is_finite()), "{policy:?}");
                let known = steering::resolve(&policy.steering);
                assert!(known.is_ok(), "{policy:?}");
            }
        });
    }
}
