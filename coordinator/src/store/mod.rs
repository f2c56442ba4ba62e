//! Durable state of jobs. Every state transition is one call that checks the fencing token inside
//! the backend's own transaction, by running [`crate::transition`].

mod members;
mod memory;
mod queues;
mod rates;
mod redb;
mod redis;

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
    time::Duration,
};

use async_trait::async_trait;
use fairlead_common::{
    ids::{JobId, ShardId},
    probe::Probe,
};
use fairlead_proto::v1::{self, WatchJobResponse};

pub(crate) use self::{
    memory::MemoryStore,
    redb::RedbStore,
    redis::{RedisStore, without_password},
};
use tokio::sync::mpsc;

use crate::{
    clock::{Clock, millis, unix_ms},
    metrics,
    state::{ActiveShard, JobRecord, QueueName},
    tenants::Quota,
    transition::{Effect, Refusal, Transition},
};

/// A store that failed, or a transition that it refused.
#[derive(Debug, Clone, thiserror::Error)]
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
    /// The backend does not answer; it may later.
    #[error("store: {what}: {problem}")]
    Away {
        /// The operation.
        what: &'static str,
        /// The backend's words.
        problem: String,
    },
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
    /// The same of its tenant's alone, and how many images that may ask for.
    pub(crate) quota: Quota,
}

/// What [`Store::create`] did.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Created {
    /// The job was stored.
    New(Box<JobRecord>),
    /// The idempotency key belongs to this earlier job.
    Existing(Found),
    /// A bound is reached; nothing was stored.
    Full(Full),
}

/// Which bound keeps a job out.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Full {
    /// The shards of all tenants that wait.
    Queue,
    /// Those of its tenant.
    Tenant,
    /// Its tenant's images a minute; there is room again in so many milliseconds.
    Rate {
        /// Milliseconds, above 0.
        wait_ms: u64,
    },
    /// Its tenant's images that may be withheld in a minute; it may ask again in so many milliseconds.
    Withheld {
        /// Milliseconds, above 0.
        wait_ms: u64,
    },
}

/// Images of a tenant that were withheld.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Charge {
    /// Whose.
    pub(crate) tenant: String,
    /// How many, at least 1.
    pub(crate) images: usize,
    /// How many there may be in a minute.
    pub(crate) per_minute: u32,
}

