//! One worker's stream: hello, welcome, then messages until it breaks. A stream that breaks ends
//! its leases at once.

use std::{collections::HashMap, sync::Arc, time::Duration};

use fairlead_common::{
    bounds::{self, MAX_CAPACITY},
    identity::Identity,
    ids::JobId,
};
use fairlead_proto::v1::{self, attach_request::Message as Inbound, attach_response::Message};
use futures::{Stream, StreamExt};
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;
use tonic::Status;

use super::{
    Shared,
    session::Input,
    state::{self as sessions, Session, SessionPhase},
};
use crate::{
    clock::millis,
    error::{Error, Result},
    lease::{Failure, LeaseKey, Phase},
    metrics,
    state::JobRecord,
    store::{Lookup, Member, MemberKey, MemberKind, StoreError},
    transition::{Effect, Transition},
};

/// How long a new stream may take to say hello.
const HELLO_TIMEOUT: Duration = Duration::from_secs(10);

type Outbox = mpsc::Sender<Result<v1::AttachResponse, Status>>;

/// Serves a stream from its first message to its end.
pub(super) async fn serve<S>(
    shared: Arc<Shared>,
    mut inbound: S,
    outbox: Outbox,
    who: Option<Arc<Identity>>,
) where
    S: Stream<Item = Result<v1::AttachRequest, Status>> + Send + Unpin + 'static,
{
    let close = shared.closing.child_token();
    let greeted = tokio::select! {
        greeted = greet(&shared, &mut inbound, &outbox, who, close.clone()) => greeted,
        () = close.cancelled() => Err(Error::Stopping),
    };
    let connection = match greeted {
        Ok(connection) => connection,
        Err(error) => {
            tracing::warn!(%error, "worker refused");
            let _ = outbox.send(Err(error.into())).await;
            return;
        }
    };
    shared.wake.notify_one();
    loop {
        let message = tokio::select! {
            message = inbound.next() => message,
            () = close.cancelled() => break,
        };
        match message {
            Some(Ok(v1::AttachRequest { message: Some(message) })) => {
                connection.handle(&shared, message).await;
            }
            // A message of a later release that this one does not know.
            Some(Ok(v1::AttachRequest { message: None })) => {}
            Some(Err(status)) => {
                tracing::debug!(worker = connection.worker_id, %status, "stream broke");
                break;
            }
            None => break,
        }
    }
    connection.leave(&shared).await;
    if shared.closing.is_cancelled() {
        // Not awaited: the worker may have stopped reading.
        let _ = outbox.try_send(Err(Error::Stopping.into()));
    }
}

async fn greet<S>(
    shared: &Shared,
    inbound: &mut S,
    outbox: &Outbox,
    who: Option<Arc<Identity>>,
    close: CancellationToken,
) -> Result<Connection>
where
    S: Stream<Item = Result<v1::AttachRequest, Status>> + Send + Unpin,
{
    let first = tokio::time::timeout(HELLO_TIMEOUT, inbound.next()).await;
    let Ok(Some(Ok(v1::AttachRequest { message: Some(Inbound::Hello(hello)) }))) = first else {
        return Err(Error::invalid("hello", "must be the first message, within 10 s"));
    };
    if shared.draining.is_cancelled() {
        return Err(Error::Stopping);
    }
    // The newest view: a worker may have attached elsewhere a moment ago.
    shared.registry.refresh().await?;
    sessions::check(&hello, who.as_deref(), &shared.registry.workers())?;
    let worker_id = hello.worker_id.clone();
    let welcome = v1::WorkerWelcome {
        coordinator_id: shared.options.coordinator_id.clone(),
        lease_ttl_ms: u32::try_from(millis(shared.options.lease_ttl)).unwrap_or(u32::MAX),
    };
    tracing::info!(
        worker = worker_id,
        capacity = hello.capacity,
        models = ?hello.models.iter().map(|model| &model.name).collect::<Vec<_>>(),
        "worker attached"
    );
    let member = Member {
        kind: MemberKind::Worker.into(),
        id: worker_id.clone(),
        registration: uuid::Uuid::new_v4().to_string(),
        since_unix_ms: shared.clock.now(),
        models: hello.models,
        ..Member::default()
    };
    let key = member.key();
    shared.registry.join(member.clone()).await?;
    let mut state = shared.state.lock();
    let number = state.attach(member, hello.capacity as usize, outbox.clone(), close);
    // Under the lock: nothing is assigned before the welcome.
    state.send(number, Message::Welcome(welcome));
    Ok(Connection { number, worker_id, member: key })
}

