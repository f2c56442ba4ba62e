//! What can happen to a job, as one pure function over its record. Store backends run it inside
//! their transaction, so that all of them agree and a stale token never gets past any.

use fairlead_common::{bounds::MAX_NOTICES, ids::ShardId};
use fairlead_proto::v1::{self, ImageStatus, JobState as State, watch_job_response::Event};

use crate::{
    error::without_places,
    lease::{AfterFailure, Commit, Failure, LeaseError, LeaseKey, Obstacle, Phase},
    state::{JobRecord, Shard, image_ended},
};

/// One change of a job.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Transition {
    /// Hand a queued shard to a worker.
    Grant {
        /// The shard.
        shard: ShardId,
        /// The worker's id.
        worker: String,
        /// Length of the lease.
        ttl_ms: i64,
    },
    /// Extend leases.
    Renew {
        /// The leases, all of this job.
        leases: Vec<LeaseKey>,
        /// Length of the lease.
        ttl_ms: i64,
    },
    /// End a shard with the outcome of each of its images.
    Commit {
        /// The delivery that made them.
        lease: LeaseKey,
        /// RELEASED or WITHHELD, one per image of the shard.
        images: Vec<v1::ImageInfo>,
        /// Things the caller should know.
        notices: Vec<String>,
    },
    /// End a delivery without a result.
    Fail {
        /// The delivery.
        lease: LeaseKey,
        /// Why, and whether to try again.
        failure: Failure,
    },
    /// Take a shard back whose lease has ended.
    Expire {
        /// The delivery.
        lease: LeaseKey,
        /// Whose fault that is.
        by: LostBy,
    },
    /// Put off a delivery that cannot be made now.
    Postpone {
        /// The queued shard.
        shard: ShardId,
        /// Why, and for how long.
        obstacle: Obstacle,
    },
    /// Put a shard back because the coordinator stops or has lost the delivery.
    GiveBack {
        /// The delivery.
        lease: LeaseKey,
    },
    /// Cancel everything that has not ended.
    Cancel {
        /// Why, for the job's `reason`.
        reason: String,
    },
}

/// Who let a lease end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum LostBy {
    /// A worker that stopped renewing: what it worked on may be the reason, so the delivery counts.
    Worker,
    /// The coordinator that handed the shard out: it died, and so nobody took the renewals.
    Coordinator,
}

impl Transition {
    /// Whether it must be on disk before it is answered. A lost renewal costs at most a delivery.
    pub(crate) fn must_be_durable(&self) -> bool {
        !matches!(self, Self::Renew { .. })
    }
}

/// What a transition did.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Effect {
    /// The shard was handed out.
    Granted {
        /// The delivery's key.
        lease: LeaseKey,
        /// Deliveries so far, this one included.
        attempt: u32,
    },
    /// Leases were extended, but for these.
    Renewed {
        /// No longer the caller's.
        lost: Vec<LeaseKey>,
    },
    /// The result was accepted, now or earlier with the same token.
    Committed(Commit),
    /// The delivery ended.
    Ended(AfterFailure),
    /// The shard is queued again, the delivery not counted.
    GivenBack,
    /// The job is over; these deliveries must stop.
    Cancelled {
        /// Deliveries that workers hold.
        running: Vec<LeaseKey>,
    },
}

/// A transition that the job's state does not allow; nothing changed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// The job has no such shard.
    #[error("job has no shard {0}")]
    UnknownShard(ShardId),
    /// The lease does not allow it.
    #[error(transparent)]
    Lease(#[from] LeaseError),
    /// A commit that does not cover the shard.
    #[error("a commit must end each of the shard's images {expected:?} once; it names {found:?}")]
    Incomplete {
        /// Indexes of the shard's images.
        expected: Vec<u32>,
        /// Indexes that the commit ends.
        found: Vec<u32>,
    },
}

/// Effect and durable events of a transition.
pub(crate) type Applied = (Effect, Vec<v1::WatchJobResponse>);

/// Applies `transition` to `record` at `now`. On a refusal `record` may be partly changed and must
/// be thrown away.
pub(crate) fn apply(
    record: &mut JobRecord,
    transition: &Transition,
    now: i64,
) -> Result<Applied, Refusal> {
    let mut change = Change { record, now, events: Vec::new() };
    let effect = match transition {
        Transition::Grant { shard, worker, ttl_ms } => change.grant(*shard, worker, *ttl_ms)?,
        Transition::Renew { leases, ttl_ms } => change.renew(leases, *ttl_ms),
        Transition::Commit { lease, images, notices } => change.commit(*lease, images, notices)?,
        Transition::Fail { lease, failure } => {
            let after = change.shard(lease.shard)?.lease.fail(lease.token, failure, now)?;
            change.ended(lease.shard, after)?
        }
        Transition::Expire { lease, by: LostBy::Worker } => {
            let after = change.shard(lease.shard)?.lease.expire(lease.token, now)?;
            change.ended(lease.shard, after)?
        }
        Transition::Expire { lease, by: LostBy::Coordinator } => {
            change.shard(lease.shard)?.lease.recover(lease.token, now)?;
            Effect::GivenBack
        }
        Transition::Postpone { shard, obstacle } => {
            let after = change.shard(*shard)?.lease.postpone(obstacle, now)?;
            change.ended(*shard, after)?
        }
        Transition::GiveBack { lease } => {
            change.shard(lease.shard)?.lease.give_back(lease.token)?;
            Effect::GivenBack
        }
        Transition::Cancel { reason } => change.cancel(reason),
    };
    Ok((effect, change.events))
}

