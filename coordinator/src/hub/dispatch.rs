//! The dispatcher: takes back expired leases, hands queued shards to workers, and tells workers
//! when the nodes of their shards change.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
    time::Duration,
};

use fairlead_common::ids::{JobId, ShardId};
use fairlead_proto::v1::{self, attach_response::Message};
use tokio::sync::mpsc;

use super::{
    Shared,
    session::ShardTask,
    state::{Session, SessionPhase, State},
};
use crate::{
    admission,
    clock::{millis, unix_ms},
    error::Result,
    lease::{Failure, LeaseKey},
    metrics,
    placement::{self, Candidate, Waiting},
    routing,
    state::{ActiveShard, JobRecord},
    store::StoreError,
    transition::{Effect, Transition},
};

/// Longest pause between two looks at leases and registrations.
const LONGEST_PAUSE: Duration = Duration::from_secs(1);

/// Runs until the hub closes.
pub(super) async fn run(shared: Arc<Shared>) {
    let ttl = shared.options.lease_ttl.min(shared.registry.ttl());
    let pause = (ttl / 4).clamp(Duration::from_millis(5), LONGEST_PAUSE);
    let mut nodes = shared.registry.subscribe();
    let mut stuck = Stuck::default();
    loop {
        let wait = match tick(&shared, &mut stuck).await {
            Ok(Some(retry)) => pause.min(retry),
            Ok(None) => pause,
            Err(error) => {
                tracing::error!(%error, "dispatcher cannot read the store");
                LONGEST_PAUSE
            }
        };
        tokio::select! {
            () = shared.wake.notified() => {}
            _ = nodes.changed() => update_nodes(&shared),
            () = tokio::time::sleep(wait) => {}
            () = shared.closing.cancelled() => return,
        }
    }
}

/// Since when each queued shard is one that nobody can make; Unix milliseconds.
#[derive(Default)]
struct Stuck(BTreeMap<ShardId, i64>);

impl Stuck {
    /// How long `shard` has been stuck by `now`.
    fn since(&mut self, shard: ShardId, now: i64) -> i64 {
        now - *self.0.entry(shard).or_insert(now)
    }

    /// Forgets what is no longer in `queue`.
    fn forget_all_but(&mut self, queue: &[ActiveShard]) {
        if self.0.is_empty() {
            return;
        }
        let queued: BTreeSet<ShardId> =
            queue.iter().filter_map(ActiveShard::ids).map(|(_, lease)| lease.shard).collect();
        self.0.retain(|shard, _| queued.contains(shard));
    }
}

/// One round; returns when the next delayed shard is due.
async fn tick(shared: &Arc<Shared>, stuck: &mut Stuck) -> Result<Option<Duration>> {
    shared.registry.expire();
    let now = unix_ms();
    forget_stopped(shared, now);
    let (leased, mut queue): (Vec<_>, Vec<_>) =
        shared.store.active().await?.into_iter().partition(|shard| shard.leased);
    for shard in leased.iter().filter(|shard| shard.expires_unix_ms <= now) {
        expire(shared, shard).await;
    }
    metrics::round(&metrics::Round {
        queued: queue.len(),
        running: leased.len(),
        workers: shared.state.lock().workers.len(),
        nodes: shared.registry.live().len(),
    });
    stuck.forget_all_but(&queue);
    let due = queue.iter().map(|shard| shard.not_before_unix_ms).filter(|&at| at > now).min();
    queue.retain(|shard| shard.not_before_unix_ms <= now);
    if !shared.draining.is_cancelled() {
        for shard in without_worker(shared, &queue) {
            let Some((job, LeaseKey { shard: id, .. })) = shard.ids() else { continue };
            let reason = format!(
                "no attached worker has the generator `{}` with hash {}; start one with `fairlead \
                 worker`",
                shard.model, shard.model_hash
            );
            put_off(shared, stuck, job, id, reason).await?;
        }
        for (shard, connection) in place(shared, &queue) {
            deliver(shared, stuck, shard, connection).await?;
        }
    }
    Ok(due.map(|at| Duration::from_millis(u64::try_from(at - now).unwrap_or_default())))
}

