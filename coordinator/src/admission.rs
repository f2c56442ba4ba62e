//! Admission: a request becomes a job with every default filled in and every concept pinned, or
//! is refused with what, where and what to do. Pure.

use std::collections::{BTreeMap, BTreeSet};

use fairlead_common::{
    ids::{JobId, RecordId, ShardId},
    limits::{self, FieldError, Shape},
    probe::Probe,
    steering,
};
use fairlead_proto::v1::{self, ImageStatus};

use crate::{
    error::{Error, Result},
    levels, placement,
    policy::{Outside, Policies, Policy},
    routing::{Calibration, LiveNode, Panel, Run},
    state::{JobRecord, Shard, calibration_key},
    store::Seen,
    suggest,
    tenants::Tenant,
};

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
    let Shape { width, height, steps, guidance } = Shape::of(spec, model)?;
    let policy = find_policy(&spec.policy, policies, tenant)?;
    let priority = priority(spec.priority(), tenant)?;
    let filled = v1::JobSpec {
        model: model.name.clone(),
        width: Some(width),
        height: Some(height),
        steps: Some(steps),
        guidance_scale: Some(guidance),
        seed: Some(spec.seed.unwrap_or(identity.drawn_seed)),
        policy: policy.name.clone(),
        priority: priority.into(),
        ..spec.clone()
    };
    let pinned = Pinning { spec: &filled, policy, tenant, cluster, model }.policy()?;
    let filled = v1::JobSpec { steering: pinned.steering, ..filled };
    let mut record = JobRecord {
        tenant: tenant.name.clone(),
        withheld_per_minute: tenant.quota.withheld_per_minute.unwrap_or_default(),
        ..build(filled, pinned, model, identity)
    };
    record.job.notices.extend(policy.notice(&model.name));
    Ok(record)
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
    limits::check_prompts(spec)?;
    limits::check_count(spec.n)?;
    if v1::Priority::try_from(spec.priority).is_err() {
        return Err(Error::invalid("priority", format!("{} is none", spec.priority)));
    }
    if spec.extra_concepts.len() > MAX_EXTRA_CONCEPTS {
        let problem = format!("has {}; at most {MAX_EXTRA_CONCEPTS}", spec.extra_concepts.len());
        return Err(Error::invalid("extra_concepts", problem));
    }
    Ok(())
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
    let policy = policies.get(name).ok_or_else(|| {
        let hint = suggest::hint(name, policies.names());
        Error::invalid("policy", format!("`{name}` is unknown{hint}"))
    })?;
    if policy.observe_only && !tenant.admin {
        return Err(Error::Forbidden(format!(
            "policy: `{}` only observes and withholds nothing; tenant `{}` is no admin",
            policy.name, tenant.name
        )));
    }
    Ok(policy)
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

/// What a job's policy is pinned from.
#[derive(Clone, Copy)]
struct Pinning<'a> {
    /// The request, every default but the knobs' filled in.
    spec: &'a v1::JobSpec,
    policy: &'a Policy,
    tenant: &'a Tenant,
    cluster: &'a Cluster<'a>,
    model: &'a v1::ModelInfo,
}

impl<'a> Pinning<'a> {
    fn policy(self) -> Result<v1::PinnedPolicy> {
        let Self { spec, policy, cluster, model, .. } = self;
        let steering = self.knobs()?;
        let mut pinned = v1::PinnedPolicy {
            name: policy.name.clone(),
            concepts: Vec::new(),
            steering: Some(steering),
            allow_calibration_fallback: policy.allow_calibration_fallback,
            observe_only: policy.observe_only,
            weights: policy.weights(),
            outside_envelope: Vec::new(),
            levels: Vec::new(),
            checks: policy.checks,
        };
        let run = |may_leave| Run::new(calibration_key(model, spec, may_leave), &steering);
        let (inside, anywhere) = (run(false), run(true));
        let unserved = |concepts: &[v1::ConceptRef], need| {
            Panel::new(concepts, policy.checks).next(cluster.nodes, need, 0).err()
        };
        let need = calibration(&pinned, &inside);
        pinned.concepts = self.concepts(need)?;
        let Some(mut missing) = unserved(&pinned.concepts, need) else {
            pinned.levels = levels::pin(&pinned, cluster.nodes, &inside);
            return Ok(pinned);
        };
        if !missing.uncalibrated {
            return Err(Error::Unavailable(missing.to_string()));
        }
        if policy.outside == Outside::WithholdUnlessClear {
            let need = calibration(&pinned, &anywhere);
            pinned.concepts = self.concepts(need)?;
            match unserved(&pinned.concepts, need) {
                Some(still) => missing = still,
                None => {
                    pinned.outside_envelope = self.ways_outside(&pinned.concepts, &inside);
                    pinned.levels = levels::pin(&pinned, cluster.nodes, &anywhere);
                    return Ok(pinned);
                }
            }
        }
        Err(self.uncalibrated(&missing.concept, &inside))
    }

    /// The policy's knobs, and what the client asks for where it may.
    fn knobs(self) -> Result<v1::SteeringParams> {
        let Self { spec, policy, model, .. } = self;
        let own = policy.steering_for(&model.name, &model.sampler);
        let asked = spec.steering.unwrap_or_default();
        let knobs = steering::overridden(own, &asked, policy.leave());
        knobs.map_err(|FieldError { field, problem }| {
            Error::invalid("steering", format!("{field} {problem} (policy `{}`)", policy.name))
        })
    }

    /// All concepts of the job, each at the version to pin.
    fn concepts(self, need: Calibration<'_>) -> Result<Vec<v1::ConceptRef>> {
        let Self { spec, policy, tenant, cluster, .. } = self;
        let served = served(cluster.nodes);
        if let Some(energy) =
            policy.energies.iter().find(|e| served.keys().all(|p| p.energy != **e))
        {
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
        let mut pinned = Vec::new();
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
                pinned.push(newest(versions, need, cluster.nodes));
            }
        }
        if pinned.is_empty() && !policy.may_be_unchecked() {
            return Err(Error::Unavailable(format!(
                "policy `{}` needs a concept to check, but no energy node is registered; start one \
                 with `fairlead energy`",
                policy.name
            )));
        }
        Ok(pinned)
    }

    /// The calibration of `concept` that lacks least for `run`, and what it lacks.
    fn nearest(
        self,
        concept: &v1::ConceptRef,
        run: &Run,
    ) -> Option<(Vec<String>, &'a v1::CalibrationInfo)> {
        let outside = self.cluster.nodes.iter().filter_map(|node| node.outside(concept, run));
        outside.min_by_key(|(ways, _)| ways.len())
    }

    fn ways_outside(self, concepts: &[v1::ConceptRef], run: &Run) -> Vec<String> {
        let ways = concepts.iter().filter_map(|concept| Some(self.nearest(concept, run)?.0));
        ways.flatten().collect::<BTreeSet<_>>().into_iter().collect()
    }

    /// The error for a concept without a calibration for `run`.
    fn uncalibrated(self, concept: &v1::ConceptRef, run: &Run) -> Error {
        let model = self.model.name.clone();
        let name = Probe::from(concept).to_string();
        match self.nearest(concept, run) {
            Some((ways, info)) => Error::OutsideEnvelope {
                concept: name,
                model,
                ways: ways.join("; "),
                flags: run.extending(info),
            },
            None => Error::NotCalibrated {
                concept: name,
                model,
                run: run.to_string(),
                flags: run.flags(),
            },
        }
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
        withheld_per_minute: 0,
    }
}

#[cfg(test)]
mod tests;
