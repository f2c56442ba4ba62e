//! One shard's task: runs it on its engine and sends what becomes of it.

use std::sync::{
    Arc,
    atomic::{AtomicBool, Ordering},
};

use fairlead_proto::v1::{
    EnergyEndpoint, ImageOutcome, LeaseRef, Preview, ShardAssignment, ShardDone, ShardFailure,
    ShardProgress, StepProgress, attach_request::Message,
};
use parking_lot::Mutex;
use tokio::sync::{mpsc, watch};
use tokio_util::sync::CancellationToken;

use super::{outbox::Outbox, session::LEAVING};
use crate::{
    Shard,
    energy::{EnergyPool, PoolOptions},
    engine::{EngineHandle, Observer},
    error::{Error, Result},
    metrics,
};

/// Why a shard was stopped.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Stop {
    /// The lease is no longer ours: say nothing.
    Lost,
    /// The coordinator cancelled it.
    Cancelled(String),
    /// The worker is leaving: somebody else should take it.
    HandedBack,
}

/// How a shard's task ended.
#[derive(Debug)]
pub(super) enum Outcome {
    /// All was sent; a commit is now to be waited for.
    Committing,
    /// There is nothing to wait for.
    Over,
    /// The device failed: nothing more can be made in this process.
    Fatal(Error),
}

/// What the session and a shard's task share.
#[derive(Debug, Clone, Default)]
pub(super) struct Control {
    cancel: CancellationToken,
    stop: Arc<Mutex<Option<Stop>>>,
    begun: Arc<AtomicBool>,
}

impl Control {
    /// Stops the work; the first reason counts.
    pub(super) fn stop(&self, why: Stop) {
        self.stop.lock().get_or_insert(why);
        self.cancel.cancel();
    }

    /// Whether a step was done.
    pub(super) fn has_begun(&self) -> bool {
        self.begun.load(Ordering::Relaxed)
    }

    fn stopped(&self) -> Option<Stop> {
        self.stop.lock().clone()
    }
}

/// A shard and what it takes to run it.
pub(super) struct Work {
    pub(super) lease: LeaseRef,
    pub(super) assignment: ShardAssignment,
    pub(super) engine: EngineHandle,
    pub(super) pool: PoolOptions,
    pub(super) endpoints: watch::Receiver<Vec<EnergyEndpoint>>,
    pub(super) outbox: Outbox,
    pub(super) control: Control,
}

impl Work {
    /// Runs the shard to its end. Images are sent as they are finished, then `done` or a failure.
    pub(super) async fn run(self) -> Outcome {
        let outcome = match self.make().await {
            Ok(()) if self.control.stopped().is_none() => {
                let done = ShardDone { lease: Some(self.lease.clone()) };
                match self.outbox.result(Message::Done(done)).await {
                    Ok(()) => Outcome::Committing,
                    Err(_) => Outcome::Over,
                }
            }
            Ok(()) => self.fail(Error::Cancelled).await,
            Err(error) => self.fail(error).await,
        };
        tracing::debug!(shard = %self.lease.shard_id, ?outcome, "shard ended here");
        outcome
    }

    async fn make(&self) -> Result<()> {
        let shard = Shard::from_assignment(&self.assignment, self.engine.info())?;
        let energy = EnergyPool::new(self.pool.clone(), self.endpoints.clone());
        let (images, mut finished) = mpsc::channel(shard.images.len());
        let observer = Sender {
            lease: self.lease.clone(),
            outbox: self.outbox.clone(),
            images,
            begun: self.control.begun.clone(),
        };
        let cancel = self.control.cancel.clone();
        let run = self.engine.run(shard, Box::new(energy), Box::new(observer), cancel.clone());
        let send = async {
            while let Some(outcome) = finished.recv().await {
                // A cancelled shard's pictures go nowhere.
                if cancel.is_cancelled()
                    || self.outbox.result(Message::Image(outcome)).await.is_err()
                {
                    break;
                }
            }
        };
        tokio::join!(run, send).0
    }

    /// Reports why there is no result, unless the lease is lost.
    async fn fail(&self, error: Error) -> Outcome {
        self.report(&error).await;
        if error.is_fatal() { Outcome::Fatal(error) } else { Outcome::Over }
    }

    async fn report(&self, error: &Error) {
        let stopped = self.control.stopped();
        let (cancelled, handed_back) = (
            matches!(stopped, Some(Stop::Cancelled(_))),
            matches!(stopped, Some(Stop::HandedBack)),
        );
        let (reason, retryable) = match (error, stopped) {
            (_, Some(Stop::Lost)) => return,
            (_, Some(Stop::Cancelled(reason))) => (reason, false),
            (_, Some(Stop::HandedBack)) => (LEAVING.to_owned(), true),
            (error, None) => (error.to_string(), error.retryable()),
        };
        metrics::failed();
        tracing::warn!(shard = %self.lease.shard_id, retryable, cancelled, "shard failed: {reason}");
        let lease = Some(self.lease.clone());
        let failure = ShardFailure { lease, reason, retryable, cancelled, handed_back };
        let _ = self.outbox.result(Message::Failure(failure)).await;
    }
}

/// Passes what the engine tells on to the stream, without ever waiting.
struct Sender {
    lease: LeaseRef,
    outbox: Outbox,
    /// Has room for every image of the shard.
    images: mpsc::Sender<ImageOutcome>,
    begun: Arc<AtomicBool>,
}

impl Observer for Sender {
    fn step(&mut self, progress: StepProgress, preview: Option<Preview>) {
        self.begun.store(true, Ordering::Relaxed);
        let (lease, previews) = (Some(self.lease.clone()), preview.into_iter().collect());
        let progress = ShardProgress { lease, steps: vec![progress], previews };
        self.outbox.progress(Message::Progress(progress));
    }

    fn image(&mut self, mut outcome: ImageOutcome) {
        outcome.lease = Some(self.lease.clone());
        if self.images.try_send(outcome).is_err() {
            tracing::error!(shard = %self.lease.shard_id, "an image has nowhere to go");
        }
    }
}
