//! The engine on its own OS thread, behind a bounded channel: async code never computes.

use std::{
    panic::{AssertUnwindSafe, catch_unwind},
    sync::Arc,
    thread,
};

use fairlead_proto::v1::ModelInfo;
use tokio::sync::{mpsc, oneshot};
use tokio_util::sync::CancellationToken;
use tracing::Span;

use super::{Engine, Observer};
use crate::{
    Shard,
    energy::Energy,
    error::{Error, Result},
};

/// Shards that may wait in the channel; the rest waits at the senders.
const QUEUE: usize = 4;

/// One shard and everything its making needs.
struct Job {
    shard: Shard,
    energy: Box<dyn Energy>,
    observer: Box<dyn Observer>,
    cancel: CancellationToken,
    span: Span,
    done: oneshot::Sender<Result<()>>,
}

/// A cheap handle to an engine's thread. The thread ends when the last handle is dropped.
#[derive(Debug, Clone)]
pub struct EngineHandle {
    info: Arc<ModelInfo>,
    jobs: mpsc::Sender<Job>,
}

impl EngineHandle {
    /// Starts a thread, loads the engine on it, and waits until it is ready. `threads` bounds the
    /// CPU kernels' threads; 0 takes one per core.
    ///
    /// # Errors
    /// Whatever `load` fails with, or [`Error::EngineGone`] if no thread can be had.
    pub async fn spawn(
        name: &str,
        threads: usize,
        load: impl FnOnce() -> Result<Engine> + Send + 'static,
    ) -> Result<Self> {
        let gone = || Error::EngineGone { model: name.to_owned() };
        let (ready, loaded) = oneshot::channel();
        let (jobs, queue) = mpsc::channel(QUEUE);
        thread::Builder::new()
            .name(format!("engine-{name}"))
            .spawn(move || in_pool(threads, move || serve(load, ready, queue)))
            .map_err(|_| gone())?;
        let info = loaded.await.map_err(|_| gone())??;
        Ok(Self { info: Arc::new(info), jobs })
    }

    /// What is served.
    pub fn info(&self) -> &ModelInfo {
        &self.info
    }

    /// Makes a shard's images; see [`Engine::run`]. Shards are made one after the other in the order
    /// of the calls. Dropping the future cancels the work, and so does `cancel`, at once for a shard that
    /// waits and within a step for one that runs.
    ///
    /// # Errors
    /// Those of [`Engine::run`], or [`Error::EngineGone`].
    pub async fn run(
        &self,
        shard: Shard,
        energy: Box<dyn Energy>,
        observer: Box<dyn Observer>,
        cancel: CancellationToken,
    ) -> Result<()> {
        let gone = || Error::EngineGone { model: self.info.name.clone() };
        let (done, finished) = oneshot::channel();
        let cancel = cancel.child_token();
        let stop = cancel.clone();
        let _stop = cancel.clone().drop_guard();
        let job = Job { shard, energy, observer, cancel, span: Span::current(), done };
        // A shard that waits behind another need not wait to be cancelled.
        tokio::select! {
            sent = self.jobs.send(job) => sent.map_err(|_| gone())?,
            () = stop.cancelled() => return Err(Error::Cancelled),
        }
        tokio::select! {
            biased;
            result = finished => result.map_err(|_| gone())?,
            () = stop.cancelled() => Err(Error::Cancelled),
        }
    }
}

/// Runs `work` with a pool of `threads` of its own, or with the process's if `threads` is 0 or none
/// can be had.
fn in_pool(threads: usize, work: impl FnOnce() + Send) {
    let name = |i: usize| format!("kernel-{i}");
    let build = || rayon::ThreadPoolBuilder::new().num_threads(threads).thread_name(name).build();
    match (threads > 0).then(build) {
        Some(Ok(pool)) => pool.install(work),
        Some(Err(error)) => {
            tracing::warn!("no pool of {threads} threads, taking the process's: {error}");
            work();
        }
        None => work(),
    }
}

fn serve(
    load: impl FnOnce() -> Result<Engine>,
    ready: oneshot::Sender<Result<ModelInfo>>,
    mut queue: mpsc::Receiver<Job>,
) {
    let engine = match load() {
        Ok(engine) => engine,
        Err(error) => {
            let _ = ready.send(Err(error));
            return;
        }
    };
    if ready.send(Ok(engine.info().clone())).is_err() {
        return;
    }
    while let Some(mut job) = queue.blocking_recv() {
        let _entered = job.span.clone().entered();
        let result = if job.cancel.is_cancelled() {
            Err(Error::Cancelled)
        } else {
            let (energy, observer) = (job.energy.as_mut(), job.observer.as_mut());
            // One shard's panic must not take the other shards of this model with it.
            catch_unwind(AssertUnwindSafe(|| engine.run(&job.shard, energy, observer, &job.cancel)))
                .unwrap_or_else(|panic| Err(Error::Panic { message: message_of(&*panic) }))
        };
        let _ = job.done.send(result);
    }
}

fn message_of(panic: &(dyn std::any::Any + Send)) -> String {
    let text = panic.downcast_ref::<&str>().map(|text| (*text).to_owned());
    text.or_else(|| panic.downcast_ref::<String>().cloned()).unwrap_or_default()
}
