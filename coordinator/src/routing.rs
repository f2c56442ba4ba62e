//! Which energy node answers for which concept. Pure.

use std::{
    collections::BTreeSet,
    fmt,
    hash::{DefaultHasher, Hash, Hasher},
    sync::Arc,
};

use fairlead_common::envelope;
use fairlead_proto::v1::{
    CalibrationEnvelope, CalibrationInfo, CalibrationKey, ConceptRef, EnergyEndpoint, NodeInfo,
    SteeringParams,
};

/// A registered node as decisions see it.
#[derive(Debug, Clone)]
pub(crate) struct LiveNode {
    /// What it registered.
    pub(crate) info: Arc<NodeInfo>,
    /// When it registered, Unix milliseconds.
    pub(crate) since_unix_ms: i64,
    /// Shards and checks that use it now.
    pub(crate) load: usize,
}

impl LiveNode {
    /// Whether it serves `concept` at that very version.
    pub(crate) fn serves(&self, concept: &ConceptRef) -> bool {
        self.info.concepts.iter().any(|served| served.concept.as_ref() == Some(concept))
    }

    /// Its calibrations whose gate is for `concept`.
    pub(crate) fn calibrations(
        &self,
        concept: &ConceptRef,
    ) -> impl Iterator<Item = &CalibrationInfo> {
        let is_for = |info: &&CalibrationInfo| {
            info.concepts.is_empty() || info.concepts.contains(&concept.name)
        };
        self.info.calibrations.iter().filter(is_for)
    }

    /// Its calibrations of `concept` for `run`.
    pub(crate) fn calibrations_for(
        &self,
        concept: &ConceptRef,
        run: &Run,
    ) -> impl Iterator<Item = &CalibrationInfo> {
        let may_leave = run.key.conditions.is_some_and(|conditions| conditions.may_leave_envelope);
        self.calibrations(concept).filter(move |info| {
            run.fits(info)
                && (may_leave || run.outside(info).is_some_and(|ways| ways.is_empty()))
                && check_threshold(info, &concept.name).is_some_and(f32::is_finite)
        })
    }

    /// Whether it has a calibration of `concept` for `run`.
    pub(crate) fn is_calibrated(&self, concept: &ConceptRef, run: &Run) -> bool {
        self.calibrations_for(concept, run).next().is_some()
    }

    /// In which ways `run` lies outside the envelope of a calibration of `concept` that would fit otherwise,
    /// with that calibration.
    pub(crate) fn outside(
        &self,
        concept: &ConceptRef,
        run: &Run,
    ) -> Option<(Vec<String>, &CalibrationInfo)> {
        if !self.serves(concept) {
            return None;
        }
        let fitting = self.calibrations(concept).filter(|info| run.fits(info));
        let outside = fitting.filter_map(|info| Some((run.outside(info)?, info)));
        outside.min_by_key(|(ways, _)| ways.len())
    }
}

/// The raw score of `concept` above which a finished image must not leave, by `calibration`.
pub(crate) fn check_threshold(calibration: &CalibrationInfo, concept: &str) -> Option<f32> {
    let mut levels = calibration.check_thresholds.iter();
    levels.find(|level| level.concept == concept).map(|level| level.score)
}

/// What of a job a calibration must be for.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Run {
    /// Generator, sampler, steps and conditions.
    pub(crate) key: CalibrationKey,
    /// Crops per image.
    pub(crate) crops: u32,
    /// Start and end of the steering window, which the calibration must cover.
    pub(crate) window: (f32, f32),
}

impl Run {
    /// A run of `key` steered by `steering`, of which every knob is set.
    pub(crate) fn new(key: CalibrationKey, steering: &SteeringParams) -> Self {
        let window = (steering.window_start(), steering.window_end());
        Self { key, crops: steering.crops(), window }
    }

    /// Whether `info` is for it, envelope aside.
    fn fits(&self, info: &CalibrationInfo) -> bool {
        let CalibrationKey { generator, sampler, steps, conditions: _ } = &self.key;
        let is_key = info.key.as_ref().is_some_and(|key| {
            (&key.generator, &key.sampler, &key.steps) == (generator, sampler, steps)
        });
        is_key
            && info.crops == self.crops
            && info.window_start >= self.window.0
            && info.window_end <= self.window.1
    }