/// Tells watchers of a step once more, with its preview, once that has passed its check.
async fn show(
    shared: Arc<Shared>,
    job_id: JobId,
    job: Arc<JobRecord>,
    step: v1::StepProgress,
    preview: v1::Preview,
) {
    if let Some(png) = shared.gate.preview(&job, preview).await {
        shared.events.progress(job_id, v1::StepProgress { preview_png: png.to_vec(), ..step });
    }
}

struct Connection {
    number: u64,
    worker_id: String,
    member: MemberKey,
}

impl Connection {
    async fn handle(&self, shared: &Arc<Shared>, message: Inbound) {
        let was_silent = shared
            .state
            .lock()
            .workers
            .get_mut(&self.number)
            .is_some_and(|worker| std::mem::take(&mut worker.silent));
        if was_silent {
            shared.wake.notify_one();
        }
        match message {
            Inbound::Hello(_) => {
                tracing::warn!(worker = self.worker_id, "second hello ignored");
            }
            Inbound::Renewal(renewal) => self.renew(shared, renewal).await,
            Inbound::Progress(progress) => self.progress(shared, progress),
            Inbound::Image(outcome) => self.image(shared, outcome).await,
            Inbound::Done(done) => self.done(shared, done.lease.as_ref()).await,
            Inbound::Failure(failure) => self.failure(shared, failure).await,
            Inbound::Draining(v1::WorkerDraining {}) => {
                tracing::info!(worker = self.worker_id, "worker takes no further shards");
                let drained = shared.state.lock().workers.get_mut(&self.number).map(|worker| {
                    worker.member.draining = true;
                    worker.member.clone()
                });
                if let Some(member) = drained
                    && let Err(error) = shared.registry.join(member).await
                {
                    tracing::warn!(worker = self.worker_id, %error, "cannot tell the cluster");
                }
            }
        }
    }

    fn send(&self, shared: &Shared, message: Message) {
        shared.state.lock().send(self.number, message);
    }

    /// The job of a lease that this connection holds and still works on.
    fn held<T>(
        &self,
        shared: &Shared,
        lease: Option<LeaseKey>,
        read: impl FnOnce(&mut Session) -> T,
    ) -> Option<T> {
        let mut state = shared.state.lock();
        let session = state.session(lease?, self.number)?;
        (!matches!(session.phase, SessionPhase::Stopping { .. })).then(|| read(session))
    }

    async fn renew(&self, shared: &Shared, renewal: v1::LeaseRenewal) {
        let mut by_job: HashMap<JobId, Vec<LeaseKey>> = HashMap::new();
        let mut reply = v1::LeaseRenewed::default();
        // It holds no more than it asked for.
        for lease in renewal.leases.into_iter().take(MAX_CAPACITY as usize) {
            let key = LeaseKey::from_proto(Some(&lease));
            match self.held(shared, key, |session| session.job_id).zip(key) {
                Some((job, key)) => by_job.entry(job).or_default().push(key),
                None => reply.lost.push(lease),
            }
        }
        for (job, leases) in by_job {
            let ttl_ms = millis(shared.options.lease_ttl);
            let renew = Transition::Renew { leases: leases.clone(), ttl_ms };
            let lost = match shared.apply(job, renew).await {
                Ok(applied) => match applied.effect {
                    Effect::Renewed { lost } => lost,
                    _ => Vec::new(),
                },
                Err(StoreError::UnknownJob(_)) => leases.clone(),
                // Unanswered: the worker renews again before the lease ends.
                Err(error) => {
                    tracing::error!(%job, %error, "cannot renew leases");
                    continue;
                }
            };
            for key in leases {
                if lost.contains(&key) {
                    shared.stop_session(key, "the lease was lost");
                    reply.lost.push(key.to_proto());
                } else {
                    reply.renewed.push(key.to_proto());
                }
            }
        }
        self.send(shared, Message::Renewed(reply));
    }

