//! A job as the store keeps it: the client's view, the pinned model and its shards.

use fairlead_common::ids::{JobId, ShardId};
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

    /// Whether the job ended before `before`, Unix milliseconds.
    pub(crate) fn ended_before(&self, before: i64) -> bool {
        self.is_terminal() && self.job.updated_unix_ms < before
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
        let key = v1::CalibrationKey {
            generator: self.model.hash.clone(),
            sampler: self.model.sampler.clone(),
            steps: self.job.spec.as_ref().map(|spec| spec.steps()).unwrap_or_default(),
        };
        Run::new(key, &self.policy().steering.unwrap_or_default())
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

    /// Shards that have not ended, as the scheduler sees them.
    pub(crate) fn active(&self) -> impl Iterator<Item = ActiveShard> + '_ {
        self.shards.iter().filter(|shard| !shard.lease.is_terminal()).map(|shard| ActiveShard {
            job_id: self.job.job_id.clone(),
            shard_id: shard.id.clone(),
            position: shard.position,
            model: self.model.name.clone(),
            model_hash: self.model.hash.clone(),
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
    /// Name of the pinned generator.
    #[prost(string, tag = "4")]
    pub(crate) model: String,
    /// Hash of the pinned generator.
    #[prost(string, tag = "5")]
    pub(crate) model_hash: String,
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
}

impl ActiveShard {
    /// Job and lease key; `None` if a stored id is malformed.
    pub(crate) fn ids(&self) -> Option<(JobId, LeaseKey)> {
        let key = LeaseKey { shard: self.shard_id.parse().ok()?, token: self.token };
        Some((self.job_id.parse().ok()?, key))
    }
}

/// Whether an image in `status` has ended.
pub(crate) fn image_ended(status: ImageStatus) -> bool {
    !matches!(status, ImageStatus::Unspecified | ImageStatus::Pending)
}