    /// In which ways it lies outside the envelope of `info`; `None` if that has no envelope.
    fn outside(&self, info: &CalibrationInfo) -> Option<Vec<String>> {
        let conditions = self.key.conditions.unwrap_or_default();
        Some(envelope::ways_outside(info.envelope.as_ref()?, &conditions))
    }

    /// The flags of `fairlead calibrate` that make a calibration for it.
    pub(crate) fn flags(&self) -> String {
        let conditions = self.key.conditions.unwrap_or_default();
        self.flags_with(self.window, &envelope::around(&conditions))
    }

    /// The flags that make `info` anew with an envelope that holds this run, too.
    pub(crate) fn extending(&self, info: &CalibrationInfo) -> String {
        let conditions = self.key.conditions.unwrap_or_default();
        let envelope = envelope::extended(&info.envelope.clone().unwrap_or_default(), &conditions);
        self.flags_with((info.window_start, info.window_end), &envelope)
    }

    fn flags_with(&self, (start, end): (f32, f32), envelope: &CalibrationEnvelope) -> String {
        let Self { key: CalibrationKey { steps, .. }, crops, .. } = self;
        let envelope = envelope::flags(envelope);
        format!(
            "--steps {steps} --crops {crops} --window-start {start} --window-end {end} {envelope}"
        )
    }
}

impl fmt::Display for Run {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { key: CalibrationKey { sampler, steps, .. }, crops, window: (start, end) } = self;
        write!(f, "{sampler}, {steps} steps, {crops} crops, window {start} to {end}")
    }
}

/// How much calibration a job needs from its nodes.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Calibration<'a> {
    /// Only nodes calibrated for the run will do.
    Required(&'a Run),
    /// Calibrated nodes are asked first.
    Preferred(&'a Run),
    /// Raw scores are enough.
    Unneeded,
}

/// A concept that no node can answer for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Unserved {
    /// The concept.
    pub(crate) concept: ConceptRef,
    /// A live node serves it, but without the calibration.
    pub(crate) uncalibrated: bool,
    /// How many nodes must answer for it, and how many of them are missing.
    pub(crate) wanted: u32,
    pub(crate) missing: u32,
}

impl fmt::Display for Unserved {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let ConceptRef { name, version, energy } = &self.concept;
        match (self.uncalibrated, self.wanted) {
            (false, 1) => write!(
                f,
                "concept `{name}`: no live energy node with {energy} serves version {version}"
            ),
            (false, wanted) => write!(
                f,
                "concept `{name}`: the policy wants {wanted} checks of it, and {} live energy nodes with \
                 {energy} serve version {version}",
                wanted - self.missing
            ),
            (true, _) => write!(
                f,
                "concept `{name}`: no live energy node with {energy} has its calibration any longer; run \
                 `fairlead calibrate` again"
            ),
        }
    }
}

/// Nodes to ask, and concepts left over.
#[derive(Debug, Clone, Default, PartialEq)]
pub(crate) struct Assignment {
    /// Each served concept under exactly one node.
    pub(crate) endpoints: Vec<EnergyEndpoint>,
    /// Every usable node with all the concepts it serves, in the order in which they are to be asked:
    /// a concept of the first that serves it, and of the next if that fails.
    pub(crate) told: Vec<EnergyEndpoint>,
    /// Concepts without a node.
    pub(crate) unserved: Vec<Unserved>,
}

impl Calibration<'_> {
    fn is_missing(self, node: &LiveNode, concept: &ConceptRef) -> bool {
        match self {
            Self::Required(run) | Self::Preferred(run) => !node.is_calibrated(concept, run),
            Self::Unneeded => false,
        }
    }

    /// Whether `node` may be asked for `concept`.
    fn will_do(self, node: &LiveNode, concept: &ConceptRef) -> bool {
        let is_required = matches!(self, Self::Required(_));
        node.serves(concept) && !(is_required && self.is_missing(node, concept))
    }

    /// Whether `node` serves some of `concepts` without their calibration.
    fn lacks_some(self, node: &LiveNode, concepts: &[ConceptRef]) -> bool {
        concepts.iter().any(|concept| node.serves(concept) && self.is_missing(node, concept))
    }
}

