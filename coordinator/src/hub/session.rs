//! One delivery of a shard on the coordinator's side: its images pass the release gate as they
//! arrive, and the commit follows when the worker is done and every check has ended.

use std::{collections::BTreeSet, ops::Range, sync::Arc};

use fairlead_common::{
    bounds::{self, MAX_NOTICES},
    ids::JobId,
};
use fairlead_proto::v1::{self, attach_response::Message};
use futures::stream::{FuturesUnordered, StreamExt};
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

use super::{Shared, state::SessionPhase};
use crate::{
    clock::millis,
    error::Error,
    lease::{Failure, LeaseKey},
    metrics,
    release::{Proposal, Rejection},
    state::JobRecord,
    store::StoreError,
    transition::Transition,
};

/// What a worker sends for a shard.
#[derive(Debug)]
pub(super) enum Input {
    /// The result for one image.
    Image(Box<v1::ImageOutcome>),
    /// There is no more: commit.
    Done,
}

pub(super) struct ShardTask {
    pub(super) shared: Arc<Shared>,
    pub(super) job_id: JobId,
    pub(super) job: Arc<JobRecord>,
    pub(super) lease: LeaseKey,
    pub(super) images: Range<u32>,
    pub(super) worker_id: String,
    pub(super) attempt: u32,
    pub(super) inbox: mpsc::Receiver<Input>,
    pub(super) abort: CancellationToken,
}

/// Why a delivery ends without a commit.
enum End {
    /// Someone else ended it and has said so.
    Aborted,
    /// An image cannot be released.
    Rejected(Rejection),
}

impl From<Rejection> for End {
    fn from(rejection: Rejection) -> Self {
        Self::Rejected(rejection)
    }
}

impl ShardTask {
    pub(super) async fn run(mut self) {
        let mut decided = Vec::new();
        let abort = self.abort.clone();
        let collected = tokio::select! {
            biased;
            () = abort.cancelled() => Err(End::Aborted),
            collected = self.collect(&mut decided) => collected,
        };
        match collected {
            Ok(notices) => self.commit(decided, notices).await,
            Err(End::Aborted) => self.discard(&decided).await,
            Err(End::Rejected(rejection)) => {
                self.discard(&decided).await;
                self.reject(rejection).await;
            }
        }
    }

    /// Takes results and decides about them until the worker is done; returns its notices.
    async fn collect(&mut self, decided: &mut Vec<v1::ImageInfo>) -> Result<Vec<String>, End> {
        let gate = self.shared.gate.clone();
        let mut checks = FuturesUnordered::new();
        let mut seen = BTreeSet::new();
        let mut notices = Vec::new();
        let mut done = false;
        // The worker may be gone once it is done: from then on the lease is kept from here.
        let mut renew = tokio::time::interval(self.shared.options.lease_ttl / 3);
        while !done || !checks.is_empty() {
            tokio::select! {
                input = self.inbox.recv(), if !done => match input {
                    None => return Err(End::Aborted),
                    Some(Input::Done) => done = true,
                    Some(Input::Image(mut outcome)) => {
                        let index = outcome.index;
                        if !self.images.contains(&index) || !seen.insert(index) {
                            return Err(self.broken(format!("sent image {index} twice or unasked")));
                        }
                        let said = std::mem::take(&mut outcome.notices);
                        bounds::count("notices", said.len(), MAX_NOTICES).map_err(|problem| {
                            self.broken(format!("sent image {index}, which {problem}"))
                        })?;
                        notices.extend(said.iter().map(|notice| bounds::text(notice)));
                        checks.push(gate.decide(Proposal {
                            job: Arc::clone(&self.job),
                            token: self.lease.token,
                            worker_id: self.worker_id.clone(),
                            outcome: *outcome,
                        }));
                    }
                },
                Some(decision) = checks.next(), if !checks.is_empty() => decided.push(decision?),
                _ = renew.tick(), if done => self.renew().await,
            }
        }
        if seen.len() != self.images.len() {
            let problem = format!("committed {} of {} images", seen.len(), self.images.len());
            return Err(self.broken(problem));
        }
        Ok(notices)
    }

    fn broken(&self, problem: String) -> End {
        let reason = format!("worker {} {problem}", self.worker_id);
        End::Rejected(Rejection { reason, retryable: true })
    }

    async fn renew(&self) {
        let ttl_ms = millis(self.shared.options.lease_ttl);
        let renew = Transition::Renew { leases: vec![self.lease], ttl_ms };
        if let Err(error) = self.shared.apply(self.job_id, renew).await {
            tracing::warn!(job = %self.job_id, lease = %self.lease, %error, "cannot renew");
        }
    }

    async fn commit(self, mut images: Vec<v1::ImageInfo>, notices: Vec<String>) {
        images.sort_by_key(|image| image.index);
        let lease = self.lease;
        let commit = Transition::Commit { lease, images: images.clone(), notices };
        match self.shared.apply(self.job_id, commit).await {
            Ok(applied) => {
                metrics::committed(&images);
                self.shared.count_withheld(&applied.record, &images).await;
                tracing::info!(job = %self.job_id, %lease, worker = self.worker_id, "shard done");
                self.reply(v1::CommitStatus::Accepted, String::new());
                self.shared.remove_session(lease);
            }
            Err(StoreError::Refused(refusal)) => {
                metrics::delivery("refused");
                tracing::info!(job = %self.job_id, %lease, %refusal, "late result refused");
                self.discard(&images).await;
                self.reply(v1::CommitStatus::Aborted, refusal.to_string());
                self.shared.remove_session(lease);
            }
            // Unknown whether it took place, so the objects stay. A store that is away says nothing about
            // the shard.
            Err(error @ StoreError::Away { .. }) => {
                tracing::error!(job = %self.job_id, %lease, %error, "cannot commit");
                self.reply(v1::CommitStatus::Aborted, "the coordinator's store is away".to_owned());
                self.shared.remove_session(lease);
                self.shared.give_back(self.job_id, lease).await;
                self.shared.wake.notify_one();
            }
            Err(error) => {
                tracing::error!(job = %self.job_id, %lease, %error, "cannot commit");
                let reason = Error::from(error).public();
                self.reject(Rejection { reason, retryable: true }).await;
            }
        }
    }

    /// Ends the delivery; the worker is told to stop if it is still at it.
    async fn reject(self, rejection: Rejection) {
        let Rejection { reason, retryable } = rejection;
        let phase = self.shared.state.lock().sessions.get(&self.lease).map(|s| s.phase);
        if phase == Some(SessionPhase::Running) {
            self.shared.stop_session(self.lease, &reason);
        } else {
            self.reply(v1::CommitStatus::Aborted, reason.clone());
            self.shared.remove_session(self.lease);
        }
        let delay_ms = self.shared.retry_delay_ms(self.attempt);
        self.shared.fail(self.job_id, self.lease, Failure { reason, retryable, delay_ms }).await;
    }

    async fn discard(&self, decided: &[v1::ImageInfo]) {
        self.shared.gate.discard(&self.job.job.job_id, self.lease.token, decided).await;
    }

    fn reply(&self, status: v1::CommitStatus, reason: String) {
        let state = self.shared.state.lock();
        if let Some(session) = state.sessions.get(&self.lease) {
            let lease = Some(self.lease.to_proto());
            let reply = v1::CommitReply { lease, status: status.into(), reason };
            state.send(session.connection, Message::Commit(reply));
        }
    }
}
