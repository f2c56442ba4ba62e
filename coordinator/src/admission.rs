//! Admission: a request becomes a job with every default filled in and every concept pinned, or
//! is refused with what, where and what to do. Pure.

use std::collections::{BTreeMap, BTreeSet};

use fairlead_common::{
    ids::{JobId, RecordId, ShardId},
    probe::Probe,
};
use fairlead_proto::v1::{self, ImageStatus};

use crate::{
    error::{Error, Result},
    levels, placement,
    policy::{Policies, Policy},
    routing::{Calibration, LiveNode, Panel, Run},
    state::{JobRecord, Shard},
    steering,
    store::Seen,
    suggest,
    tenants::Tenant,
};

/// Most bytes of a prompt.
pub(crate) const MAX_PROMPT_BYTES: usize = 8 << 10;

/// Most images of a job.
pub(crate) const MAX_IMAGES: u32 = 64;

/// Most sampling steps.
pub(crate) const MAX_STEPS: u32 = 1_000;

/// Most concepts of a job.
const MAX_EXTRA_CONCEPTS: usize = 256;

/// What the cluster offers when a request arrives.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Cluster<'a> {
    /// Generators of attached workers.
    pub(crate) models: &'a [v1::ModelInfo],
    /// Live energy nodes.
    pub(crate) nodes: &'a [LiveNode],
    /// What any member of the cluster ever had.
    pub(crate) seen: &'a Seen,
}

/// What a new job is given.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Identity {
    /// Its id; shard and record ids derive from it.
    pub(crate) job: JobId,
    /// The seed if the request has none.
    pub(crate) drawn_seed: u64,
    /// Unix milliseconds.
    pub(crate) now: i64,
}

/// Admits `spec` or refuses it. Where workers have different models of the name that is asked for, the job
/// gets the first that it can have.
pub(crate) fn admit(
    spec: &v1::JobSpec,
    policies: &Policies,
    tenant: &Tenant,
    cluster: &Cluster<'_>,
    identity: Identity,
) -> Result<JobRecord> {
    check_request(spec)?;
    check_count(spec.n)?;
    let models = find_models(&spec.model, cluster)?;
    let mut refused = None;
    for &model in &models {
        match admit_for(model, spec, policies, tenant, cluster, identity) {
            Ok(mut record) => {
                if models.len() > 1 {
                    let (name, hash) = (&model.name, &model.hash);
                    let all = models.len();
                    record.job.notices.push(format!(
                        "workers have {all} different models called `{name}`; this is `{name}@{hash}`"
                    ));
                }
                return Ok(record);
            }
            // What the first says is what most people want to know.
            Err(error) => refused = refused.or(Some(error)),
        }
    }
    Err(refused.expect("a name that is found has one model at least"))
}

fn admit_for(
    model: &v1::ModelInfo,
    spec: &v1::JobSpec,
    policies: &Policies,
    tenant: &Tenant,
    cluster: &Cluster<'_>,
    identity: Identity,
) -> Result<JobRecord> {
    let width = side("width", spec.width, model.default_width, model)?;
    let height = side("height", spec.height, model.default_height, model)?;
    let steps = steps(spec.steps.unwrap_or(model.default_steps), model)?;
    let guidance = guidance(spec.guidance_scale.unwrap_or(model.default_guidance_scale))?;
    let policy = find_policy(&spec.policy, policies, tenant)?;
    let priority = priority(spec.priority(), tenant)?;
    let key =
        v1::CalibrationKey { generator: model.hash.clone(), sampler: model.sampler.clone(), steps };
    let pinned = pin_policy(spec, policy, tenant, cluster, model, &key)?;
    let filled = v1::JobSpec {
        model: model.name.clone(),
        width: Some(width),
        height: Some(height),
        steps: Some(steps),
        guidance_scale: Some(guidance),
        seed: Some(spec.seed.unwrap_or(identity.drawn_seed)),
        policy: policy.name.clone(),
        priority: priority.into(),
        steering: pinned.steering,
        ..spec.clone()
    };
    Ok(JobRecord { tenant: tenant.name.clone(), ..build(filled, pinned, model, identity) })
}

/// Calibration that a job under `policy` needs of its nodes.
pub(crate) fn calibration<'a>(policy: &v1::PinnedPolicy, run: &'a Run) -> Calibration<'a> {
    match (policy.observe_only, policy.allow_calibration_fallback) {
        (true, _) => Calibration::Unneeded,
        (false, true) => Calibration::Preferred(run),
        (false, false) => Calibration::Required(run),
    }
}