/// Where `node` stands in an order that is drawn by `salt`: no name helps to be asked first.
fn drawn(salt: u64, node: &LiveNode) -> u64 {
    let mut hasher = DefaultHasher::new();
    (salt, &node.info.node_id).hash(&mut hasher);
    hasher.finish()
}

/// Assigns each of `concepts` to exactly one of `nodes`. Calibrated nodes come first, then the
/// least loaded, then as `salt` draws; a node takes everything it can, so that few nodes are asked per
/// step.
pub(crate) fn assign(
    concepts: &[ConceptRef],
    nodes: &[LiveNode],
    calibration: Calibration<'_>,
    salt: u64,
) -> Assignment {
    let mut order: Vec<&LiveNode> = nodes.iter().collect();
    order.sort_by_cached_key(|node| {
        (calibration.lacks_some(node, concepts), node.load, drawn(salt, node))
    });
    let will_do = |node: &LiveNode, concept: &&ConceptRef| calibration.will_do(node, concept);
    let served = order.into_iter().map(|node| EnergyEndpoint {
        node: Some(NodeInfo::clone(&node.info)),
        concepts: concepts.iter().filter(|concept| will_do(node, concept)).cloned().collect(),
    });
    let told: Vec<EnergyEndpoint> = served.filter(|served| !served.concepts.is_empty()).collect();
    let endpoints = first_asked(concepts, &told);
    let is_served = |concept: &ConceptRef| endpoints.iter().any(|e| e.concepts.contains(concept));
    let unserved = concepts.iter().filter(|concept| !is_served(concept)).map(|concept| {
        let uncalibrated = nodes.iter().any(|node| node.serves(concept));
        Unserved { concept: concept.clone(), uncalibrated, wanted: 1, missing: 1 }
    });
    Assignment { unserved: unserved.collect(), endpoints, told }
}

/// The nodes of one final check: of every concept as many as the policy wants, each another one. They are
/// drawn at random whatever their load, which a node could keep low by itself.
#[derive(Debug, Clone)]
pub(crate) struct Panel {
    /// How many nodes are wanted for each concept.
    checks: u32,
    /// Concepts, and how many nodes have yet to answer for each.
    left: Vec<(ConceptRef, u32)>,
    /// Who has answered for what.
    answered: BTreeSet<(String, String, String)>,
}

impl Panel {
    /// Nobody has answered yet; `checks` nodes are wanted for each of `concepts`.
    pub(crate) fn new(concepts: &[ConceptRef], checks: u32) -> Self {
        let left = concepts.iter().map(|concept| (concept.clone(), checks)).collect();
        Self { checks, left, answered: BTreeSet::new() }
    }

    /// Whether every concept has all its answers.
    pub(crate) fn is_complete(&self) -> bool {
        self.left.is_empty()
    }

    /// `node_id` has answered for `concepts`.
    pub(crate) fn answered(&mut self, node_id: &str, concepts: &[ConceptRef]) {
        for (concept, left) in &mut self.left {
            if concepts.contains(concept) && self.answered.insert(answer(node_id, concept)) {
                *left -= 1;
            }
        }
        self.left.retain(|(_, left)| *left > 0);
    }