fn forget_stopped(shared: &Shared, now: i64) {
    let mut state = shared.state.lock();
    state.sessions.retain(
        |_, session| !matches!(session.phase, SessionPhase::Stopping { until } if until <= now),
    );
    shared.count_sessions(&state);
}

async fn expire(shared: &Shared, shard: &ActiveShard) {
    let Some((job, lease)) = shard.ids() else { return };
    match shared.apply(job, Transition::Expire { lease }).await {
        Ok(_) => {
            metrics::delivery("expired");
            tracing::warn!(%job, %lease, worker = shard.holder, "lease expired");
            shared.stop_session(lease, "the lease expired");
            shared.wake.notify_one();
        }
        // Renewed or ended in between.
        Err(StoreError::Refused(_)) => {}
        Err(error) => tracing::error!(%job, %lease, %error, "cannot expire a lease"),
    }
}

/// Queued shards with the connection of the worker that gets them.
fn place<'a>(shared: &Shared, queue: &'a [ActiveShard]) -> Vec<(&'a ActiveShard, u64)> {
    let state = shared.state.lock();
    let takers: Vec<_> = state.workers.iter().filter(|(_, worker)| !worker.draining).collect();
    let workers: Vec<Candidate<'_>> = takers
        .iter()
        .map(|(connection, worker)| Candidate {
            models: worker
                .models
                .iter()
                .map(|model| (model.name.as_str(), model.hash.as_str()))
                .collect(),
            capacity: worker.capacity,
            leases: state.leases_of(**connection).count(),
        })
        .collect();
    let waiting: Vec<_> =
        queue.iter().map(|shard| Waiting { model: (&shard.model, &shard.model_hash) }).collect();
    placement::place(&waiting, &workers)
        .into_iter()
        .map(|(shard, worker)| (&queue[shard], *takers[worker].0))
        .collect()
}

/// Queued shards whose generator no attached worker has.
fn without_worker<'a>(shared: &Shared, queue: &'a [ActiveShard]) -> Vec<&'a ActiveShard> {
    let state = shared.state.lock();
    let has = |shard: &ActiveShard| {
        let mut models = state.workers.values().flat_map(|worker| &worker.models);
        models.any(|model| model.name == shard.model && model.hash == shard.model_hash)
    };
    queue.iter().filter(|shard| !has(shard)).collect()
}

/// Leaves a shard that nobody can make in the queue, or when it has been so for too long, fails it.
async fn put_off(
    shared: &Shared,
    stuck: &mut Stuck,
    job: JobId,
    shard: ShardId,
    reason: String,
) -> Result<()> {
    let retryable = stuck.since(shard, unix_ms()) < millis(shared.options.max_wait);
    tracing::warn!(%job, %shard, reason, retryable, "shard cannot be handed out");
    let failure = Failure { reason, retryable, delay_ms: shared.retry_delay_ms(1) };
    match shared.apply(job, Transition::Postpone { shard, failure }).await {
        // Cancelled in between.
        Ok(_) | Err(StoreError::Refused(_)) => Ok(()),
        Err(error) => Err(error.into()),
    }
}

/// Hands one shard to one worker, or puts it off because a concept has no live node.
async fn deliver(
    shared: &Arc<Shared>,
    stuck: &mut Stuck,
    shard: &ActiveShard,
    connection: u64,
) -> Result<()> {
    let Some((job_id, LeaseKey { shard: id, .. })) = shard.ids() else { return Ok(()) };
    let Some(job) = shared.store.get(job_id).await? else { return Ok(()) };
    let assignment = assign(shared, &job);
    if let Some(unserved) = assignment.unserved.first() {
        return put_off(shared, stuck, job_id, id, unserved.to_string()).await;
    }
    let worker = shared.state.lock().workers.get(&connection).map(|w| w.id.clone());
    let Some(worker) = worker else { return Ok(()) };
    let ttl_ms = millis(shared.options.lease_ttl);
    let _handover = shared.handover.lock().await;
    match shared.apply(job_id, Transition::Grant { shard: id, worker, ttl_ms }).await {
        Ok(applied) => {
            if let Effect::Granted { lease, attempt } = applied.effect {
                let job = Arc::new(applied.record);
                let grant = Grant { job_id, job, lease, attempt, connection };
                grant.open(shared, assignment).await;
            }
            Ok(())
        }
        // Cancelled in between.
        Err(StoreError::Refused(_)) => Ok(()),
        Err(error) => Err(error.into()),
    }
}