/// The first event of a new job.
pub(crate) fn created(record: &mut JobRecord, now: i64) -> Vec<v1::WatchJobResponse> {
    let mut change = Change { record, now, events: Vec::new() };
    change.set_state(State::Queued);
    change.events
}

struct Change<'a> {
    record: &'a mut JobRecord,
    now: i64,
    events: Vec<v1::WatchJobResponse>,
}

impl Change<'_> {
    fn shard(&mut self, id: ShardId) -> Result<&mut Shard, Refusal> {
        self.record.shard_mut(id).ok_or(Refusal::UnknownShard(id))
    }

    fn grant(&mut self, id: ShardId, worker: &str, ttl_ms: i64) -> Result<Effect, Refusal> {
        let now = self.now;
        let lease = &mut self.shard(id)?.lease;
        let token = lease.grant(worker, now, ttl_ms)?;
        let attempt = lease.deliveries();
        if self.record.job.state() == State::Queued {
            self.set_state(State::Running);
        }
        Ok(Effect::Granted { lease: LeaseKey { shard: id, token }, attempt })
    }

    fn renew(&mut self, leases: &[LeaseKey], ttl_ms: i64) -> Effect {
        let now = self.now;
        let lost = leases.iter().copied().filter(|key| {
            let shard = self.record.shard_mut(key.shard);
            shard.is_none_or(|shard| shard.lease.renew(key.token, now, ttl_ms).is_err())
        });
        Effect::Renewed { lost: lost.collect() }
    }

    fn commit(
        &mut self,
        lease: LeaseKey,
        images: &[v1::ImageInfo],
        notices: &[String],
    ) -> Result<Effect, Refusal> {
        let shard = self.shard(lease.shard)?;
        let commit = shard.lease.commit(lease.token)?;
        if commit == Commit::Again {
            return Ok(Effect::Committed(commit));
        }
        let expected: Vec<u32> = shard.images().collect();
        let verdict = |image: &&v1::ImageInfo| {
            matches!(image.status(), ImageStatus::Released | ImageStatus::Withheld)
        };
        let mut found: Vec<u32> = images.iter().filter(verdict).map(|image| image.index).collect();
        found.sort_unstable();
        if found != expected || images.len() != expected.len() {
            return Err(Refusal::Incomplete { expected, found });
        }
        for image in images {
            self.end_image(image.clone());
        }
        for notice in notices {
            let told = &self.record.job.notices;
            if told.len() < MAX_NOTICES && !told.contains(notice) {
                self.record.job.notices.push(notice.clone());
            }
        }
        self.settle();
        Ok(Effect::Committed(commit))
    }

    fn ended(&mut self, id: ShardId, after: AfterFailure) -> Result<Effect, Refusal> {
        if after == AfterFailure::GivenUp {
            let shard = self.shard(id)?.clone();
            if self.record.job.reason.is_empty() {
                self.record.job.reason = format!(
                    "{} failed after {} attempt(s): {}",
                    shard.label(),
                    shard.lease.deliveries(),
                    without_places(shard.lease.reason())
                );
            }
            self.end_images(shard.images(), ImageStatus::Failed);
            self.settle();
        }
        Ok(Effect::Ended(after))
    }

    fn cancel(&mut self, reason: &str) -> Effect {
        if self.record.is_terminal() {
            return Effect::Cancelled { running: Vec::new() };
        }
        let mut running = Vec::new();
        for shard in &mut self.record.shards {
            let held = shard.lease.cancel();
            running.extend(held.and(shard.key()));
        }
        let all = 0..u32::try_from(self.record.job.images.len()).unwrap_or(u32::MAX);
        self.end_images(all, ImageStatus::Cancelled);
        self.record.job.reason = reason.to_owned();
        self.set_state(State::Cancelled);
        Effect::Cancelled { running }
    }

    /// Ends the job once all its shards have ended.
    fn settle(&mut self) {
        let shards = &self.record.shards;
        if self.record.is_terminal() || !shards.iter().all(|shard| shard.lease.is_terminal()) {
            return;
        }
        let failed = shards.iter().any(|shard| shard.lease.phase() == Phase::Failed);
        self.set_state(if failed { State::Failed } else { State::Completed });
    }

    fn end_images(&mut self, indexes: std::ops::Range<u32>, status: ImageStatus) {
        for index in indexes {
            if let Some(image) = self.record.job.images.get(index as usize) {
                let mut image = image.clone();
                image.set_status(status);
                self.end_image(image);
            }
        }
    }

    /// Gives an image its end. An image that has ended keeps it: nothing later overwrites it.
    fn end_image(&mut self, ended: v1::ImageInfo) {
        let Some(image) = self.record.job.images.get_mut(ended.index as usize) else { return };
        if image_ended(image.status()) {
            return;
        }
        *image = ended.clone();
        self.push(Event::Image(ended));
    }

    fn set_state(&mut self, state: State) {
        self.record.job.set_state(state);
        self.record.job.updated_unix_ms = self.now;
        self.push(Event::Job(self.record.job.clone()));
    }

    fn push(&mut self, event: Event) {
        self.record.job.updated_unix_ms = self.now;
        self.record.last_sequence += 1;
        let sequence = self.record.last_sequence;
        self.events.push(v1::WatchJobResponse { sequence, event: Some(event) });
    }
}

#[cfg(test)]
mod tests;
