//! The dispatcher: hands queued shards to workers and tells workers when the nodes of their shards change.
//! Beside it, so that no backlog delays it, the care of what ends by time: memberships and leases.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
    time::Duration,
};

use fairlead_common::ids::{JobId, ShardId};
use fairlead_proto::v1::{self, attach_response::Message};
use futures::{StreamExt, future::join_all, stream};
use tokio::{sync::mpsc, time::Instant};

use super::{
    Shared,
    session::ShardTask,
    state::{Session, SessionPhase, State},
};
use crate::{
    admission,
    clock::millis,
    error::Result,
    lease::{LeaseKey, Obstacle},
    metrics,
    placement::{self, Candidate},
    routing,
    state::{ActiveShard, JobRecord, QueueName},
    store::{Backlog, Member, MemberKey, StoreError},
    transition::{Effect, LostBy, Transition},
};

/// Longest pause between two looks at leases and registrations.
const LONGEST_PAUSE: Duration = Duration::from_secs(1);

/// Most leases ended in one round; the next one follows at once.
const EXPIRED: usize = 256;

/// Most shards of a queue handed out in one round, and how many of them at the same time. Shards that were
/// taken are kept from others for [`crate::store::CLAIM`]: a round must be far shorter.
const ROUND: usize = 128;
const TOGETHER: usize = 32;

/// Most previews of one image that are checked for a delivery, its reruns included. A worker sends about
/// eight an attempt.
const MAX_PREVIEWS: u32 = 32;

