//! Leases: who may finish a shard. Every delivery of a shard carries a fencing token that grows;
//! only the newest token can commit. Pure: `now` is an argument, the store makes it durable.

use std::fmt;

use fairlead_common::ids::ShardId;
use fairlead_proto::v1;

use crate::clock::is_beyond;

/// Deliveries after which a shard that never finishes is given up, with its last reason.
pub(crate) const MAX_DELIVERIES: u32 = 5;

/// A shard that is put off is looked at again within this time after it is due, milliseconds.
const LOOK_MS: i64 = 60_000;

/// A shard and the fencing token of one delivery.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) struct LeaseKey {
    /// The shard.
    pub(crate) shard: ShardId,
    /// The token of this delivery; tokens of a shard only grow.
    pub(crate) token: u64,
}

impl LeaseKey {
    /// The key that `lease` names, or `None` if it is absent or its id is malformed.
    pub(crate) fn from_proto(lease: Option<&v1::LeaseRef>) -> Option<Self> {
        let lease = lease?;
        Some(Self { shard: lease.shard_id.parse().ok()?, token: lease.token })
    }

    pub(crate) fn to_proto(self) -> v1::LeaseRef {
        v1::LeaseRef { shard_id: self.shard.to_string(), token: self.token }
    }
}

impl fmt::Display for LeaseKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "shard {} token {}", self.shard, self.token)
    }
}

/// Where a shard stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, prost::Enumeration)]
#[repr(i32)]
pub enum Phase {
    /// Waits for a worker.
    Queued = 0,
    /// Held by a worker.
    Leased = 1,
    /// Committed: every image released or withheld.
    Done = 2,
    /// Given up.
    Failed = 3,
    /// Cancelled with its job.
    Cancelled = 4,
}

/// The lease of one shard, durable with its job.
#[derive(Clone, PartialEq, prost::Message)]
pub(crate) struct Lease {
    #[prost(enumeration = "Phase", tag = "1")]
    phase_number: i32,
    #[prost(uint64, tag = "2")]
    token: u64,
    #[prost(uint32, tag = "3")]
    deliveries: u32,
    #[prost(string, tag = "4")]
    holder: String,
    #[prost(int64, tag = "5")]
    expires_unix_ms: i64,
    #[prost(int64, tag = "6")]
    not_before_unix_ms: i64,
    #[prost(string, tag = "7")]
    reason: String,
    /// Since when it is put off; 0 if its last delivery could be made.
    #[prost(int64, tag = "8")]
    put_off_since_unix_ms: i64,
}

/// Why a queued shard cannot be handed out.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Obstacle {
    /// What is missing and what to do.
    pub(crate) reason: String,
    /// How long the shard waits before the next look.
    pub(crate) delay_ms: i64,
    /// How long it may be put off in all, then it has failed.
    pub(crate) max_wait_ms: i64,
}

/// Why a delivery ended without a commit.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Failure {
    /// What happened and, where there is something, what to do.
    pub(crate) reason: String,
    /// Whether another delivery may succeed.
    pub(crate) retryable: bool,
    /// How long the shard waits before its next delivery.
    pub(crate) delay_ms: i64,
}

/// A commit that was accepted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Commit {
    /// It ended the shard.
    First,
    /// The same token had committed before: nothing changes.
    Again,
}

/// What became of a shard whose delivery failed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum AfterFailure {
    /// It waits for another delivery.
    Requeued,
    /// It has failed for good.
    GivenUp,
}

/// A lease operation that the present state does not allow.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum LeaseError {
    /// The token is not the current one, or the shard is no longer leased.
    #[error("token {token} is stale: the shard is {phase:?} at token {current}")]
    Stale {
        /// The token presented.
        token: u64,
        /// The newest token granted.
        current: u64,
        /// Where the shard stands.
        phase: Phase,
    },
    /// The shard is not waiting for a worker.
    #[error("the shard is {0:?}, not waiting for a worker")]
    NotQueued(Phase),
    /// The shard waits out a delay.
    #[error("the shard waits until {0}")]
    TooEarly(i64),
    /// The lease has not expired.
    #[error("the lease runs until {0}")]
    NotExpired(i64),
}

impl Lease {
    pub(crate) fn phase(&self) -> Phase {
        // An unknown number in a newer store's file reads as failed: never handed out again.
        Phase::try_from(self.phase_number).unwrap_or(Phase::Failed)
    }

    pub(crate) fn token(&self) -> u64 {
        self.token
    }

    pub(crate) fn deliveries(&self) -> u32 {
        self.deliveries
    }

    pub(crate) fn holder(&self) -> &str {
        &self.holder
    }

    pub(crate) fn expires_unix_ms(&self) -> i64 {
        self.expires_unix_ms
    }

    pub(crate) fn not_before_unix_ms(&self) -> i64 {
        self.not_before_unix_ms
    }

    pub(crate) fn reason(&self) -> &str {
        &self.reason
    }

    /// Whether the shard has ended.
    pub(crate) fn is_terminal(&self) -> bool {
        !matches!(self.phase(), Phase::Queued | Phase::Leased)
    }

    /// Hands the shard to `holder` until `now + ttl_ms` and returns the new token.
    pub(crate) fn grant(&mut self, holder: &str, now: i64, ttl_ms: i64) -> Result<u64, LeaseError> {
        self.require_queued()?;
        if self.not_before_unix_ms > now && !is_beyond(self.not_before_unix_ms, now) {
            return Err(LeaseError::TooEarly(self.not_before_unix_ms));
        }
        self.set_phase(Phase::Leased);
        self.put_off_since_unix_ms = 0;
        // No less than the time: a store that lost its last writes never gives a token twice.
        self.token = (self.token + 1).max(u64::try_from(now).unwrap_or_default());
        self.deliveries += 1;
        self.holder = holder.to_owned();
        self.expires_unix_ms = now.saturating_add(ttl_ms);
        Ok(self.token)
    }