    /// Whom to ask next, all at once: among `nodes`, calibrated ones first, drawn by `salt`.
    ///
    /// # Errors
    /// If a concept has too few nodes.
    pub(crate) fn next(
        &self,
        nodes: &[LiveNode],
        calibration: Calibration<'_>,
        salt: u64,
    ) -> Result<Vec<EnergyEndpoint>, Unserved> {
        let concepts: Vec<ConceptRef> =
            self.left.iter().map(|(concept, _)| concept.clone()).collect();
        let mut order: Vec<&LiveNode> = nodes.iter().collect();
        order.sort_by_cached_key(|node| {
            (calibration.lacks_some(node, &concepts), drawn(salt, node))
        });
        let mut left = self.left.clone();
        let mut endpoints = Vec::new();
        for node in order {
            let mut taken = Vec::new();
            for (concept, wanted) in left.iter_mut().filter(|(_, wanted)| *wanted > 0) {
                let is_new = !self.answered.contains(&answer(&node.info.node_id, concept));
                if is_new && calibration.will_do(node, concept) {
                    *wanted -= 1;
                    taken.push(concept.clone());
                }
            }
            if !taken.is_empty() {
                let node = Some(NodeInfo::clone(&node.info));
                endpoints.push(EnergyEndpoint { node, concepts: taken });
            }
        }
        match left.into_iter().find(|(_, wanted)| *wanted > 0) {
            None => Ok(endpoints),
            Some((concept, missing)) => Err(Unserved {
                uncalibrated: nodes
                    .iter()
                    .any(|node| node.serves(&concept) && !calibration.will_do(node, &concept)),
                wanted: self.checks,
                missing,
                concept,
            }),
        }
    }
}

fn answer(node_id: &str, ConceptRef { name, energy, .. }: &ConceptRef) -> (String, String, String) {
    (node_id.to_owned(), name.clone(), energy.clone())
}

/// Each of `concepts` under the first of `told` that serves it.
pub(crate) fn first_asked(concepts: &[ConceptRef], told: &[EnergyEndpoint]) -> Vec<EnergyEndpoint> {
    let mut left = concepts.to_vec();
    let mut endpoints = Vec::new();
    for endpoint in told {
        let (taken, rest): (Vec<_>, Vec<_>) =
            left.into_iter().partition(|concept| endpoint.concepts.contains(concept));
        left = rest;
        if !taken.is_empty() {
            endpoints.push(EnergyEndpoint { node: endpoint.node.clone(), concepts: taken });
        }
    }
    endpoints
}

/// `told`, those that `before` has first and in its order: a running shard stays with the nodes it
/// asks, however the load has changed.
pub(crate) fn keep_order(
    mut told: Vec<EnergyEndpoint>,
    before: &[EnergyEndpoint],
) -> Vec<EnergyEndpoint> {
    fn id(endpoint: &EnergyEndpoint) -> Option<&str> {
        endpoint.node.as_ref().map(|node| node.node_id.as_str())
    }
    told.sort_by_key(|endpoint| {
        before.iter().position(|other| id(other) == id(endpoint)).unwrap_or(usize::MAX)
    });
    told
}

/// Whether both name the same nodes, at the same addresses and for the same concepts.
pub(crate) fn same_nodes(one: &[EnergyEndpoint], other: &[EnergyEndpoint]) -> bool {
    fn place(endpoint: &EnergyEndpoint) -> Option<(&str, &str)> {
        endpoint.node.as_ref().map(|node| (node.node_id.as_str(), node.address.as_str()))
    }
    one.len() == other.len()
        && one.iter().zip(other).all(|(a, b)| place(a) == place(b) && a.concepts == b.concepts)
}

#[cfg(test)]
mod tests {
    use super::*;
    use fairlead_proto::v1::{CheckThreshold, ConceptInfo, ImageSize, RunConditions};
    use proptest::prelude::*;

    fn concept(name: &str) -> ConceptRef {
        ConceptRef { name: name.into(), version: "1".into(), ..Default::default() }
    }

    fn level(concept: &str) -> CheckThreshold {
        CheckThreshold { concept: concept.into(), score: 0.5 }
    }

    fn conditions(side: u32) -> RunConditions {
        RunConditions {
            size: Some(ImageSize { width: side, height: side }),
            guidance_scale: 5.0,
            ..Default::default()
        }
    }

    fn run() -> Run {
        let key = CalibrationKey {
            generator: "g".into(),
            sampler: "ddim".into(),
            steps: 25,
            conditions: Some(conditions(32)),
        };
        Run { key, crops: 4, window: (1.0, 0.6) }
    }