/// How a job is found by something other than its id.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Lookup<'a> {
    /// By a tenant's idempotency key.
    Key(&'a str, &'a str),
    /// By shard id.
    Shard(&'a str),
    /// By record id.
    Record(&'a str),
}

impl Lookup<'_> {
    pub(crate) fn index_key(self) -> String {
        match self {
            Self::Key(tenant, key) => format!("key/{tenant}/{key}"),
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

/// How long a shard that was taken is kept from other processes. One that dies in between delays the
/// shard by this.
pub(crate) const CLAIM: Duration = Duration::from_secs(10);

/// The shards that have not ended, counted.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Backlog {
    /// Shards that wait, of each generator that has any.
    pub(crate) queued: BTreeMap<QueueName, usize>,
    /// Shards that workers hold.
    pub(crate) running: usize,
    /// When the next shard is due that is not yet; Unix milliseconds.
    pub(crate) next_due_unix_ms: Option<i64>,
}

/// Something that a process changed which all processes of the store hear of.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Change {
    /// A job has new events.
    Job(JobId),
    /// A shard was queued.
    Queue,
    /// A lease of this shard has ended.
    Lease(ShardId),
    /// Somebody came or went.
    Members,
    /// A step of a job that this process listens to. Not kept.
    Progress(JobId, Box<v1::StepProgress>),
    /// Anything: news may have been missed.
    Everything,
}

/// The durable state. Calls are atomic, but for those that look through all jobs; what a call other than a
/// renewal changed survives a crash.
#[async_trait]
pub(crate) trait Store: Send + Sync + std::fmt::Debug + 'static {
    /// Stores a job and its first event, unless its idempotency key is taken or a bound is reached.
    async fn create(&self, new: NewJob, now: i64) -> Result<Created, StoreError>;

    /// One job.
    async fn get(&self, job: JobId) -> Result<Option<JobRecord>, StoreError>;

    /// Jobs of a tenant, or of all, older than `before`, or all; newest first.
    async fn list(
        &self,
        tenant: Option<&str>,
        before: Option<JobId>,
        limit: usize,
    ) -> Result<Vec<JobRecord>, StoreError>;

    /// Applies one transition, or refuses it and changes nothing.
    async fn apply(
        &self,
        job: JobId,
        transition: Transition,
        now: i64,
    ) -> Result<Applied, StoreError>;

    /// Counts withheld images against their tenant's bound; whether that reached the bound just now.
    async fn charge(&self, charge: Charge, now: i64) -> Result<bool, StoreError>;

    /// Up to `limit` queued shards of one generator that are due, in the order in which they are to be
    /// handed out: by class, then by the turns of tenants, then by age. They stay queued until a
    /// transition says otherwise; processes that share the store are not given the same ones for
    /// [`CLAIM`].
    async fn take(
        &self,
        queue: &QueueName,
        limit: usize,
        now: i64,
    ) -> Result<Vec<ActiveShard>, StoreError>;

    /// Up to `limit` shards whose lease has ended, the oldest first.
    async fn expired(&self, now: i64, limit: usize) -> Result<Vec<ActiveShard>, StoreError>;

    /// What waits and what runs.
    async fn backlog(&self, now: i64) -> Result<Backlog, StoreError>;

    /// Durable events of a job after a sequence number, oldest first.
    async fn events(
        &self,
        job: JobId,
        after: u64,
        limit: usize,
    ) -> Result<Vec<WatchJobResponse>, StoreError>;

    /// The job behind a key, shard or record.
    async fn find(&self, lookup: Lookup<'_>) -> Result<Option<Found>, StoreError>;

    /// What any process changes of the store, as it does; `None` where there is but one.
    fn changes(&self) -> Option<mpsc::Receiver<Change>> {
        None
    }

    /// Tells the other processes of one step, if they can be told at once.
    fn tell(&self, _job: JobId, _step: &v1::StepProgress) {}

    /// Begins or ends hearing what others tell of `job`: [`Change::Progress`].
    fn listen(&self, _job: JobId, _on: bool) {}

    /// The time that all processes of the store agree on, Unix milliseconds. Asked once: a late answer is
    /// worth nothing.
    async fn clock(&self) -> Result<i64, StoreError> {
        Ok(unix_ms())
    }

    /// Whether it can do its work now. One that cannot is tried anew.
    async fn check(&self) -> Result<(), StoreError> {
        self.clock().await.map(drop)
    }

    /// Whether other processes use it at the same time.
    fn is_shared(&self) -> bool {
        false
    }

    /// Puts shards back into the queues that their jobs' records say they are in, where somebody has
    /// lost them; says how many.
    async fn mend(&self, _clock: &Clock) -> Result<usize, StoreError> {
        Ok(0)
    }

    /// Adds a member until `now + ttl_ms`, or replaces the one of its kind and name.
    async fn join(&self, member: Member, now: i64, ttl_ms: i64) -> Result<(), StoreError>;

    /// Extends memberships to `now + ttl_ms` and returns those that have ended.
    async fn keep(
        &self,
        members: &[MemberKey],
        now: i64,
        ttl_ms: i64,
    ) -> Result<Vec<MemberKey>, StoreError>;

    /// Ends a membership; `false` if it had ended before.
    async fn leave(&self, member: &MemberKey) -> Result<bool, StoreError>;

    /// Forgets that a concept was ever served, and returns the energies that it was known from.
    async fn retire(&self, concept: &str) -> Result<BTreeSet<String>, StoreError>;

    /// Remembers again what members had and the store has lost.
    async fn recall(&self, _seen: &Seen) -> Result<(), StoreError> {
        Ok(())
    }

    /// Everyone whose membership has not ended, unless that is the version `known`.
    async fn roster(&self, known: Option<u64>, now: i64) -> Result<Option<Roster>, StoreError>;

    /// How long the store has been in use, milliseconds: what retention counts by. `since` adds the time
    /// that has passed since it was that old, unless another process has. So whatever clocks say, it never
    /// grows faster than time passes.
    async fn age(&self, since: Option<(u64, Duration)>) -> Result<u64, StoreError>;

    /// At most `limit` jobs that ended when the store was younger than `before`; the oldest first.
    async fn ended(&self, before: u64, limit: usize) -> Result<Vec<JobRecord>, StoreError>;

    /// Removes jobs that have ended, with their events.
    async fn forget(&self, old: Vec<JobRecord>) -> Result<(), StoreError>;
}

/// What a member of the cluster does.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, prost::Enumeration)]
#[repr(i32)]
pub(crate) enum MemberKind {
    /// Answers for concepts.
    EnergyNode = 0,
    /// Makes images.
    Worker = 1,
}

/// An energy node or a worker. It is one until it leaves or stops renewing.
#[derive(Clone, PartialEq, prost::Message)]
pub(crate) struct Member {
    /// What it does.
    #[prost(enumeration = "MemberKind", tag = "1")]
    pub(crate) kind: i32,
    /// Its name, its kind's only one.
    #[prost(string, tag = "2")]
    pub(crate) id: String,
    /// Tells this membership from an earlier one of the same name.
    #[prost(string, tag = "3")]
    pub(crate) registration: String,
    /// When it joined, Unix milliseconds.
    #[prost(int64, tag = "4")]
    pub(crate) since_unix_ms: i64,
    /// Of an energy node.
    #[prost(message, optional, tag = "5")]
    pub(crate) node: Option<v1::NodeInfo>,
    /// Of a worker: its generators.
    #[prost(message, repeated, tag = "6")]
    pub(crate) models: Vec<v1::ModelInfo>,
    /// Of a worker: takes no further shards.
    #[prost(bool, tag = "7")]
    pub(crate) draining: bool,
}

/// Names one membership.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct MemberKey {
    /// What it does.
    pub(crate) kind: MemberKind,
    /// Its name.
    pub(crate) id: String,
    /// Which membership of that name.
    pub(crate) registration: String,
}