    /// Extends the lease. A lease that has expired but was not taken back yet may still be
    /// renewed: its token is the newest, so nobody else can hold the shard.
    pub(crate) fn renew(&mut self, token: u64, now: i64, ttl_ms: i64) -> Result<(), LeaseError> {
        self.require_current(token)?;
        let end = now.saturating_add(ttl_ms);
        let is_meant = !is_beyond(self.expires_unix_ms, now);
        self.expires_unix_ms = if is_meant { self.expires_unix_ms.max(end) } else { end };
        Ok(())
    }

    /// Ends the shard with `token`'s result. The same token again is accepted and changes nothing.
    pub(crate) fn commit(&mut self, token: u64) -> Result<Commit, LeaseError> {
        if self.phase() == Phase::Done && self.token == token {
            return Ok(Commit::Again);
        }
        self.require_current(token)?;
        self.set_phase(Phase::Done);
        self.reason.clear();
        Ok(Commit::First)
    }

    /// Ends `token`'s delivery without a result.
    pub(crate) fn fail(
        &mut self,
        token: u64,
        failure: &Failure,
        now: i64,
    ) -> Result<AfterFailure, LeaseError> {
        self.require_current(token)?;
        Ok(self.end_delivery(failure, now))
    }

    /// Takes the shard back from a holder that stopped renewing.
    pub(crate) fn expire(&mut self, token: u64, now: i64) -> Result<AfterFailure, LeaseError> {
        self.require_expired(token, now)?;
        let reason = format!("worker {} stopped renewing its lease", self.holder);
        Ok(self.end_delivery(&Failure { reason, retryable: true, delay_ms: 0 }, now))
    }

    /// Takes the shard back after its coordinator died: nobody was left to take the renewals. The
    /// delivery does not count.
    pub(crate) fn recover(&mut self, token: u64, now: i64) -> Result<(), LeaseError> {
        self.require_expired(token, now)?;
        self.give_back(token)
    }

    /// Puts off a delivery that cannot be made, e.g. because a concept has no live node: the shard
    /// stays queued, and the delivery does not count. A shard that was put off for too long has failed.
    pub(crate) fn postpone(
        &mut self,
        obstacle: &Obstacle,
        now: i64,
    ) -> Result<AfterFailure, LeaseError> {
        self.require_queued()?;
        if self.put_off_since_unix_ms == 0 {
            self.put_off_since_unix_ms = now;
        } else {
            // Time in which nobody looked says nothing: no coordinator ran, or a clock was set.
            let unseen = now.saturating_sub(self.not_before_unix_ms.saturating_add(LOOK_MS)).max(0);
            self.put_off_since_unix_ms = self.put_off_since_unix_ms.saturating_add(unseen).min(now);
        }
        let Obstacle { reason, delay_ms, max_wait_ms } = obstacle.clone();
        if now.saturating_sub(self.put_off_since_unix_ms) >= max_wait_ms {
            let failure = Failure { reason, retryable: false, delay_ms };
            return Ok(self.end_delivery(&failure, now));
        }
        self.reason = reason;
        self.not_before_unix_ms = now.saturating_add(delay_ms);
        Ok(AfterFailure::Requeued)
    }

    /// Returns the shard to the queue without counting the delivery: the coordinator itself
    /// stopped or lost it, which is not the shard's fault.
    pub(crate) fn give_back(&mut self, token: u64) -> Result<(), LeaseError> {
        self.require_current(token)?;
        self.deliveries = self.deliveries.saturating_sub(1);
        self.set_phase(Phase::Queued);
        Ok(())
    }

    /// Cancels a shard that has not ended; returns the token to stop if a worker holds it.
    pub(crate) fn cancel(&mut self) -> Option<u64> {
        let held = (self.phase() == Phase::Leased).then_some(self.token);
        if !self.is_terminal() {
            self.set_phase(Phase::Cancelled);
        }
        held
    }

    fn end_delivery(&mut self, failure: &Failure, now: i64) -> AfterFailure {
        self.reason = failure.reason.clone();
        if failure.retryable && self.deliveries < MAX_DELIVERIES {
            self.not_before_unix_ms = now.saturating_add(failure.delay_ms);
            self.set_phase(Phase::Queued);
            AfterFailure::Requeued
        } else {
            self.set_phase(Phase::Failed);
            AfterFailure::GivenUp
        }
    }

    fn require_queued(&self) -> Result<(), LeaseError> {
        match self.phase() {
            Phase::Queued => Ok(()),
            other => Err(LeaseError::NotQueued(other)),
        }
    }

    fn require_current(&self, token: u64) -> Result<(), LeaseError> {
        if self.phase() == Phase::Leased && self.token == token {
            return Ok(());
        }
        Err(LeaseError::Stale { token, current: self.token, phase: self.phase() })
    }

    fn require_expired(&self, token: u64, now: i64) -> Result<(), LeaseError> {
        self.require_current(token)?;
        match self.expires_unix_ms > now && !is_beyond(self.expires_unix_ms, now) {
            true => Err(LeaseError::NotExpired(self.expires_unix_ms)),
            false => Ok(()),
        }
    }

    fn set_phase(&mut self, phase: Phase) {
        self.phase_number = phase.into();
        if phase != Phase::Leased {
            self.holder.clear();
            self.expires_unix_ms = 0;
        }
    }
}

#[cfg(test)]
mod tests;