fn check_request(spec: &v1::JobSpec) -> Result<()> {
    if spec.prompt.trim().is_empty() {
        return Err(Error::invalid("prompt", "is empty; say what to draw"));
    }
    for (field, text) in [("prompt", &spec.prompt), ("negative_prompt", &spec.negative_prompt)] {
        if text.len() > MAX_PROMPT_BYTES {
            let problem = format!("has {} bytes; at most {MAX_PROMPT_BYTES}", text.len());
            return Err(Error::invalid(field, problem));
        }
    }
    if v1::Priority::try_from(spec.priority).is_err() {
        return Err(Error::invalid("priority", format!("{} is none", spec.priority)));
    }
    if spec.extra_concepts.len() > MAX_EXTRA_CONCEPTS {
        let problem = format!("has {}; at most {MAX_EXTRA_CONCEPTS}", spec.extra_concepts.len());
        return Err(Error::invalid("extra_concepts", problem));
    }
    Ok(())
}

fn check_count(n: u32) -> Result<()> {
    if (1..=MAX_IMAGES).contains(&n) {
        return Ok(());
    }
    Err(Error::invalid("n", format!("is {n}; ask for 1 to {MAX_IMAGES} images")))
}

/// The models of a name, or of NAME@HASH, the beginning of a hash; never none.
fn find_models<'a>(asked: &str, cluster: &Cluster<'a>) -> Result<Vec<&'a v1::ModelInfo>> {
    let names = || cluster.models.iter().map(|model| model.name.as_str());
    let (name, hash) = asked.split_once('@').unwrap_or((asked, ""));
    // Without a name, the only one that there is.
    let only = cluster.models.first().map(|model| model.name.as_str());
    let only = only.filter(|only| name.is_empty() && names().all(|name| name == *only));
    let found: Vec<_> = cluster
        .models
        .iter()
        .filter(|model| model.name == only.unwrap_or(name) && model.hash.starts_with(hash))
        .collect();
    if !found.is_empty() {
        return Ok(found);
    }
    if let Some(model) = cluster.models.iter().find(|model| model.name == name) {
        let problem = format!("`{asked}`: no worker has that; there is `{name}@{}`", model.hash);
        return Err(Error::invalid("model", problem));
    }
    match (name.is_empty(), cluster.models) {
        (_, []) => Err(Error::Unavailable(
            "model: no worker is attached; start one with `fairlead worker`".to_owned(),
        )),
        (true, _) => {
            let hint = suggest::hint("", names());
            Err(Error::invalid("model", format!("is empty and several are attached{hint}")))
        }
        (false, _) if cluster.seen.models.contains(name) => Err(Error::Unavailable(format!(
            "model: no worker with `{name}` is attached now; start one or retry later"
        ))),
        (false, _) => {
            let hint = suggest::hint(name, names());
            Err(Error::invalid("model", format!("`{name}` is unknown{hint}")))
        }
    }
}

fn find_policy<'a>(asked: &str, policies: &'a Policies, tenant: &Tenant) -> Result<&'a Policy> {
    let Some(name) = tenant.policy(asked) else {
        let own = tenant.policies.as_deref().unwrap_or_default().join(", ");
        let problem = format!("policy: `{asked}` is none of tenant `{}`'s: {own}", tenant.name);
        return Err(Error::Forbidden(problem));
    };
    policies.get(name).ok_or_else(|| {
        let hint = suggest::hint(name, policies.names());
        Error::invalid("policy", format!("`{name}` is unknown{hint}"))
    })
}

/// A job's priority: what is asked for, or the tenant's highest where nothing is and that is below normal.
fn priority(asked: v1::Priority, tenant: &Tenant) -> Result<v1::Priority> {
    use v1::Priority::{High, Low, Normal, Unspecified};
    let highest = tenant.highest_priority;
    match (asked, highest) {
        (Unspecified, Low) => Ok(Low),
        (High, Normal | Low) | (Normal, Low) => Err(Error::Forbidden(format!(
            "priority: {} is above the highest of tenant `{}`, {}",
            asked.as_str_name(),
            tenant.name,
            highest.as_str_name()
        ))),
        _ => Ok(asked),
    }
}