impl Member {
    /// The membership's name.
    pub(crate) fn key(&self) -> MemberKey {
        let (id, registration) = (self.id.clone(), self.registration.clone());
        MemberKey { kind: self.kind(), id, registration }
    }
}

/// Everyone in the cluster at one moment.
#[derive(Debug, Clone, Default, PartialEq)]
pub(crate) struct Roster {
    /// Changes with every change of it.
    pub(crate) version: u64,
    /// Energy nodes and workers.
    pub(crate) members: Vec<Arc<Member>>,
    /// What any member ever had.
    pub(crate) seen: Seen,
    /// What was in `seen` until an operator took it out.
    pub(crate) retired: Seen,
}

/// What any member of the cluster ever had: tells what is gone from what was never heard of.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Seen {
    /// Questions that energy nodes answered.
    pub(crate) probes: BTreeSet<Probe>,
    /// Names of generators.
    pub(crate) models: BTreeSet<String>,
}

impl Seen {
    pub(crate) fn add(&mut self, member: &Member) {
        let concepts = member.node.iter().flat_map(|node| &node.concepts);
        self.probes.extend(concepts.filter_map(|info| info.concept.as_ref()).map(Probe::from));
        self.models.extend(member.models.iter().map(|model| model.name.clone()));
    }

    /// Removes a concept; returns what was removed.
    fn retire(&mut self, concept: &str) -> BTreeSet<Probe> {
        let gone: BTreeSet<Probe> =
            self.probes.iter().filter(|probe| probe.concept == concept).cloned().collect();
        self.probes.retain(|probe| probe.concept != concept);
        gone
    }

    /// What `member` has as a store keeps it, entry by entry: JSON.
    fn entries(member: &Member) -> Vec<String> {
        let mut seen = Self::default();
        seen.add(member);
        seen.all_entries()
    }

    fn all_entries(&self) -> Vec<String> {
        let models = self.models.iter().map(|model| serde_json::to_string(&[model]));
        let models = models.map(|json| json.expect("text is JSON"));
        self.probes.iter().map(Self::entry).chain(models).collect()
    }

    /// Adds what `other` has.
    pub(crate) fn extend(&mut self, other: &Self) {
        self.probes.extend(other.probes.iter().cloned());
        self.models.extend(other.models.iter().cloned());
    }

    /// What it has and `other` lacks.
    pub(crate) fn without(&self, other: &Self) -> Self {
        Self {
            probes: self.probes.difference(&other.probes).cloned().collect(),
            models: self.models.difference(&other.models).cloned().collect(),
        }
    }

    fn entry(Probe { concept, energy }: &Probe) -> String {
        serde_json::to_string(&[concept, energy]).expect("text is JSON")
    }

    /// Adds what [`Self::entries`] made.
    fn insert(&mut self, entry: &str) -> Result<(), StoreError> {
        let parts: Vec<String> = serde_json::from_str(entry)
            .map_err(|error| StoreError::Corrupt(format!("`{entry}` ({error})")))?;
        match <[String; 2]>::try_from(parts) {
            Ok([concept, energy]) => {
                self.probes.insert(Probe { concept, energy });
            }
            Err(model) => self.models.extend(model),
        }
        Ok(())
    }

    pub(crate) fn len(&self) -> usize {
        self.probes.len() + self.models.len()
    }
}

/// Reads a stored value.
fn decode<M: prost::Message + Default>(bytes: &[u8], what: &str) -> Result<M, StoreError> {
    M::decode(bytes).map_err(|error| StoreError::Corrupt(format!("{what} ({error})")))
}

/// Reports a stored job that cannot be read, where it is left out so that it does not hide the others.
fn unreadable(job: &str, error: &StoreError) {
    metrics::unreadable();
    tracing::error!(job, %error, "a job is left out; it stays in the store");
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
    let key = key
        .map(|(key, body)| (Lookup::Key(&record.tenant, key).index_key(), found(0, body.clone())));
    shards.chain(images).chain(key).collect()
}

/// The age of a store that was `age` old and learns of time that has passed; see [`Store::age`].
fn grown(age: u64, since: Option<(u64, Duration)>) -> u64 {
    match since {
        Some((known, passed)) if known == age => age.saturating_add(millis(passed).unsigned_abs()),
        _ => age,
    }
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
pub(crate) mod contract;
#[cfg(test)]
mod linear;
