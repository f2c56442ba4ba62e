//! The workers' hub: who is attached, which shard each holds, and the tasks that follow a shard
//! from its assignment to its commit.

mod changes;
mod connection;
mod dispatch;
mod session;
mod state;

use std::{sync::Arc, time::Duration};

use fairlead_common::{identity::Identity, ids::JobId};
use fairlead_proto::v1::{self, ImageStatus, attach_response::Message};
use futures::Stream;
use parking_lot::Mutex;
use tokio::{
    sync::{Notify, mpsc, watch},
    time::Instant,
};
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use tonic::Status;

use self::state::{SessionPhase, State};
use crate::{
    clock::{Clock, millis},
    error::Result,
    events::Events,
    lease::{Failure, LeaseKey},
    metrics,
    registry::Registry,
    release::ReleaseGate,
    state::{ActiveShard, JobRecord},
    store::{Applied, Charge, Store, StoreError},
    transition::{Effect, Transition},
};

/// Messages waiting for one worker; a worker that lets more pile up is cut off.
const OUTBOX: usize = 256;

/// Times and names of a hub.
#[derive(Debug, Clone)]
pub(crate) struct HubOptions {
    /// Told to workers.
    pub(crate) coordinator_id: String,
    /// A lease ends this long after its last renewal.
    pub(crate) lease_ttl: Duration,
    /// Wait before the second delivery of a failed shard; it doubles with each further one.
    pub(crate) retry_delay: Duration,
    /// How long a shard may stay queued that nobody can make.
    pub(crate) max_wait: Duration,
    /// Workers run in this process.
    pub(crate) has_own_workers: bool,
}

/// The hub; clones share it.
#[derive(Debug, Clone)]
pub(crate) struct Hub {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    store: Arc<dyn Store>,
    clock: Clock,
    registry: Registry,
    events: Events,
    gate: ReleaseGate,
    options: HubOptions,
    state: Mutex<State>,
    /// Read from a grant until its session is open, so that a cancel in between finds it.
    handover: tokio::sync::RwLock<()>,
    /// Something changed that may let a shard be handed out.
    wake: Notify,
    /// Number of sessions.
    sessions: watch::Sender<usize>,
    /// No further shard is handed out.
    draining: CancellationToken,
    /// Streams end.
    closing: CancellationToken,
    tasks: TaskTracker,
}

impl Hub {
    /// Starts the hub: shards that an earlier process left leased return to the queue, then
    /// dispatching begins.
    pub(crate) async fn start(
        store: Arc<dyn Store>,
        clock: Clock,
        registry: Registry,
        events: Events,
        gate: ReleaseGate,
        options: HubOptions,
    ) -> Result<Self> {
        let shared = Arc::new(Shared {
            store,
            clock,
            registry,
            events,
            gate,
            options,
            state: Mutex::default(),
            handover: tokio::sync::RwLock::default(),
            wake: Notify::new(),
            sessions: watch::Sender::new(0),
            draining: CancellationToken::new(),
            closing: CancellationToken::new(),
            tasks: TaskTracker::new(),
        });
        match shared.store.changes() {
            // Others may be at work: what a dead one held returns when its leases end.
            Some(changes) => {
                shared.tasks.spawn(changes::follow(Arc::clone(&shared), changes));
            }
            None => shared.recover().await?,
        }
        shared.tasks.spawn(dispatch::keep(Arc::clone(&shared)));
        shared.tasks.spawn(dispatch::mend(Arc::clone(&shared)));
        shared.tasks.spawn(dispatch::run(Arc::clone(&shared)));
        Ok(Self { shared })
    }

    /// Serves one worker's stream; returns the stream towards it. `who` has shown a certificate.
    pub(crate) fn attach<S>(
        &self,
        inbound: S,
        who: Option<Arc<Identity>>,
    ) -> mpsc::Receiver<Result<v1::AttachResponse, Status>>
    where
        S: Stream<Item = Result<v1::AttachRequest, Status>> + Send + Unpin + 'static,
    {
        let (outbox, outbound) = mpsc::channel(OUTBOX);
        let shared = Arc::clone(&self.shared);
        self.shared.tasks.spawn(connection::serve(shared, inbound, outbox, who));
        outbound
    }

    /// Shards may be waiting: look again.
    pub(crate) fn wake(&self) {
        self.shared.wake.notify_one();
    }

    /// Cancels a job: queued shards end now, workers are told to stop the running ones.
    /// It is done whole even if the caller goes away meanwhile.
    pub(crate) async fn cancel(&self, job: JobId, reason: &str) -> Result<JobRecord> {
        let (shared, reason) = (Arc::clone(&self.shared), reason.to_owned());
        let cancelling = self.shared.tasks.spawn(async move {
            let _handover = shared.handover.write().await;
            let cancel = Transition::Cancel { reason: reason.clone() };
            let applied = shared.apply(job, cancel).await?;
            if let Effect::Cancelled { running } = applied.effect {
                for lease in running {
                    shared.stop_session(lease, &reason);
                }
            }
            shared.wake.notify_one();
            Ok(applied.record)
        });
        cancelling.await.expect("cancelling does not panic and is never aborted")
    }

    /// Hands out nothing more, waits up to `grace` for running shards, then ends all streams;
    /// shards still running return to the queue.
    pub(crate) async fn stop(&self, grace: Duration) {
        self.shared.draining.cancel();
        let mut sessions = self.shared.sessions.subscribe();
        let left = *sessions.borrow();
        if left > 0 {
            tracing::info!(shards = left, ?grace, "waiting for running shards");
        }
        let _ = tokio::time::timeout(grace, sessions.wait_for(|left| *left == 0)).await;
        self.shared.closing.cancel();
        self.shared.tasks.close();
        self.shared.tasks.wait().await;
    }
}

