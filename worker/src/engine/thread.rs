//! The engine on OS threads of its own, which take turns, behind a bounded channel: async code never
//! computes.

use std::{
    panic::{AssertUnwindSafe, catch_unwind},
    sync::Arc,
    thread,
};

use fairlead_proto::v1::ModelInfo;
use parking_lot::Mutex;
use tokio::sync::{mpsc, oneshot};
use tokio_util::sync::CancellationToken;
use tracing::Span;

use super::{Engine, Observer};
use crate::{
    Shard,
    energy::Energy,
    error::{Error, Result},
    turn::Turns,
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

/// A cheap handle to an engine's threads. They end when the last handle is dropped.
#[derive(Debug, Clone)]
pub struct EngineHandle {
    info: Arc<ModelInfo>,
    jobs: mpsc::Sender<Job>,
}

impl EngineHandle {
    /// Starts a thread, loads the engine on it, and waits until it is ready. Then so many threads as
    /// `micro_batches` says make shards, at least one; one of them computes at a time. `threads` bounds the
    /// CPU kernels' threads; 0 takes one per core.
    ///
    /// # Errors
    /// Whatever `load` fails with, or [`Error::EngineGone`] if no thread can be had.
    pub async fn spawn(
        name: &str,
        threads: usize,
        micro_batches: u32,
        load: impl FnOnce() -> Result<Engine> + Send + 'static,
    ) -> Result<Self> {
        let gone = || Error::EngineGone { model: name.to_owned() };
        let (ready, loaded) = oneshot::channel();
        let (jobs, queue) = mpsc::channel(QUEUE);
        let spawn = |number: u32, work: Box<dyn FnOnce() + Send>| {
            let thread = thread::Builder::new().name(format!("engine-{name}-{number}"));
            // Each has a pool of its own: in a shared one, whoever waits would keep a thread from the other.
            thread.spawn(move || in_pool(threads, work)).map_err(|_| gone())
        };
        let (queue, turns) = (Arc::new(Mutex::new(queue)), Turns::default());
        let (own_queue, own_turns) = (Arc::clone(&queue), turns.clone());
        let first = move || {
            let loaded = load().map(Arc::new);
            let engine = loaded.as_ref().ok().cloned();
            if ready.send(loaded).is_ok()
                && let Some(engine) = engine
            {
                serve(&engine, &own_queue, &own_turns);
            }
        };
        spawn(0, Box::new(first))?;
        let engine = loaded.await.map_err(|_| gone())??;
        for number in 1..micro_batches {
            let (engine, queue, turns) = (Arc::clone(&engine), Arc::clone(&queue), turns.clone());
            spawn(number, Box::new(move || serve(&engine, &queue, &turns)))?;
        }
        Ok(Self { info: Arc::new(engine.info().clone()), jobs })
    }

    /// What is served.
    pub fn info(&self) -> &ModelInfo {
        &self.info
    }

    /// Makes a shard's images; see [`Engine::run`]. Shards are begun in the order of the calls. Dropping the future cancels the work, and so does `cancel`, at once for a shard that
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

/// Makes one shard after the other until no handle is left.
fn serve(engine: &Engine, queue: &Mutex<mpsc::Receiver<Job>>, turns: &Turns) {
    loop {
        let next = queue.lock().blocking_recv();
        let Some(mut job) = next else { return };
        let _entered = job.span.clone().entered();
        let turn = turns.take(&job.cancel);
        let result = if job.cancel.is_cancelled() {
            Err(Error::Cancelled)
        } else {
            let (energy, observer) = (job.energy.as_mut(), job.observer.as_mut());
            // One shard's panic must not take the other shards of this model with it.
            catch_unwind(AssertUnwindSafe(|| engine.run(&job.shard, energy, observer, &turn)))
                .unwrap_or_else(|panic| Err(Error::Panic { message: message_of(&*panic) }))
        };
        drop(turn);
        let _ = job.done.send(result);
    }
}

fn message_of(panic: &(dyn std::any::Any + Send)) -> String {
    let text = panic.downcast_ref::<&str>().map(|text| (*text).to_owned());
    text.or_else(|| panic.downcast_ref::<String>().cloned()).unwrap_or_default()
}