    fn progress(&self, shared: &Arc<Shared>, progress: v1::ShardProgress) {
        let lease = LeaseKey::from_proto(progress.lease.as_ref());
        let Some((job_id, job)) =
            self.held(shared, lease, |session| (session.job_id, Arc::clone(&session.job)))
        else {
            return;
        };
        let images = lease
            .and_then(|lease| job.shard(lease.shard))
            .map(|shard| shard.images())
            .unwrap_or_default();
        let mut steps = progress.steps;
        let probes = job.policy().concepts.len();
        steps.retain(|step| images.contains(&step.index) && bounds::progress(step, probes).is_ok());
        for step in &mut steps {
            // What a worker sends here is not looked at: previews come as pixels.
            step.preview_png.clear();
            shared.events.progress(job_id, step.clone());
        }
        for preview in progress.previews {
            let of =
                |step: &&v1::StepProgress| (step.index, step.step) == (preview.index, preview.step);
            let is_allowed = |session: &mut Session| {
                let left = session.previews_left.checked_sub(1);
                left.map(|left| session.previews_left = left).is_some()
            };
            if let Some(step) = steps.iter().find(of).cloned()
                && self.held(shared, lease, is_allowed) == Some(true)
            {
                tokio::spawn(show(Arc::clone(shared), job_id, Arc::clone(&job), step, preview));
            }
        }
    }

    async fn image(&self, shared: &Arc<Shared>, outcome: v1::ImageOutcome) {
        let lease = LeaseKey::from_proto(outcome.lease.as_ref());
        let Some(inbox) = self.held(shared, lease, |session| session.inbox.clone()) else {
            return;
        };
        if let (Err(_), Some(lease)) = (inbox.try_send(Input::Image(Box::new(outcome))), lease) {
            self.protocol_error(shared, lease, "sent more results than the shard has images").await;
        }
    }

    async fn done(&self, shared: &Arc<Shared>, lease: Option<&v1::LeaseRef>) {
        let Some(key) = LeaseKey::from_proto(lease) else {
            return self.reply(shared, lease, Err("the lease has no valid shard id".to_owned()));
        };
        let inbox = self.held(shared, Some(key), |session| {
            let first = session.phase == SessionPhase::Running;
            session.phase = SessionPhase::Committing;
            first.then(|| session.inbox.clone())
        });
        match inbox {
            // The shard's task answers after the checks.
            Some(Some(inbox)) => {
                if inbox.try_send(Input::Done).is_err() {
                    self.protocol_error(shared, key, "sent more than the shard has images").await;
                }
            }
            // Already committing: one answer is enough.
            Some(None) => {}
            None => {
                shared.remove_if_stopping(key, self.number);
                match settled(shared, key).await {
                    Ok(settled) => {
                        if let Err(reason) = &settled {
                            metrics::delivery("refused");
                            let worker = &self.worker_id;
                            tracing::info!(lease = %key, worker, reason, "late result refused");
                        }
                        self.reply(shared, lease, settled);
                    }
                    // Unanswered: that it was refused may be wrong. The worker's next renewal finds the
                    // lease gone.
                    Err(error) => tracing::error!(lease = %key, %error, "cannot look up a commit"),
                }
            }
        }
    }

    fn reply(&self, shared: &Shared, lease: Option<&v1::LeaseRef>, accepted: Result<(), String>) {
        let (status, reason) = match accepted {
            Ok(()) => (v1::CommitStatus::Accepted, String::new()),
            Err(reason) => (v1::CommitStatus::Aborted, reason),
        };
        let reply = v1::CommitReply { lease: lease.cloned(), status: status.into(), reason };
        self.send(shared, Message::Commit(reply));
    }

    async fn failure(&self, shared: &Arc<Shared>, failure: v1::ShardFailure) {
        let Some(lease) = LeaseKey::from_proto(failure.lease.as_ref()) else { return };
        if shared.remove_if_stopping(lease, self.number) {
            return;
        }
        let running = self.held(shared, Some(lease), |session| {
            (session.phase == SessionPhase::Running).then(|| {
                session.abort.cancel();
                (session.job_id, session.attempt)
            })
        });
        let Some(Some((job, attempt))) = running else { return };
        shared.remove_session(lease);
        if failure.handed_back {
            shared.give_back(job, lease).await;
            return;
        }
        let reason = match failure.reason.as_str() {
            "" => format!("worker {} gave no reason", self.worker_id),
            reason => format!("worker {}: {}", self.worker_id, bounds::text(reason)),
        };
        let delay_ms = shared.retry_delay_ms(attempt);
        let retryable = failure.retryable || failure.cancelled;
        shared.fail(job, lease, Failure { reason, retryable, delay_ms }).await;
    }

