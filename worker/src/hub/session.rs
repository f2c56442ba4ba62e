//! One attachment, from hello to the end of the stream.

use std::{
    collections::BTreeMap,
    time::{Duration, Instant},
};

use fairlead_common::{grpc::Replicas, trace};
use fairlead_proto::{
    PROTOCOL_VERSION,
    v1::{
        AttachResponse, CommitReply, CommitStatus, EnergyEndpoint, LeaseRef, LeaseRenewal,
        LeaseRenewed, ShardAssignment, ShardFailure, WorkerDraining, WorkerHello,
        attach_request::Message, attach_response::Message as Reply,
        worker_service_client::WorkerServiceClient,
    },
};
use tokio::{
    runtime::Handle,
    sync::watch,
    task::JoinSet,
    time::{MissedTickBehavior, interval, sleep_until, timeout},
};
use tokio_util::sync::CancellationToken;
use tonic::{Status, Streaming};
use tracing::Instrument;

use super::{
    HANDSHAKE, Hub,
    outbox::{Closed, Outbox},
    work::{Control, Outcome, Stop, Work},
};
use crate::{energy::PoolOptions, error::Error};

/// Time for the last messages to leave after the drain's deadline.
const FLUSH: Duration = Duration::from_secs(5);

/// Why a draining worker takes nothing.
pub(super) const LEAVING: &str = "the worker is leaving";

/// How an attachment ended.
pub(super) enum Ended {
    /// After the stop signal, with nothing left to do.
    Drained,
    /// The stream broke or was refused.
    Broken(Status),
    /// The process must end.
    Fatal(Error),
}

impl From<Status> for Ended {
    fn from(status: Status) -> Self {
        Self::Broken(status)
    }
}

impl From<Closed> for Ended {
    fn from(_: Closed) -> Self {
        Self::Broken(Status::unavailable("the coordinator no longer reads"))
    }
}

/// A shard that this worker holds.
struct Held {
    lease: LeaseRef,
    control: Control,
    endpoints: watch::Sender<Vec<EnergyEndpoint>>,
    /// What makes it.
    task: tokio::task::Id,
}

/// One attachment to the coordinator.
pub(super) struct Session<'a> {
    hub: &'a Hub,
    outbox: Outbox,
    inbound: Streaming<AttachResponse>,
    ttl: Duration,
    /// When a renewal was last confirmed.
    confirmed: Instant,
    held: BTreeMap<String, Held>,
    /// Shards' tasks; each ends with its lease.
    work: JoinSet<(LeaseRef, Outcome)>,
    draining: bool,
    /// Why the process must end.
    fatal: Option<Error>,
}

impl<'a> Session<'a> {
    /// Says hello and waits for the welcome.
    pub(super) async fn open(
        hub: &'a Hub,
        mut client: WorkerServiceClient<Replicas>,
        shutdown: &CancellationToken,
    ) -> Result<Self, Ended> {
        let (outbox, outbound) = Outbox::new();
        outbox.control(Message::Hello(WorkerHello {
            worker_id: hub.options.worker_id.clone(),
            protocol_version: PROTOCOL_VERSION,
            models: hub.engines.iter().map(|engine| engine.info().clone()).collect(),
            capacity: hub.options.capacity,
        }))?;
        let handshake = async {
            let mut inbound = client.attach(outbound).await?.into_inner();
            let first = inbound.message().await?;
            Ok::<_, Status>((inbound, first.and_then(|response| response.message)))
        };
        let (inbound, first) = tokio::select! {
            () = shutdown.cancelled() => return Err(Ended::Drained),
            opened = timeout(HANDSHAKE, handshake) => {
                opened.map_err(|_| Status::deadline_exceeded("no welcome in time"))??
            }
        };
        match first {
            Some(Reply::Welcome(welcome)) if welcome.lease_ttl_ms > 0 => Ok(Self {
                hub,
                outbox,
                inbound,
                ttl: Duration::from_millis(welcome.lease_ttl_ms.into()),
                confirmed: Instant::now(),
                held: BTreeMap::new(),
                work: JoinSet::new(),
                draining: false,
                fatal: None,
            }),
            other => Err(Status::internal(format!("expected a welcome, got {other:?}")).into()),
        }
    }

