//! What must be true, checked against everything that happens: a small model of jobs and leases that hears of
//! each transition as the database makes it, and of everything that clients, workers and nodes see. It
//! decides nothing and knows nothing of the coordinator's own rules.

mod seen;
mod stored;

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
    time::Duration,
};

use fairlead_common::signature::PublicKey;
use fairlead_proto::v1::{self, ImageInfo, ImageStatus, JobState, WatchJobResponse};
use object_store::memory::InMemory;

use super::world::Time;
use crate::lease::LeaseKey;

/// After this long every coordinator knows what the cluster serves.
const NEWS_TRAVEL: Duration = Duration::from_secs(20);

/// A shard that fails this often is given up.
const MOST_DELIVERIES: u32 = 5;

/// What happened, and whether it was right.
#[derive(Debug)]
pub(super) struct Model {
    time: Time,
    objects: Arc<InMemory>,
    signer: PublicKey,
    history: Vec<String>,
    problems: Vec<String>,
    jobs: BTreeMap<String, Job>,
    shards: BTreeMap<String, Shard>,
    /// Concepts that nodes serve, and since when.
    served: BTreeMap<String, Duration>,
    /// When a node, asked by a coordinator, last did not see a concept in the bytes with this hash.
    cleared: BTreeMap<(String, String), Duration>,
    /// The job of each idempotency key.
    keys: BTreeMap<String, String>,
    /// Events by job and number: all watchers see the same.
    events: BTreeMap<(String, u64), WatchJobResponse>,
    /// Commits that took place, but whose coordinator did not hear it.
    unsure: BTreeSet<LeaseKey>,
}

#[derive(Debug)]
struct Job {
    /// As it was stored last.
    last: v1::Job,
    shards: Vec<String>,
}

#[derive(Debug, Default)]
struct Shard {
    newest: u64,
    /// The token of the delivery that may commit.
    current: Option<u64>,
    /// When the newest delivery began.
    granted: Duration,
    accepted: Option<u64>,
    /// Deliveries that count.
    deliveries: u32,
}

fn is_over(job: &v1::Job) -> bool {
    matches!(job.state(), JobState::Completed | JobState::Failed | JobState::Cancelled)
}

fn has_ended(image: &ImageInfo) -> bool {
    !matches!(image.status(), ImageStatus::Unspecified | ImageStatus::Pending)
}

/// The first characters of an id: enough to tell ids of one run apart.
pub(super) fn short(id: &str) -> &str {
    &id[id.len().saturating_sub(6)..]
}

impl Model {
    pub(super) fn new(time: Time, objects: Arc<InMemory>, signer: PublicKey) -> Self {
        Self {
            time,
            objects,
            signer,
            history: Vec::new(),
            problems: Vec::new(),
            jobs: BTreeMap::new(),
            shards: BTreeMap::new(),
            served: BTreeMap::new(),
            cleared: BTreeMap::new(),
            keys: BTreeMap::new(),
            events: BTreeMap::new(),
            unsure: BTreeSet::new(),
        }
    }

    /// Something happened.
    pub(super) fn note(&mut self, what: impl AsRef<str>) {
        let now = self.time.elapsed().as_secs_f64();
        self.history.push(format!("{now:9.3}  {}", what.as_ref()));
    }

    /// Something happened that must not.
    pub(super) fn broken(&mut self, what: impl AsRef<str>) {
        self.note(format!("BROKEN: {}", what.as_ref()));
        self.problems.push(what.as_ref().to_owned());
    }

    fn check(&mut self, holds: bool, otherwise: impl FnOnce() -> String) {
        if !holds {
            self.broken(otherwise());
        }
    }

    pub(super) fn history(&self) -> &[String] {
        &self.history
    }

    pub(super) fn problems(&self) -> &[String] {
        &self.problems
    }

    /// Shards that have not ended.
    pub(super) fn open_shards(&self) -> Vec<String> {
        let open = self.jobs.values().filter(|job| !is_over(&job.last));
        open.flat_map(|job| job.shards.clone()).collect()
    }

    /// Stored jobs that have not ended.
    pub(super) fn open_jobs(&self) -> Vec<String> {
        let open = self.jobs.iter().filter(|(_, job)| !is_over(&job.last));
        open.map(|(id, job)| format!("{id} ({})", job.last.state().as_str_name())).collect()
    }

    /// How many images have ended in each way.
    pub(super) fn tally(&self) -> BTreeMap<&'static str, usize> {
        let mut tally = BTreeMap::new();
        for image in self.jobs.values().flat_map(|job| &job.last.images) {
            *tally.entry(image.status().as_str_name()).or_default() += 1;
        }
        tally
    }

    /// Nothing but coordinators went wrong, which is no job's fault.
    pub(super) fn none_may_fail(&mut self) {
        let failed = self.jobs.values().find(|job| job.last.state() == JobState::Failed);
        if let Some(Job { last, .. }) = failed {
            let problem = format!("job {} failed: {}", last.job_id, last.reason);
            self.broken(problem);
        }
    }

    /// Everything was healed `patience` ago, and something goes on.
    pub(super) fn late(&mut self, patience: Duration) {
        let open = self.open_jobs();
        self.broken(format!(
            "{patience:?} after everything was healed, clients wait; open: {open:?}"
        ));
    }
}

fn label(lease: LeaseKey) -> String {
    format!("shard {} token {}", short(&lease.shard.to_string()), lease.token)
}