    async fn protocol_error(&self, shared: &Arc<Shared>, lease: LeaseKey, problem: &str) {
        let held = self.held(shared, Some(lease), |session| (session.job_id, session.attempt));
        let Some((job, attempt)) = held else { return };
        let reason = format!("worker {} {problem}", self.worker_id);
        shared.stop_session(lease, &reason);
        let delay_ms = shared.retry_delay_ms(attempt);
        shared.fail(job, lease, Failure { reason, retryable: true, delay_ms }).await;
    }

    /// Ends what the stream held: shards in work return to the queue at once; what was already
    /// sent in full is still checked and committed.
    async fn leave(&self, shared: &Arc<Shared>) {
        let mut returned = Vec::new();
        let closing = shared.closing.is_cancelled();
        // A worker whose renewals nobody took ends its stream itself.
        let is_blameless = closing || !shared.registry.is_settled(shared.options.lease_ttl);
        {
            let mut state = shared.state.lock();
            state.workers.remove(&self.number);
            let leases: Vec<_> = state.leases_of(self.number).collect();
            for lease in leases {
                let phase = state.sessions.get(&lease).map(|session| session.phase);
                if phase == Some(SessionPhase::Committing) && !closing {
                    continue;
                }
                if let Some(session) = state.sessions.remove(&lease) {
                    session.abort.cancel();
                    if !matches!(session.phase, SessionPhase::Stopping { .. }) {
                        returned.push((session.job_id, lease));
                    }
                }
            }
            shared.count_sessions(&state);
        }
        tracing::info!(worker = self.worker_id, shards = returned.len(), "worker left");
        if let Err(error) = shared.registry.leave(&self.member).await {
            tracing::warn!(worker = self.worker_id, %error, "its membership ends by itself");
        }
        for (job, lease) in returned {
            if is_blameless {
                shared.give_back(job, lease).await;
            } else {
                let reason = format!("worker {} went away", self.worker_id);
                let failure = Failure { reason, retryable: true, delay_ms: 0 };
                shared.fail(job, lease, failure).await;
            }
        }
        shared.wake.notify_one();
    }
}

impl Shared {
    /// Forgets a session whose worker confirms that it stopped.
    fn remove_if_stopping(&self, lease: LeaseKey, connection: u64) -> bool {
        let stopping = self
            .state
            .lock()
            .session(lease, connection)
            .is_some_and(|session| matches!(session.phase, SessionPhase::Stopping { .. }));
        if stopping {
            self.remove_session(lease);
        }
        stopping
    }

    pub(super) async fn give_back(&self, job: JobId, lease: LeaseKey) {
        match self.apply(job, Transition::GiveBack { lease }).await {
            // It has ended already.
            Ok(_) | Err(StoreError::Refused(_)) => {}
            Err(error) => {
                tracing::warn!(%job, %lease, %error, "shard returns to the queue when its lease ends");
            }
        }
    }
}

/// Whether a commit of a delivery that is not open here was accepted before, or why not. The same token
/// again is fine; any other is stale.
async fn settled(shared: &Shared, key: LeaseKey) -> Result<Result<(), String>, StoreError> {
    let id = key.shard.to_string();
    let unknown = || Ok(Err(format!("shard {id} is unknown")));
    let found = shared.store.find(Lookup::Shard(&id)).await?;
    let Some(job) = found.and_then(|found| found.job_id.parse().ok()) else { return unknown() };
    let record = shared.store.get(job).await?;
    let Some(lease) = record.as_ref().and_then(|r| r.shard(key.shard)).map(|shard| &shard.lease)
    else {
        return unknown();
    };
    if lease.phase() == Phase::Done && lease.token() == key.token {
        return Ok(Ok(()));
    }
    let (phase, token) = (lease.phase(), lease.token());
    Ok(Err(format!("token {} is stale: the shard is {phase:?} at token {token}", key.token)))
}