    /// Serves until the stream ends or, after the stop signal, all work is done or handed back.
    /// Whatever still runs then is dropped with its leases.
    pub(super) async fn serve(mut self, shutdown: &CancellationToken) -> Ended {
        let ended = match self.exchange(shutdown).await {
            Ok(()) => self.leave().await,
            Err(ended) => ended,
        };
        let ended = self.fatal.take().map_or(ended, Ended::Fatal);
        for held in self.held.values() {
            held.control.stop(Stop::Lost);
        }
        ended
    }

    async fn exchange(&mut self, shutdown: &CancellationToken) -> Result<(), Ended> {
        let mut renewal = interval(self.ttl / 3);
        renewal.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut deadline = tokio::time::Instant::now();
        while !(self.draining && self.held.is_empty()) && self.fatal.is_none() {
            tokio::select! {
                reply = self.inbound.message() => match reply? {
                    Some(AttachResponse { message: Some(reply) }) => self.handle(reply)?,
                    Some(AttachResponse { message: None }) => {}
                    None => return Err(Status::unavailable("the coordinator ended it").into()),
                },
                Some(ended) = self.work.join_next() => self.settle(ended)?,
                _ = renewal.tick() => self.renew(Instant::now())?,
                () = shutdown.cancelled(), if !self.draining => {
                    self.drain()?;
                    deadline = tokio::time::Instant::now() + self.hub.options.drain_timeout;
                }
                () = sleep_until(deadline), if self.draining => {
                    tracing::warn!(shards = self.held.len(), "out of time, handing back");
                    self.held.values().for_each(|held| held.control.stop(Stop::HandedBack));
                    return Ok(());
                }
            }
        }
        Ok(())
    }

    fn handle(&mut self, reply: Reply) -> Result<(), Ended> {
        match reply {
            Reply::Welcome(_) => tracing::warn!("a second welcome"),
            Reply::Assignment(assignment) => self.assign(assignment)?,
            Reply::Cancel(cancel) => match self.current(cancel.lease.as_ref()) {
                Some(held) => held.control.stop(Stop::Cancelled(cancel.reason)),
                // It ended here already: confirm, so that the coordinator need not wait.
                None => self.outbox.control(Message::Failure(ShardFailure {
                    lease: cancel.lease,
                    reason: cancel.reason,
                    retryable: false,
                    cancelled: true,
                    handed_back: false,
                }))?,
            },
            Reply::Renewed(renewed) => self.renewed(&renewed),
            Reply::Commit(commit) => self.committed(&commit),
            Reply::Nodes(update) => {
                if let Some(held) = self.held.get(&update.shard_id) {
                    held.endpoints.send_replace(update.energies);
                }
            }
        }
        Ok(())
    }

    /// The shard that `lease` names, if it is still held under that token.
    fn current(&self, lease: Option<&LeaseRef>) -> Option<&Held> {
        let lease = lease?;
        self.held.get(&lease.shard_id).filter(|held| held.lease.token == lease.token)
    }

    fn assign(&mut self, assignment: ShardAssignment) -> Result<(), Ended> {
        let lease = assignment.lease.clone().unwrap_or_default();
        let model = assignment.spec.as_ref().map_or("", |spec| &spec.model);
        let engine = self.hub.engines.iter().find(|engine| engine.info().name == model);
        let full = self.held.len() >= self.hub.options.capacity as usize;
        let refusal = match engine {
            _ if self.draining => LEAVING.to_owned(),
            _ if full && !self.held.contains_key(&lease.shard_id) => {
                format!("the worker holds {} shards, all it takes", self.held.len())
            }
            None => format!("the worker does not serve model `{model}`"),
            Some(engine) => {
                self.start(lease, assignment, engine.clone());
                return Ok(());
            }
        };
        let failure = ShardFailure {
            lease: Some(lease),
            reason: refusal,
            retryable: true,
            cancelled: false,
            handed_back: self.draining,
        };
        Ok(self.outbox.control(Message::Failure(failure))?)
    }