    fn node(id: &str, concepts: &[&str], load: usize, calibrated: bool) -> LiveNode {
        let info = |name: &&str| ConceptInfo { concept: Some(concept(name)), ..Default::default() };
        let calibration = CalibrationInfo {
            key: Some(CalibrationKey { conditions: None, ..run().key }),
            crops: 4,
            window_start: 1.0,
            window_end: 0.4,
            check_thresholds: concepts.iter().map(|name| level(name)).collect(),
            envelope: Some(envelope::around(&conditions(32))),
            ..Default::default()
        };
        LiveNode {
            info: Arc::new(NodeInfo {
                node_id: id.into(),
                concepts: concepts.iter().map(info).collect(),
                calibrations: calibrated.then_some(calibration).into_iter().collect(),
                ..Default::default()
            }),
            since_unix_ms: 0,
            load,
        }
    }

    fn ids(assignment: &Assignment) -> Vec<String> {
        let nodes = assignment.endpoints.iter().filter_map(|endpoint| endpoint.node.clone());
        nodes.map(|node| node.node_id).collect()
    }

    #[test]
    fn replicas_are_not_both_asked_and_the_idle_one_is_preferred() {
        let nodes = [node("a", &["x", "y"], 3, true), node("b", &["x", "y"], 1, true)];
        let run = run();
        let both = [concept("x"), concept("y")];
        let assignment = assign(&both, &nodes, Calibration::Required(&run), 0);
        assert_eq!(ids(&assignment), ["b"]);
        let told = assignment.told;
        assert_eq!(told.len(), 2);
        assert_eq!(told[1].node.as_ref().map(|node| node.node_id.as_str()), Some("a"));
        assert_eq!(told[1].concepts, both, "the replica serves all of them");
    }

    #[test]
    fn a_running_shard_stays_with_its_nodes_while_they_live() {
        let concepts = [concept("x"), concept("y")];
        let told = |nodes: &[LiveNode]| assign(&concepts, nodes, Calibration::Unneeded, 0).told;
        let before = told(&[node("a", &["x", "y"], 0, true)]);
        // A replica joins that nobody uses yet.
        let busy = node("a", &["x", "y"], 8, true);
        let joined = told(&[busy.clone(), node("b", &["x", "y"], 0, true)]);
        let kept = keep_order(joined, &before);
        assert!(!same_nodes(&kept, &before), "the worker hears of it");
        let asked = |told: &[EnergyEndpoint]| {
            let endpoints = first_asked(&concepts, told);
            endpoints.into_iter().filter_map(|e| e.node).map(|n| n.node_id).collect::<Vec<_>>()
        };
        assert_eq!(asked(&kept), ["a"]);
        // Its own node gone, the other takes over; back with fewer concepts, it shares.
        let left = keep_order(told(&[node("b", &["x", "y"], 0, true)]), &kept);
        assert_eq!(asked(&left), ["b"]);
        let partly = [node("a", &["x"], 0, true), node("b", &["x", "y"], 3, true)];
        assert_eq!(asked(&keep_order(told(&partly), &kept)), ["a", "b"]);
        // Serving more than before under the same name and address is news.
        let more = told(&[node("a", &["x"], 0, true)]);
        assert!(!same_nodes(&told(&[node("a", &["x", "y"], 0, true)]), &more));
    }

    #[test]
    fn calibration_is_required_preferred_or_ignored() {
        let nodes = [node("a", &["x"], 0, false), node("b", &["x"], 9, true)];
        let (run, x) = (run(), [concept("x")]);
        assert_eq!(ids(&assign(&x, &nodes, Calibration::Required(&run), 0)), ["b"]);
        assert_eq!(ids(&assign(&x, &nodes, Calibration::Preferred(&run), 0)), ["b"]);
        assert_eq!(ids(&assign(&x, &nodes, Calibration::Unneeded, 0)), ["a"]);
        let missing = assign(&x, &nodes[..1], Calibration::Required(&run), 0).unserved;
        assert!(missing[0].uncalibrated);
        assert!(
            !assign(&[concept("z")], &nodes, Calibration::Unneeded, 0).unserved[0].uncalibrated
        );
    }