fn side(
    field: &'static str,
    asked: Option<u32>,
    default: u32,
    model: &v1::ModelInfo,
) -> Result<u32> {
    let (side, unit) = (asked.unwrap_or(default), model.granularity.max(1));
    let largest = model.max_side / unit * unit;
    if side >= unit && side <= largest && side.is_multiple_of(unit) {
        return Ok(side);
    }
    let below = (side / unit * unit).clamp(unit, largest.max(unit));
    let above = side.div_ceil(unit).saturating_mul(unit).clamp(unit, largest.max(unit));
    let nearest = if below == above { below.to_string() } else { format!("{below} and {above}") };
    let name = &model.name;
    let problem = if side > largest {
        format!("is {side}, but `{name}` makes at most {largest}; nearest valid: {nearest}")
    } else {
        format!("is {side}, but `{name}` needs a multiple of {unit}; nearest valid: {nearest}")
    };
    Err(Error::invalid(field, problem))
}

fn steps(steps: u32, model: &v1::ModelInfo) -> Result<u32> {
    let most = match model.max_steps {
        0 => MAX_STEPS,
        most => most.min(MAX_STEPS),
    };
    if (1..=most).contains(&steps) {
        return Ok(steps);
    }
    let name = &model.name;
    Err(Error::invalid("steps", format!("is {steps}; ask `{name}` for 1 to {most}")))
}

fn guidance(scale: f32) -> Result<f32> {
    if (1.0..=30.0).contains(&scale) {
        return Ok(scale);
    }
    let problem = format!("is {scale}; it must be from 1 (off) to 30");
    Err(Error::invalid("guidance_scale", problem))
}

fn pin_policy(
    spec: &v1::JobSpec,
    policy: &Policy,
    tenant: &Tenant,
    cluster: &Cluster<'_>,
    model: &v1::ModelInfo,
    key: &v1::CalibrationKey,
) -> Result<v1::PinnedPolicy> {
    let overrides = spec.steering.as_ref().filter(|params| !steering::is_unset(params));
    if overrides.is_some() && !policy.allow_overrides {
        return Err(Error::invalid(
            "steering",
            format!("policy `{}` does not allow overrides; leave it unset", policy.name),
        ));
    }
    let steering = steering::resolve(policy.steering_for(&model.sampler), overrides)
        .map_err(|problem| Error::invalid("steering", problem))?;
    let mut pinned = v1::PinnedPolicy {
        name: policy.name.clone(),
        concepts: Vec::new(),
        steering: Some(steering),
        allow_calibration_fallback: policy.allow_calibration_fallback,
        observe_only: policy.observe_only,
        weights: policy.weights(),
        levels: Vec::new(),
        checks: policy.checks,
    };
    let run = Run::new(key.clone(), &steering);
    let need = calibration(&pinned, &run);
    let served = served(cluster.nodes);
    if let Some(energy) = policy.energies.iter().find(|e| served.keys().all(|p| p.energy != **e)) {
        return Err(Error::Unavailable(format!(
            "policy `{}` needs the energy `{energy}`, which no live energy node runs; start one with \
             `fairlead energy` or retry later",
            policy.name
        )));
    }
    // What lost its last node still belongs to the job: its absence is an error, not a gap.
    let known: BTreeSet<&Probe> = served
        .keys()
        .chain(&cluster.seen.probes)
        .filter(|probe| policy.asks(&probe.energy))
        .collect();
    let names = known.iter().map(|probe| probe.concept.as_str());
    let mut concepts = policy.concepts_for(names, &spec.extra_concepts);
    concepts.extend(tenant.concepts.iter().cloned());
    for name in concepts {
        let mut probes = known.iter().filter(|probe| probe.concept == name).peekable();
        if probes.peek().is_none() {
            return Err(unserved(&name, policy, tenant, cluster));
        }
        for probe in probes {
            let Some(versions) = served.get(*probe) else {
                let is_named = policy.concepts.contains(&name)
                    || tenant.concepts.contains(&name)
                    || spec.extra_concepts.contains(&name);
                let has_other = served.keys().any(|other| other.concept == name);
                return Err(gone(probe, !is_named && !has_other));
            };
            pinned.concepts.push(newest(versions, need, cluster.nodes));
        }
    }
    if pinned.concepts.is_empty() && !policy.may_be_unchecked() {
        return Err(Error::Unavailable(format!(
            "policy `{}` needs a concept to check, but no energy node is registered; start one \
             with `fairlead energy`",
            policy.name
        )));
    }
    match Panel::new(&pinned.concepts, policy.checks).next(cluster.nodes, need, 0) {
        Ok(_) => {
            if !policy.observe_only {
                pinned.levels = levels::pin(&pinned.concepts, cluster.nodes, &run);
            }
            Ok(pinned)
        }
        Err(unserved) if unserved.wanted > 1 && !unserved.uncalibrated => {
            Err(Error::Unavailable(unserved.to_string()))
        }
        Err(unserved) => Err(Error::NotCalibrated {
            concept: Probe::from(&unserved.concept).to_string(),
            model: model.name.clone(),
            run: run.to_string(),
            flags: run.flags(),
        }),
    }
}