impl Shared {
    /// Applies a transition now and tells watchers if it made events.
    async fn apply(&self, job: JobId, transition: Transition) -> Result<Applied, StoreError> {
        let applied = self.store.apply(job, transition, self.clock.now()).await?;
        if applied.has_events {
            self.events.changed(job);
            if applied.record.is_terminal() {
                metrics::ended(&applied.record);
            }
        }
        Ok(applied)
    }

    /// Counts the withheld ones of images that were just committed. What a store that is away misses is
    /// lost: the images stay withheld.
    async fn count_withheld(&self, record: &JobRecord, images: &[v1::ImageInfo]) {
        let is_withheld = |image: &&v1::ImageInfo| image.status() == ImageStatus::Withheld;
        let withheld: Vec<&v1::ImageInfo> = images.iter().filter(is_withheld).collect();
        metrics::withheld(&record.policy(), &withheld);
        if withheld.is_empty() || record.withheld_per_minute == 0 {
            return;
        }
        let (tenant, per_minute) = (record.tenant.clone(), record.withheld_per_minute);
        let charge = Charge { tenant, images: withheld.len(), per_minute };
        match self.store.charge(charge, self.clock.now()).await {
            Ok(false) => {}
            Ok(true) => {
                metrics::withheld_bound_reached();
                tracing::warn!(
                    tenant = record.tenant,
                    per_minute,
                    "too many images of a tenant were withheld: it has to wait"
                );
            }
            Err(error) => tracing::warn!(%error, "cannot count withheld images"),
        }
    }

    /// Returns shards to the queue that an earlier process of this single coordinator held. That it
    /// died is not their fault, unless the worker died with it: what kills the process that makes it
    /// must not be made for ever.
    async fn recover(&self) -> Result<()> {
        let held = self.store.expired(i64::MAX, usize::MAX).await?;
        let recovered = held.len();
        for (job, lease) in held.iter().filter_map(ActiveShard::ids) {
            let end = match self.options.has_own_workers {
                false => Transition::GiveBack { lease },
                true => {
                    let reason = "the process died while it made the shard".to_owned();
                    let failure = Failure { reason, retryable: true, delay_ms: 0 };
                    Transition::Fail { lease, failure }
                }
            };
            match self.apply(job, end).await {
                Ok(_) => {}
                // A job that cannot be read keeps no other from going on.
                Err(error @ (StoreError::Corrupt(_) | StoreError::UnknownJob(_))) => {
                    tracing::error!(%job, %lease, %error, "a shard is left as it is");
                }
                Err(error) => return Err(error.into()),
            }
        }
        if recovered > 0 {
            tracing::info!(shards = recovered, "unfinished shards returned to the queue");
        }
        Ok(())
    }

    /// Ends a delivery without a result. A refusal means that it had ended already.
    async fn fail(&self, job: JobId, lease: LeaseKey, failure: Failure) {
        tracing::warn!(%job, %lease, reason = failure.reason, "delivery failed");
        match self.apply(job, Transition::Fail { lease, failure }).await {
            Ok(_) => metrics::delivery("failed"),
            Err(StoreError::Refused(_)) => {}
            // The lease stays and runs out, which returns the shard as well.
            Err(error) => tracing::error!(%job, %lease, %error, "cannot end a delivery"),
        }
        self.wake.notify_one();
    }

    /// The wait after the `deliveries`-th failed delivery.
    fn retry_delay_ms(&self, deliveries: u32) -> i64 {
        let doubled = 1i64 << deliveries.saturating_sub(1).min(10);
        millis(self.options.retry_delay).saturating_mul(doubled)
    }

    /// Tells a worker to stop a shard whose delivery has ended. The session counts against the
    /// worker's capacity until it says that it stopped, or for the length of a lease.
    fn stop_session(&self, lease: LeaseKey, reason: &str) {
        let until = Instant::now() + self.options.lease_ttl;
        let mut state = self.state.lock();
        let Some(session) = state.sessions.get_mut(&lease) else { return };
        session.abort.cancel();
        session.phase = SessionPhase::Stopping { until };
        let connection = session.connection;
        let cancel = v1::ShardCancel { lease: Some(lease.to_proto()), reason: reason.to_owned() };
        if !state.send(connection, Message::Cancel(cancel)) {
            state.sessions.remove(&lease);
        }
        self.count_sessions(&state);
    }

    /// Gives the worker of a lease that it let expire nothing more until it says something.
    fn mistrust(&self, lease: LeaseKey) {
        let mut state = self.state.lock();
        let Some(connection) = state.sessions.get(&lease).map(|session| session.connection) else {
            return;
        };
        if let Some(worker) = state.workers.get_mut(&connection) {
            worker.silent = true;
        }
    }

    /// Whether a shard is held by a worker that is or was attached here.
    fn has_session(&self, shard: &ActiveShard) -> bool {
        shard.ids().is_some_and(|(_, lease)| self.state.lock().sessions.contains_key(&lease))
    }

    /// The job of a delivery whose worker is at it.
    fn running(&self, lease: LeaseKey) -> Option<JobId> {
        let state = self.state.lock();
        let session = state.sessions.get(&lease)?;
        (session.phase == SessionPhase::Running).then_some(session.job_id)
    }

    fn remove_session(&self, lease: LeaseKey) {
        let mut state = self.state.lock();
        state.sessions.remove(&lease);
        self.count_sessions(&state);
        drop(state);
        self.wake.notify_one();
    }

    fn count_sessions(&self, state: &State) {
        self.sessions.send_replace(state.sessions.len());
    }
}