fn assign(shared: &Shared, job: &JobRecord) -> routing::Assignment {
    let (policy, run) = (job.policy(), job.run());
    let nodes = shared.registry.live();
    routing::assign(&policy.concepts, &nodes, admission::calibration(&policy, &run))
}

/// A lease that was granted and not yet told to its worker.
struct Grant {
    job_id: JobId,
    job: Arc<JobRecord>,
    lease: LeaseKey,
    attempt: u32,
    connection: u64,
}

impl Grant {
    /// Opens the session and sends the assignment; a worker that left in between loses it again.
    async fn open(self, shared: &Arc<Shared>, nodes: routing::Assignment) {
        let Self { job_id, lease, attempt, connection, .. } = self;
        let Some(shard) = self.job.shard(lease.shard) else { return };
        let images = shard.images();
        let assignment = self.assignment(images.clone(), nodes.told.clone());
        let opened = {
            let mut state = shared.state.lock();
            let worker_id = state.workers.get(&connection).map(|worker| worker.id.clone());
            let sent = state.send(connection, Message::Assignment(assignment));
            worker_id.filter(|_| sent).map(|worker_id| {
                tracing::info!(job = %job_id, %lease, worker = worker_id, attempt, "shard assigned");
                // Room for every image and the commit.
                let (inbox, receiver) = mpsc::channel(images.len() + 1);
                let abort = shared.closing.child_token();
                let session = Session {
                    job_id,
                    job: Arc::clone(&self.job),
                    connection,
                    phase: SessionPhase::Running,
                    inbox,
                    abort: abort.clone(),
                    reservation: shared.registry.reserve(&nodes.endpoints),
                    endpoints: nodes.told,
                    attempt,
                };
                state.sessions.insert(lease, session);
                shared.count_sessions(&state);
                ShardTask {
                    shared: Arc::clone(shared),
                    job_id,
                    job: Arc::clone(&self.job),
                    lease,
                    images,
                    worker_id,
                    attempt,
                    inbox: receiver,
                    abort,
                }
            })
        };
        match opened {
            Some(task) => {
                shared.tasks.spawn(task.run());
            }
            None => shared.give_back(job_id, lease).await,
        }
    }

    fn assignment(
        &self,
        images: std::ops::Range<u32>,
        energies: Vec<v1::EnergyEndpoint>,
    ) -> v1::ShardAssignment {
        let task = |image: &v1::ImageInfo| v1::ImageTask {
            index: image.index,
            seed: image.seed,
            record_id: image.record_id.clone(),
        };
        let mine = self.job.job.images.iter().filter(|image| images.contains(&image.index));
        v1::ShardAssignment {
            lease: Some(self.lease.to_proto()),
            job_id: self.job.job.job_id.clone(),
            spec: Some(self.job.spec()),
            policy: Some(self.job.policy()),
            images: mine.map(task).collect(),
            energies,
            traceparent: self.job.traceparent.clone(),
            attempt: self.attempt,
        }
    }
}

/// Tells the workers of running shards whose nodes have come or gone which to ask now.
fn update_nodes(shared: &Shared) {
    let nodes = shared.registry.live();
    let mut state = shared.state.lock();
    let State { sessions, .. } = &mut *state;
    let mut updates = Vec::new();
    for (lease, session) in sessions.iter_mut().filter(|(_, s)| s.phase == SessionPhase::Running) {
        let policy = session.job.policy();
        let run = session.job.run();
        let need = admission::calibration(&policy, &run);
        let told = routing::assign(&policy.concepts, &nodes, need).told;
        let energies = routing::keep_order(told, &session.endpoints);
        if routing::same_nodes(&energies, &session.endpoints) {
            continue;
        }
        let asked = routing::first_asked(&policy.concepts, &energies);
        session.reservation = shared.registry.reserve(&asked);
        session.endpoints = energies.clone();
        let shard_id = lease.shard.to_string();
        updates.push((session.connection, v1::NodeUpdate { shard_id, energies }));
    }
    for (connection, update) in updates {
        state.send(connection, Message::Nodes(update));
    }
}
