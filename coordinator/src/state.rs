//! A job as the store keeps it: the client's view, the pinned model and its shards.

use fairlead_common::{
    envelope,
    ids::{JobId, ShardId},
};
use fairlead_proto::v1::{self, ImageStatus, JobState as State};

use crate::{
    lease::{Lease, LeaseKey, Phase},
    routing::Run,
};

/// Everything about one job, written as one value: a transition reads it, changes it and writes
/// it back in one store transaction.
#[derive(Clone, PartialEq, prost::Message)]
pub(crate) struct JobRecord {
    /// What clients see.
    #[prost(message, required, tag = "1")]
    pub(crate) job: v1::Job,
    /// The generator pinned at admission.
    #[prost(message, required, tag = "2")]
    pub(crate) model: v1::ModelInfo,
    /// The shards, in order of their images.
    #[prost(message, repeated, tag = "3")]
    pub(crate) shards: Vec<Shard>,
    /// Sequence number of the newest durable event; the first is 1.
    #[prost(uint64, tag = "4")]
    pub(crate) last_sequence: u64,
    /// W3C traceparent of its admission; empty if nothing traces it. Kept, so that a job which
    /// outlives a process stays one trace.
    #[prost(string, tag = "5")]
    pub(crate) traceparent: String,
    /// Whose it is; empty where the cluster has one tenant.
    #[prost(string, tag = "6")]
    pub(crate) tenant: String,
    /// How many of its tenant's images may be withheld in a minute; 0 for any number.
    #[prost(uint32, tag = "7")]
    pub(crate) withheld_per_minute: u32,
}

/// Consecutive images of a job that one worker makes at once.
#[derive(Clone, PartialEq, prost::Message)]
pub(crate) struct Shard {
    /// The shard's id.
    #[prost(string, tag = "1")]
    pub(crate) id: String,
    /// Index of its first image.
    #[prost(uint32, tag = "2")]
    pub(crate) first: u32,
    /// Number of images.
    #[prost(uint32, tag = "3")]
    pub(crate) count: u32,
    /// Place in the queue, given by the store; a shard that is delivered again keeps it.
    #[prost(uint64, tag = "4")]
    pub(crate) position: u64,
    /// Who may finish it.
    #[prost(message, required, tag = "5")]
    pub(crate) lease: Lease,
}

impl Shard {
    /// Indexes of its images.
    pub(crate) fn images(&self) -> std::ops::Range<u32> {
        self.first..self.first + self.count
    }

    /// The images, for people: "image 3" or "images 4-7".
    pub(crate) fn label(&self) -> String {
        match self.count {
            1 => format!("image {}", self.first),
            _ => format!("images {}-{}", self.first, self.images().end - 1),
        }
    }

    /// The lease key of the newest delivery; `None` if the stored id is malformed.
    pub(crate) fn key(&self) -> Option<LeaseKey> {
        Some(LeaseKey { shard: self.id.parse().ok()?, token: self.lease.token() })
    }
}

impl JobRecord {
    /// The job's id; `None` if the stored text is malformed.
    pub(crate) fn id(&self) -> Option<JobId> {
        self.job.job_id.parse().ok()
    }

    /// Whether the job has ended.
    pub(crate) fn is_terminal(&self) -> bool {
        matches!(self.job.state(), State::Completed | State::Failed | State::Cancelled)
    }

    /// The spec with every default filled in.
    pub(crate) fn spec(&self) -> v1::JobSpec {
        self.job.spec.clone().unwrap_or_default()
    }

    /// The policy pinned at admission.
    pub(crate) fn policy(&self) -> v1::PinnedPolicy {
        self.job.policy.clone().unwrap_or_default()
    }

    /// What a calibration must be for to serve this job.
    pub(crate) fn run(&self) -> Run {
        let policy = self.policy();
        let key = calibration_key(&self.model, &self.spec(), !policy.outside_envelope.is_empty());
        Run::new(key, &policy.steering.unwrap_or_default())
    }

    /// The shard `id`.
    pub(crate) fn shard(&self, id: ShardId) -> Option<&Shard> {
        let id = id.to_string();
        self.shards.iter().find(|shard| shard.id == id)
    }

    pub(crate) fn shard_mut(&mut self, id: ShardId) -> Option<&mut Shard> {
        let id = id.to_string();
        self.shards.iter_mut().find(|shard| shard.id == id)
    }

    /// A shard that was delivered or put off before comes first: its job has waited longest.
    fn class(&self, shard: &Shard) -> Class {
        let is_new = shard.lease.token() == 0 && shard.lease.not_before_unix_ms() == 0;
        match self.job.spec.as_ref().map(v1::JobSpec::priority) {
            _ if !is_new => Class::Again,
            Some(v1::Priority::High) => Class::High,
            Some(v1::Priority::Low) => Class::Low,
            Some(v1::Priority::Normal | v1::Priority::Unspecified) | None => Class::Normal,
        }
    }

