//! Durable state of jobs. Every state transition is one call that checks the fencing token inside
//! the backend's own transaction, by running [`crate::transition`].

mod memory;
mod redb;

use async_trait::async_trait;
use fairlead_common::ids::JobId;
use fairlead_proto::v1::WatchJobResponse;

pub(crate) use self::{memory::MemoryStore, redb::RedbStore};
use crate::{
    state::{ActiveShard, JobRecord},
    transition::{Effect, Refusal, Transition},
};

/// A store that failed, or a transition that it refused.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// The job's state does not allow the transition; nothing changed.
    #[error(transparent)]
    Refused(#[from] Refusal),
    /// There is no such job.
    #[error("job {0} is not in the store")]
    UnknownJob(JobId),
    /// Something stored cannot be read.
    #[error("store: {0} cannot be decoded; the database is damaged or of another version")]
    Corrupt(String),
    /// The backend failed.
    #[error("store: {what}: {problem}")]
    Backend {
        /// The operation.
        what: &'static str,
        /// The backend's words.
        problem: String,
    },
}

/// A job to store.
#[derive(Debug, Clone)]
pub(crate) struct NewJob {
    /// The record, its shards' positions still unset.
    pub(crate) record: JobRecord,
    /// Idempotency key and hash of the request's body.
    pub(crate) key: Option<(String, Vec<u8>)>,
    /// Most queued shards the store may hold with this job.
    pub(crate) max_queued: usize,
}

/// What [`Store::create`] did.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Created {
    /// The job was stored.
    New(Box<JobRecord>),
    /// The idempotency key belongs to this earlier job.
    Existing(Found),
    /// The queue is full; nothing was stored.
    QueueFull,
}

/// How a job is found by something other than its id.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Lookup<'a> {
    /// By idempotency key.
    Key(&'a str),
    /// By shard id.
    Shard(&'a str),
    /// By record id.
    Record(&'a str),
}

impl Lookup<'_> {
    pub(crate) fn index_key(self) -> String {
        match self {
            Self::Key(key) => format!("key/{key}"),
            Self::Shard(id) => format!("shard/{id}"),
            Self::Record(id) => format!("record/{id}"),
        }
    }
}

/// Where a lookup led.
#[derive(Clone, PartialEq, prost::Message)]
pub(crate) struct Found {
    /// The job.
    #[prost(string, tag = "1")]
    pub(crate) job_id: String,
    /// Of a record: the image's index.
    #[prost(uint32, tag = "2")]
    pub(crate) index: u32,
    /// Of an idempotency key: the hash of the request's body.
    #[prost(bytes = "vec", tag = "3")]
    pub(crate) body_hash: Vec<u8>,
}

/// A transition that took place.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Applied {
    /// The job after it.
    pub(crate) record: JobRecord,
    /// What it did.
    pub(crate) effect: Effect,
    /// Whether the job has new durable events.
    pub(crate) has_events: bool,
}

/// The durable state. Calls are atomic; what a call other than a renewal changed survives a crash.
#[async_trait]
pub(crate) trait Store: Send + Sync + std::fmt::Debug + 'static {
    /// Stores a job and its first event, unless its idempotency key is taken or the queue is full.
    async fn create(&self, new: NewJob, now: i64) -> Result<Created, StoreError>;

    /// One job.
    async fn get(&self, job: JobId) -> Result<Option<JobRecord>, StoreError>;

    /// Jobs older than `before` (all if absent), newest first.
    async fn list(&self, before: Option<JobId>, limit: usize)
    -> Result<Vec<JobRecord>, StoreError>;

    /// Applies one transition, or refuses it and changes nothing.
    async fn apply(
        &self,
        job: JobId,
        transition: Transition,
        now: i64,
    ) -> Result<Applied, StoreError>;

    /// Every queued or leased shard, in queue order.
    async fn active(&self) -> Result<Vec<ActiveShard>, StoreError>;

    /// Durable events of a job after a sequence number, oldest first.
    async fn events(
        &self,
        job: JobId,
        after: u64,
        limit: usize,
    ) -> Result<Vec<WatchJobResponse>, StoreError>;

    /// The job behind a key, shard or record.
    async fn find(&self, lookup: Lookup<'_>) -> Result<Option<Found>, StoreError>;

    /// Removes at most `limit` of the oldest jobs that ended before `before` (Unix milliseconds),
    /// with their events, and returns them.
    async fn forget(&self, before: i64, limit: usize) -> Result<Vec<JobRecord>, StoreError>;
}

/// Index entries that lead to `record`.
pub(crate) fn lookups(record: &JobRecord, key: Option<&(String, Vec<u8>)>) -> Vec<(String, Found)> {
    let found = |index, body_hash| Found { job_id: record.job.job_id.clone(), index, body_hash };
    let shards = record
        .shards
        .iter()
        .map(|shard| (Lookup::Shard(&shard.id).index_key(), found(shard.first, Vec::new())));
    let images = record
        .job
        .images
        .iter()
        .map(|i| (Lookup::Record(&i.record_id).index_key(), found(i.index, Vec::new())));
    let key = key.map(|(key, body)| (Lookup::Key(key).index_key(), found(0, body.clone())));
    shards.chain(images).chain(key).collect()
}

/// Gives the shards of a new job their places in the queue and its first event.
pub(crate) fn enqueue(
    record: &mut JobRecord,
    next_position: &mut u64,
    now: i64,
) -> Vec<WatchJobResponse> {
    for shard in &mut record.shards {
        shard.position = *next_position;
        *next_position += 1;
    }
    crate::transition::created(record, now)
}

#[cfg(test)]
mod contract;