    #[test]
    fn a_calibration_is_for_its_crops_and_inside_its_window() {
        let nodes = [node("a", &["x"], 0, true)];
        let serves = |crops, window| {
            let run = Run { crops, window, ..run() };
            assign(&[concept("x")], &nodes, Calibration::Required(&run), 0).unserved.is_empty()
        };
        assert!(serves(4, (1.0, 0.4)) && serves(4, (0.9, 0.8)));
        assert!(!serves(2, (1.0, 0.4)));
        assert!(!serves(4, (1.0, 0.3)));
    }

    #[test]
    fn a_calibration_is_for_runs_inside_its_envelope() {
        let mut node = node("a", &["x"], 0, true);
        let serves = |node: &LiveNode, conditions: Option<RunConditions>| {
            let run = Run { key: CalibrationKey { conditions, ..run().key }, ..run() };
            let need = Calibration::Required(&run);
            assign(&[concept("x")], std::slice::from_ref(node), need, 0).unserved.is_empty()
        };
        assert!(serves(&node, Some(conditions(32))));
        assert!(!serves(&node, Some(conditions(64))) && !serves(&node, None));
        let lenient = RunConditions { may_leave_envelope: true, ..conditions(64) };
        assert!(serves(&node, Some(lenient)));
        let large =
            Run { key: CalibrationKey { conditions: Some(conditions(64)), ..run().key }, ..run() };
        let (ways, info) = node.outside(&concept("x"), &large).expect("it would fit");
        assert_eq!(ways, ["size 64x64, calibrated 32x32"]);
        let flags = "--steps 25 --crops 4 --window-start 1 --window-end 0.4 --size 32x32,64x64 --guidance 5";
        assert_eq!(large.extending(info), flags);
        // One that does not say what it was made with is for nothing.
        let mut info = NodeInfo::clone(&node.info);
        info.calibrations[0].envelope = None;
        node.info = Arc::new(info);
        assert!(!serves(&node, Some(conditions(32))));
    }

    #[test]
    fn a_calibration_is_for_the_concepts_it_names() {
        let mut both = node("a", &["x", "y"], 0, true);
        let mut info = NodeInfo::clone(&both.info);
        info.calibrations[0].concepts = vec!["x".into()];
        both.info = Arc::new(info);
        let (run, asked) = (run(), [concept("x"), concept("y")]);
        let assignment = assign(&asked, &[both.clone()], Calibration::Required(&run), 0);
        assert_eq!(assignment.endpoints[0].concepts, [concept("x")]);
        assert!(assignment.unserved[0].uncalibrated);
        assert_eq!(assignment.unserved[0].concept, concept("y"));
        let nodes = [both, node("b", &["y"], 5, true)];
        let assignment = assign(&asked, &nodes, Calibration::Required(&run), 0);
        assert!(assignment.unserved.is_empty());
        assert_eq!(assignment.endpoints.len(), 2);
    }

    #[test]
    fn another_version_does_not_serve() {
        let other = ConceptRef { name: "x".into(), version: "2".into(), ..Default::default() };
        let nodes = [node("a", &["x"], 0, true)];
        assert_eq!(assign(&[other], &nodes, Calibration::Unneeded, 0).endpoints, []);
    }

    #[test]
    fn a_panel_is_drawn_whatever_a_nodes_name_and_load() {
        let nodes = [node("aaa", &["x"], 0, true), node("b", &["x"], 9, true)];
        let run = run();
        let first = |salt| {
            let panel = Panel::new(&[concept("x")], 1);
            let asked =
                panel.next(&nodes, Calibration::Required(&run), salt).expect("two serve it");
            asked[0].node.clone().unwrap_or_default().node_id
        };
        let firsts: Vec<String> = (0..1000).map(first).collect();
        let share = firsts.iter().filter(|id| *id == "aaa").count();
        assert!((400..600).contains(&share), "{share} of 1000");
    }