/// Versions of each energy's served concepts, with the time the node registered.
fn served(nodes: &[LiveNode]) -> BTreeMap<Probe, Vec<(&v1::ConceptRef, i64)>> {
    let mut served: BTreeMap<Probe, Vec<(&v1::ConceptRef, i64)>> = BTreeMap::new();
    for node in nodes {
        for concept in node.info.concepts.iter().filter_map(|info| info.concept.as_ref()) {
            served.entry(concept.into()).or_default().push((concept, node.since_unix_ms));
        }
    }
    served
}

/// The version to pin: one with the calibration if there is, then the one that came last.
fn newest(
    versions: &[(&v1::ConceptRef, i64)],
    need: Calibration<'_>,
    nodes: &[LiveNode],
) -> v1::ConceptRef {
    let calibrated = |concept: &v1::ConceptRef| match need {
        Calibration::Unneeded => true,
        Calibration::Required(run) | Calibration::Preferred(run) => {
            nodes.iter().any(|node| node.serves(concept) && node.is_calibrated(concept, run))
        }
    };
    let best = versions
        .iter()
        .max_by_key(|(concept, since)| (calibrated(concept), *since, concept.version.as_str()));
    best.map(|(concept, _)| (*concept).clone()).expect("a served concept has a version")
}

/// The error for an energy whose last node for a concept is gone. `is_free` if nobody serves the concept
/// otherwise and nobody asks for it by name: then it can be retired.
fn gone(Probe { concept, energy }: &Probe, is_free: bool) -> Error {
    let retire = match is_free {
        true => format!(
            ", or if it is not wanted any more, have an admin run `fairlead concepts --retire {concept}`"
        ),
        false => String::new(),
    };
    Error::Unavailable(format!(
        "no live energy node serves concept `{concept}` with `{energy}` any longer; start one with \
         `fairlead energy` or give it to one with `fairlead concepts --add`{retire}"
    ))
}

/// The error for a concept that no energy of the policy was ever known for.
fn unserved(name: &str, policy: &Policy, tenant: &Tenant, cluster: &Cluster<'_>) -> Error {
    let served = served(cluster.nodes);
    let mandatory = policy.concepts.contains(name) || tenant.concepts.contains(name);
    if mandatory || served.keys().any(|probe| probe.concept == name) {
        let whose = match policy.energies.is_empty() {
            true => String::new(),
            false => format!(" with an energy of policy `{}`", policy.name),
        };
        return Error::Unavailable(format!(
            "no live energy node serves concept `{name}`{whose}; start one with `fairlead energy` or \
             give it to one with `fairlead concepts --add`"
        ));
    }
    let hint = suggest::hint(name, served.keys().map(|probe| probe.concept.as_str()));
    Error::invalid("extra_concepts", format!("concept `{name}` is unknown{hint}"))
}

fn build(
    spec: v1::JobSpec,
    policy: v1::PinnedPolicy,
    model: &v1::ModelInfo,
    identity: Identity,
) -> JobRecord {
    let Identity { job, now, .. } = identity;
    let image = |index: u32| v1::ImageInfo {
        index,
        seed: spec.seed().wrapping_add(u64::from(index)),
        status: ImageStatus::Pending.into(),
        record_id: job.derive::<RecordId>(&format!("image/{index}")).to_string(),
        ..Default::default()
    };
    let most = match spec.max_shard_size {
        0 => model.max_batch,
        asked => asked.min(model.max_batch),
    };
    let shard = |images: std::ops::Range<u32>| Shard {
        id: job.derive::<ShardId>(&format!("shard/{}", images.start)).to_string(),
        first: images.start,
        count: images.end - images.start,
        ..Default::default()
    };
    JobRecord {
        shards: placement::split(spec.n, most).into_iter().map(shard).collect(),
        job: v1::Job {
            job_id: job.to_string(),
            images: (0..spec.n).map(image).collect(),
            spec: Some(spec),
            policy: Some(policy),
            created_unix_ms: now,
            updated_unix_ms: now,
            ..Default::default()
        },
        model: v1::ModelInfo { workers: 0, ..model.clone() },
        last_sequence: 0,
        traceparent: String::new(),
        tenant: String::new(),
    }
}

#[cfg(test)]
mod tests;