    /// What a shard costs a device, in steps of one image of 256 by 256 pixels.
    fn work(&self, shard: &Shard) -> u64 {
        let Some(spec) = &self.job.spec else { return 1 };
        let pixels = u64::from(spec.width()) * u64::from(spec.height());
        let steps = u64::from(shard.count) * u64::from(spec.steps());
        steps.saturating_mul(pixels).div_ceil(256 * 256).max(1)
    }

    /// Shards that have not ended, as the scheduler sees them.
    pub(crate) fn active(&self) -> impl Iterator<Item = ActiveShard> + '_ {
        self.shards.iter().filter(|shard| !shard.lease.is_terminal()).map(|shard| ActiveShard {
            job_id: self.job.job_id.clone(),
            shard_id: shard.id.clone(),
            position: shard.position,
            queue: QueueName::of(&self.model),
            lane: Lane { class: self.class(shard).into(), tenant: self.tenant.clone() },
            work: self.work(shard),
            leased: shard.lease.phase() == Phase::Leased,
            token: shard.lease.token(),
            holder: shard.lease.holder().to_owned(),
            expires_unix_ms: shard.lease.expires_unix_ms(),
            not_before_unix_ms: shard.lease.not_before_unix_ms(),
        })
    }
}

/// A queued or leased shard: an index entry derived from its job, so that scheduling reads no
/// whole jobs.
#[derive(Clone, PartialEq, prost::Message)]
pub(crate) struct ActiveShard {
    /// The job.
    #[prost(string, tag = "1")]
    pub(crate) job_id: String,
    /// The shard.
    #[prost(string, tag = "2")]
    pub(crate) shard_id: String,
    /// Place in the queue.
    #[prost(uint64, tag = "3")]
    pub(crate) position: u64,
    /// The pinned generator.
    #[prost(message, required, tag = "4")]
    pub(crate) queue: QueueName,
    /// Its place among the queued shards of that generator.
    #[prost(message, required, tag = "5")]
    pub(crate) lane: Lane,
    /// Held by a worker; queued otherwise.
    #[prost(bool, tag = "6")]
    pub(crate) leased: bool,
    /// Newest token.
    #[prost(uint64, tag = "7")]
    pub(crate) token: u64,
    /// The worker that holds it; empty if queued.
    #[prost(string, tag = "8")]
    pub(crate) holder: String,
    /// End of the lease; 0 if queued.
    #[prost(int64, tag = "9")]
    pub(crate) expires_unix_ms: i64,
    /// Not handed out before this time.
    #[prost(int64, tag = "10")]
    pub(crate) not_before_unix_ms: i64,
    /// What it costs a device, in steps of one image of 256 by 256 pixels.
    #[prost(uint64, tag = "11")]
    pub(crate) work: u64,
}

/// A generator as queues are named: shards of one go to any worker that has it.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, prost::Message)]
pub(crate) struct QueueName {
    /// Its name.
    #[prost(string, tag = "1")]
    pub(crate) model: String,
    /// Its hash.
    #[prost(string, tag = "2")]
    pub(crate) hash: String,
}

impl QueueName {
    /// The queue of a generator.
    pub(crate) fn of(model: &v1::ModelInfo) -> Self {
        Self { model: model.name.clone(), hash: model.hash.clone() }
    }

    /// Whether it is the queue of this generator.
    pub(crate) fn is_of(&self, model: &v1::ModelInfo) -> bool {
        (&self.model, &self.hash) == (&model.name, &model.hash)
    }
}

/// Shards of one queue among which the order of arrival decides.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, prost::Message)]
pub(crate) struct Lane {
    /// The lowest class that waits is served first.
    #[prost(enumeration = "Class", tag = "1")]
    pub(crate) class: i32,
    /// Tenants of a class take turns.
    #[prost(string, tag = "2")]
    pub(crate) tenant: String,
}

/// Which shards of a generator are handed out first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, prost::Enumeration)]
#[repr(i32)]
pub(crate) enum Class {
    /// Delivered or put off before.
    Again = 0,
    /// Of a job with high priority.
    High = 1,
    /// Of any other job.
    Normal = 2,
    /// Of a job with low priority.
    Low = 3,
}

impl ActiveShard {
    /// Job and lease key; `None` if a stored id is malformed.
    pub(crate) fn ids(&self) -> Option<(JobId, LeaseKey)> {
        let key = LeaseKey { shard: self.shard_id.parse().ok()?, token: self.token };
        Some((self.job_id.parse().ok()?, key))
    }
}

/// What a job of `spec`, every default filled in, needs a calibration of.
pub(crate) fn calibration_key(
    model: &v1::ModelInfo,
    spec: &v1::JobSpec,
    may_leave_envelope: bool,
) -> v1::CalibrationKey {
    v1::CalibrationKey {
        generator: model.hash.clone(),
        sampler: model.sampler.clone(),
        steps: spec.steps(),
        conditions: Some(envelope::conditions(spec, may_leave_envelope)),
    }
}

/// Whether an image in `status` has ended.
pub(crate) fn image_ended(status: ImageStatus) -> bool {
    !matches!(status, ImageStatus::Unspecified | ImageStatus::Pending)
}