    #[test]
    fn a_panel_that_is_too_small_says_what_it_lacks() {
        let nodes = [node("a", &["x", "y"], 0, true), node("b", &["x"], 0, true)];
        let panel = Panel::new(&[concept("x"), concept("y")], 2);
        let short = panel.next(&nodes, Calibration::Unneeded, 0).expect_err("one serves y");
        assert_eq!((&*short.concept.name, short.wanted, short.missing), ("y", 2, 1));
        assert!(short.to_string().contains("wants 2 checks of it, and 1 live"), "{short}");
    }

    proptest! {
        /// Whoever fails on the way, each concept ends with answers of as many nodes as were wanted, each
        /// another one.
        #[test]
        fn a_panel_has_every_concept_checked_by_different_nodes(
            checks in 1u32..4,
            served in prop::collection::vec(prop::collection::btree_set("[a-c]", 1..4), 1..6),
            fails in prop::collection::vec(any::<bool>(), 6),
            salt: u64,
        ) {
            let nodes: Vec<_> = served.iter().enumerate().map(|(i, names)| {
                let names: Vec<_> = names.iter().map(String::as_str).collect();
                node(&format!("n{i}"), &names, 0, true)
            }).collect();
            let wanted: Vec<_> = ["a", "b", "c"].map(concept).to_vec();
            let mut panel = Panel::new(&wanted, checks);
            let mut answers: Vec<(String, String)> = Vec::new();
            let mut usable = nodes.clone();
            let mut short = None;
            while !panel.is_complete() && short.is_none() {
                match panel.next(&usable, Calibration::Unneeded, salt) {
                    Err(unserved) => short = Some(unserved),
                    Ok(asked) => for endpoint in asked {
                        let id = endpoint.node.clone().unwrap_or_default().node_id;
                        let number: usize = id[1..].parse().expect("a number");
                        if fails[number] {
                            usable.retain(|node| node.info.node_id != id);
                            continue;
                        }
                        panel.answered(&id, &endpoint.concepts);
                        answers.extend(endpoint.concepts.iter().map(|c| (c.name.clone(), id.clone())));
                    },
                }
            }
            let distinct: BTreeSet<_> = answers.iter().collect();
            prop_assert_eq!(distinct.len(), answers.len(), "nobody answers twice for a concept");
            for concept in &wanted {
                let count = answers.iter().filter(|(name, _)| *name == concept.name).count();
                prop_assert!(count <= checks as usize);
                prop_assert!(short.is_some() || count == checks as usize);
            }
            if let Some(Unserved { concept, .. }) = short {
                let able = nodes.iter().enumerate();
                let able = able.filter(|(i, node)| !fails[*i] && node.serves(&concept)).count();
                prop_assert!(able < checks as usize, "there were enough for {}", concept.name);
            }
        }

        #[test]
        fn each_concept_is_asked_once_of_a_node_that_serves_it(
            wanted in prop::collection::btree_set("[a-f]", 0..6),
            served in prop::collection::vec((prop::collection::btree_set("[a-f]", 0..6), 0usize..4), 0..5),
        ) {
            let nodes: Vec<_> = served.iter().enumerate().map(|(i, (names, load))| {
                let names: Vec<_> = names.iter().map(String::as_str).collect();
                node(&format!("n{i}"), &names, *load, true)
            }).collect();
            let concepts: Vec<_> = wanted.iter().map(|name| concept(name)).collect();
            let Assignment { endpoints, told, unserved } = assign(&concepts, &nodes, Calibration::Unneeded, 0);
            prop_assert_eq!(&first_asked(&concepts, &told), &endpoints);
            let mut all: Vec<_> = endpoints.iter().flat_map(|e| e.concepts.clone()).collect();
            all.extend(unserved.iter().map(|u| u.concept.clone()));
            all.sort_by(|a, b| a.name.cmp(&b.name));
            prop_assert_eq!(all, concepts);
            for left in unserved {
                prop_assert!(nodes.iter().all(|node| !node.serves(&left.concept)));
            }
        }
    }
}