    fn start(
        &mut self,
        lease: LeaseRef,
        mut assignment: ShardAssignment,
        engine: crate::engine::EngineHandle,
    ) {
        let (endpoints, receiver) = watch::channel(std::mem::take(&mut assignment.energies));
        let control = Control::default();
        let work = Work {
            lease: lease.clone(),
            engine,
            pool: PoolOptions {
                runtime: Handle::current(),
                channels: self.hub.channels.clone(),
                timeout: self.hub.options.energy_timeout,
                traceparent: assignment.traceparent.clone(),
            },
            assignment,
            endpoints: receiver,
            outbox: self.outbox.clone(),
            control: control.clone(),
        };
        let images = work.assignment.images.len() as i64;
        let span = tracing::info_span!("shard", shard = %lease.shard_id, images);
        trace::follow(&span, &work.assignment.traceparent);
        let ended = lease.clone();
        let task = self.work.spawn(async move { (ended, work.run().await) }.instrument(span)).id();
        let held = Held { lease: lease.clone(), control, endpoints, task };
        if let Some(older) = self.held.insert(lease.shard_id, held) {
            older.control.stop(Stop::Lost);
        }
    }

    /// A shard's task ended: without a commit to wait for the lease is over.
    fn settle(
        &mut self,
        ended: Result<(LeaseRef, Outcome), tokio::task::JoinError>,
    ) -> Result<(), Ended> {
        match ended {
            Ok((_, Outcome::Committing)) => {}
            Ok((lease, outcome)) => {
                if self.current(Some(&lease)).is_some() {
                    self.held.remove(&lease.shard_id);
                }
                if let Outcome::Fatal(error) = outcome {
                    tracing::error!(%error, shards = self.held.len(), "ending; others are handed back");
                    self.held.values().for_each(|held| held.control.stop(Stop::HandedBack));
                    self.fatal = Some(error);
                }
            }
            Err(error) => {
                tracing::error!("a shard's task failed: {error}");
                let held = self.held.values().find(|held| held.task == error.id());
                if let Some(lease) = held.map(|held| held.lease.clone()) {
                    // Renewed no longer, or nobody else would ever get it.
                    self.held.remove(&lease.shard_id);
                    self.outbox.control(Message::Failure(ShardFailure {
                        lease: Some(lease),
                        reason: format!("the worker is broken: {error}"),
                        retryable: true,
                        cancelled: false,
                        handed_back: false,
                    }))?;
                }
            }
        }
        Ok(())
    }

    /// Renews every lease; if renewals have gone unconfirmed for a whole lease, all are lost.
    fn renew(&mut self, now: Instant) -> Result<(), Ended> {
        if self.held.is_empty() {
            self.confirmed = now;
            return Ok(());
        }
        if now.duration_since(self.confirmed) > self.ttl {
            return Err(Status::deadline_exceeded("renewals are not confirmed").into());
        }
        let leases = self.held.values().map(|held| held.lease.clone()).collect();
        Ok(self.outbox.control(Message::Renewal(LeaseRenewal { leases }))?)
    }

    fn renewed(&mut self, renewed: &LeaseRenewed) {
        self.confirmed = Instant::now();
        for lease in &renewed.lost {
            if let Some(held) = self.current(Some(lease)) {
                tracing::warn!(shard = %lease.shard_id, "lease lost, dropping the work");
                held.control.stop(Stop::Lost);
                self.held.remove(&lease.shard_id);
            }
        }
    }

    fn committed(&mut self, commit: &CommitReply) {
        let Some(held) = self.current(commit.lease.as_ref()) else { return };
        let shard = held.lease.shard_id.clone();
        match commit.status() {
            CommitStatus::Accepted => tracing::info!(%shard, "committed"),
            status => tracing::warn!(%shard, ?status, "not accepted: {}", commit.reason),
        }
        held.control.stop(Stop::Lost);
        self.held.remove(&shard);
    }

    /// Takes no more shards and hands back those that have not begun.
    fn drain(&mut self) -> Result<(), Ended> {
        self.draining = true;
        tracing::info!(shards = self.held.len(), "draining");
        for held in self.held.values().filter(|held| !held.control.has_begun()) {
            held.control.stop(Stop::HandedBack);
        }
        Ok(self.outbox.control(Message::Draining(WorkerDraining {}))?)
    }

    /// Lets the last messages leave and the coordinator end the stream.
    async fn leave(&mut self) -> Ended {
        let (unused, _) = Outbox::new();
        drop(std::mem::replace(&mut self.outbox, unused));
        let rest = async {
            while self.work.join_next().await.is_some() {}
            while let Ok(Some(_)) = self.inbound.message().await {}
        };
        let _ = timeout(FLUSH, rest).await;
        Ended::Drained
    }
}