/// Runs until the hub closes.
pub(super) async fn run(shared: Arc<Shared>) {
    let pause = pause(&shared);
    let mut nodes = shared.registry.subscribe();
    let mut rounds = Rounds::default();
    loop {
        let wait = match tick(&shared, &mut rounds).await {
            Ok(next) => next.map_or(pause, |next| next.min(pause)),
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

/// Keeps the memberships of workers, takes back leases that have ended, and follows the store's clock. Runs
/// until the hub closes.
pub(super) async fn keep(shared: Arc<Shared>) {
    let pause = pause(&shared);
    let mut kept = Instant::now();
    loop {
        let wait = match keep_once(&shared, &mut kept).await {
            Ok(true) => Duration::ZERO,
            Ok(false) => pause,
            Err(error) => {
                tracing::error!(%error, "cannot look after leases");
                LONGEST_PAUSE
            }
        };
        tokio::select! {
            () = tokio::time::sleep(wait) => {}
            () = shared.closing.cancelled() => return,
        }
    }
}

/// A quarter of the time after which a lease or a membership ends.
fn quarter(shared: &Shared) -> Duration {
    shared.options.lease_ttl.min(shared.registry.ttl()) / 4
}

/// The pause between two rounds.
fn pause(shared: &Shared) -> Duration {
    quarter(shared).clamp(Duration::from_millis(5), LONGEST_PAUSE)
}

/// Returns whether more leases have ended than were looked at.
async fn keep_once(shared: &Shared, kept: &mut Instant) -> Result<bool> {
    let jump = shared.clock.set().await?;
    if Duration::from_millis(jump) > quarter(shared) {
        metrics::clock_set();
        tracing::error!(
            jump_ms = jump,
            "the store's clock was set; leases get their time again and nothing is deleted for it, but \
             dates of jobs are wrong if the clock is: see to its NTP"
        );
        shared.registry.interrupted();
    }
    shared.registry.refresh().await?;
    if kept.elapsed() >= shared.registry.ttl() / 3 || has_lost_workers(shared) {
        *kept = Instant::now();
        keep_workers(shared).await?;
    }
    let now = shared.clock.now();
    forget_stopped(shared, Instant::now());
    if !shared.registry.is_settled(shared.options.lease_ttl) {
        return Ok(false);
    }
    // A coordinator ends the leases of its own workers first. What is still there a moment later was
    // handed out by one that is no longer at work, or by an earlier life of this one.
    let orphaned =
        shared.store.expired(now.saturating_sub(millis(quarter(shared))), EXPIRED).await?;
    for shard in &orphaned {
        expire(shared, shard).await;
    }
    let expired = shared.store.expired(now, EXPIRED).await?;
    for shard in expired.iter().filter(|shard| shared.has_session(shard)) {
        expire(shared, shard).await;
    }
    Ok(orphaned.len() == EXPIRED)
}

/// Brings back shards that the store's queues have lost, about as often as a lease that nobody renews is
/// noticed. Runs until the hub closes.
pub(super) async fn mend(shared: Arc<Shared>) {
    let mending = async {
        loop {
            match shared.store.mend(&shared.clock).await {
                Ok(0) => {}
                Ok(shards) => {
                    tracing::warn!(shards, "shards that the queues had lost are back");
                    shared.wake.notify_one();
                }
                Err(error) => tracing::error!(%error, "cannot look after the queues"),
            }
            tokio::time::sleep(2 * shared.options.lease_ttl).await;
        }
    };
    tokio::select! {
        () = mending => {}
        () = shared.closing.cancelled() => {}
    }
}

/// What the dispatcher remembers from one round to the next.
#[derive(Default)]
struct Rounds {
    number: usize,
    abandoned: Abandoned,
}

/// Since when each queue has had shards and no worker, by the steady clock.
#[derive(Default)]
struct Abandoned(BTreeMap<QueueName, Instant>);

impl Abandoned {
    /// The queues of `backlog` that have had no worker for `max_wait` by `now`.
    fn look(
        &mut self,
        backlog: &Backlog,
        attached: &BTreeSet<QueueName>,
        now: Instant,
        max_wait: Duration,
    ) -> Vec<QueueName> {
        self.0.retain(|queue, _| backlog.queued.contains_key(queue) && !attached.contains(queue));
        for queue in backlog.queued.keys().filter(|queue| !attached.contains(queue)) {
            self.0.entry(queue.clone()).or_insert_with(|| {
                tracing::warn!(model = queue.model, hash = queue.hash, "{}", without_worker(queue));
                now
            });
        }
        let over = self.0.iter().filter(|(_, since)| now.duration_since(**since) >= max_wait);
        over.map(|(queue, _)| queue.clone()).collect()
    }
}

fn without_worker(QueueName { model, hash }: &QueueName) -> String {
    format!(
        "no attached worker has the generator `{model}` with hash {hash}; start one with `fairlead \
         worker`"
    )
}

/// One round; returns how soon the next must follow, if sooner than usual.
async fn tick(shared: &Arc<Shared>, rounds: &mut Rounds) -> Result<Option<Duration>> {
    let now = shared.clock.now();
    let backlog = shared.store.backlog(now).await?;
    metrics::round(&metrics::Round {
        queued: backlog.queued.values().sum(),
        running: backlog.running,
        workers: shared.state.lock().workers.len(),
        nodes: shared.registry.live().len(),
    });
    if !shared.draining.is_cancelled() {
        let attached = shared.registry.queues();
        let max_wait = shared.options.max_wait;
        for queue in rounds.abandoned.look(&backlog, &attached, Instant::now(), max_wait) {
            give_up(shared, &queue, now).await?;
        }
        // Each time another one is first: a worker with several generators serves them in turn.
        let queues: Vec<&QueueName> =
            backlog.queued.keys().filter(|q| attached.contains(q)).collect();
        rounds.number = rounds.number.wrapping_add(1);
        let first = rounds.number % queues.len().max(1);
        for queue in queues[first..].iter().chain(&queues[..first]) {
            if hand_out(shared, queue, now).await? {
                return Ok(Some(Duration::ZERO));
            }
        }
    }
    let due = backlog.next_due_unix_ms.map(|at| u64::try_from(at - now).unwrap_or_default());
    Ok(due.map(Duration::from_millis))
}

/// Fails the shards of a queue that has had no worker for too long.
async fn give_up(shared: &Shared, queue: &QueueName, now: i64) -> Result<()> {
    for shard in shared.store.take(queue, EXPIRED, now).await? {
        if let Some((job, lease)) = shard.ids() {
            put_off(shared, job, lease.shard, without_worker(queue), 0).await?;
        }
    }
    Ok(())
}

/// Hands shards of one queue to workers that have room. Says whether there may be more of both.
async fn hand_out(shared: &Arc<Shared>, queue: &QueueName, now: i64) -> Result<bool> {
    let workers = shared.state.lock().candidates(queue);
    let room: usize = workers.iter().map(Candidate::room).sum();
    if room == 0 {
        return Ok(false);
    }
    let shards = shared.store.take(queue, room.min(ROUND), now).await?;
    let taken = shards.len();
    let places = placement::place(taken, &workers);
    let mut jobs: BTreeMap<JobId, Vec<(ShardId, u64)>> = BTreeMap::new();
    for (shard, connection) in shards.iter().zip(places) {
        if let Some((job, lease)) = shard.ids() {
            jobs.entry(job).or_default().push((lease.shard, connection));
        }
    }
    let delivering = jobs.into_iter().map(|(job, shards)| async move {
        // They stay queued, and come again when the claim on them has ended.
        if let Err(error) = deliver(shared, job, shards).await {
            tracing::error!(%job, %error, "cannot hand out shards");
        }
    });
    stream::iter(delivering).buffer_unordered(TOGETHER).collect::<()>().await;
    Ok(taken == ROUND)
}

/// Whether the store does not know all workers that are attached here: it was flushed.
fn has_lost_workers(shared: &Shared) -> bool {
    let known = shared.registry.workers();
    let known: BTreeSet<&str> = known.iter().map(|member| member.id.as_str()).collect();
    let state = shared.state.lock();
    state.workers.values().any(|worker| !known.contains(worker.member.id.as_str()))
}

/// Renews the membership of each attached worker; one that the store has lost joins again.
async fn keep_workers(shared: &Shared) -> Result<()> {
    let members: Vec<Member> =
        shared.state.lock().workers.values().map(|worker| worker.member.clone()).collect();
    let keys: Vec<MemberKey> = members.iter().map(Member::key).collect();
    let lost = shared.registry.keep(&keys).await?;
    let attached = |key: &MemberKey| {
        let state = shared.state.lock();
        state.workers.values().any(|worker| worker.member.key() == *key)
    };
    for member in members.into_iter().filter(|member| lost.contains(&member.key())) {
        if attached(&member.key()) {
            shared.registry.join(member).await?;
        }
    }
    Ok(())
}

fn forget_stopped(shared: &Shared, now: Instant) {
    let mut state = shared.state.lock();
    state.sessions.retain(
        |_, session| !matches!(session.phase, SessionPhase::Stopping { until } if until <= now),
    );
    shared.count_sessions(&state);
}

/// Takes a shard back. Only the coordinator that handed it out can tell that the worker fell silent; where
/// no session knows of the delivery, it was the coordinator that was lost.
async fn expire(shared: &Shared, shard: &ActiveShard) {
    let Some((job, lease)) = shard.ids() else { return };
    let (by, outcome) = match shared.has_session(shard) {
        true => (LostBy::Worker, "expired"),
        false => (LostBy::Coordinator, "orphaned"),
    };
    match shared.apply(job, Transition::Expire { lease, by }).await {
        Ok(_) => {
            metrics::delivery(outcome);
            tracing::warn!(%job, %lease, worker = shard.holder, outcome, "lease ended");
            shared.mistrust(lease);
            shared.stop_session(lease, "the lease expired");
            shared.wake.notify_one();
        }
        // Renewed or ended in between.
        Err(StoreError::Refused(_)) => {}
        Err(error) => tracing::error!(%job, %lease, %error, "cannot expire a lease"),
    }
}

/// Leaves a shard that nobody can make in the queue, or when it was put off for `max_wait_ms`, fails
/// it.
async fn put_off(
    shared: &Shared,
    job: JobId,
    shard: ShardId,
    reason: String,
    max_wait_ms: i64,
) -> Result<()> {
    tracing::warn!(%job, %shard, reason, "shard cannot be handed out");
    let obstacle = Obstacle { reason, delay_ms: shared.retry_delay_ms(1), max_wait_ms };
    match shared.apply(job, Transition::Postpone { shard, obstacle }).await {
        // Cancelled in between.
        Ok(_) | Err(StoreError::Refused(_)) => Ok(()),
        Err(error) => Err(error.into()),
    }
}

/// Hands shards of a job to workers, each to the one of its connection, or puts them off because a concept
/// has no live node.
async fn deliver(shared: &Arc<Shared>, job_id: JobId, shards: Vec<(ShardId, u64)>) -> Result<()> {
    let Some(job) = shared.store.get(job_id).await? else { return Ok(()) };
    let unserved = assign(shared, &job).unserved.into_iter().next();
    let delivering = shards.into_iter().map(|(shard, connection)| {
        let unserved = unserved.clone();
        async move {
            match unserved {
                None => grant(shared, job_id, shard, connection).await,
                Some(unserved) => {
                    let max_wait = millis(shared.options.max_wait);
                    put_off(shared, job_id, shard, unserved.to_string(), max_wait).await
                }
            }
        }
    });
    join_all(delivering).await.into_iter().collect()
}

/// Leases one shard to the worker of a connection and sends it there.
async fn grant(shared: &Arc<Shared>, job_id: JobId, shard: ShardId, connection: u64) -> Result<()> {
    let worker = shared.state.lock().workers.get(&connection).map(|w| w.member.id.clone());
    let Some(worker) = worker else { return Ok(()) };
    let ttl_ms = millis(shared.options.lease_ttl);
    let _handover = shared.handover.read().await;
    match shared.apply(job_id, Transition::Grant { shard, worker, ttl_ms }).await {
        Ok(applied) => {
            if let Effect::Granted { lease, attempt } = applied.effect {
                let job = Arc::new(applied.record);
                let grant = Grant { job_id, job, lease, attempt, connection };
                // Chosen now, so that each shard counts when the next one's are.
                let nodes = assign(shared, &grant.job);
                grant.open(shared, nodes).await;
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
    let need = admission::calibration(&policy, &run);
    routing::assign(&policy.concepts, &nodes, need, rand::random())
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
            let worker_id = state.workers.get(&connection).map(|worker| worker.member.id.clone());
            let sent = state.send(connection, Message::Assignment(assignment));
            worker_id.filter(|_| sent).map(|worker_id| {
                tracing::info!(job = %job_id, %lease, worker = worker_id, attempt, "shard assigned");
                let previews_left = match self.job.spec().previews {
                    true => MAX_PREVIEWS.saturating_mul(images.len() as u32),
                    false => 0,
                };
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
                    previews_left,
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
        let told = routing::assign(&policy.concepts, &nodes, need, rand::random()).told;
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
