//! What the hub knows about attached workers and the shards they hold.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

use fairlead_common::ids::JobId;
use fairlead_proto::{
    PROTOCOL_VERSION,
    v1::{self, attach_response::Message},
};
use tokio::{sync::mpsc, time::Instant};
use tokio_util::sync::CancellationToken;
use tonic::Status;

use super::session::Input;
use crate::{
    error::{Error, Result},
    lease::LeaseKey,
    placement::Candidate,
    registry::Reservation,
    state::{JobRecord, QueueName},
    store::Member,
};

/// Most shards a worker may ask to hold at once.
const MAX_CAPACITY: u32 = 1_024;

/// An attached worker.
#[derive(Debug)]
pub(super) struct Worker {
    /// What the whole cluster knows of it.
    pub(super) member: Member,
    pub(super) capacity: usize,
    /// It let a lease expire and has not said anything since.
    pub(super) silent: bool,
    pub(super) outbox: mpsc::Sender<Result<v1::AttachResponse, Status>>,
    /// Ends its stream.
    pub(super) close: CancellationToken,
}

/// How far a delivery is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum SessionPhase {
    /// The worker works on it.
    Running,
    /// The worker has sent everything; the coordinator checks and commits.
    Committing,
    /// It has ended and the worker was told to stop; forgotten at `until`.
    Stopping {
        /// By the steady clock.
        until: Instant,
    },
}

/// One delivery of a shard to a worker.
#[derive(Debug)]
pub(super) struct Session {
    pub(super) job_id: JobId,
    pub(super) job: Arc<JobRecord>,
    pub(super) connection: u64,
    pub(super) phase: SessionPhase,
    pub(super) inbox: mpsc::Sender<Input>,
    pub(super) abort: CancellationToken,
    /// Nodes that the worker was told of, in the order in which they are asked.
    pub(super) endpoints: Vec<v1::EnergyEndpoint>,
    pub(super) reservation: Reservation,
    /// Deliveries so far, this one included.
    pub(super) attempt: u32,
    /// Previews that the worker may yet have checked.
    pub(super) previews_left: u32,
}

#[derive(Debug, Default)]
pub(super) struct State {
    next_connection: u64,
    pub(super) workers: BTreeMap<u64, Worker>,
    pub(super) sessions: BTreeMap<LeaseKey, Session>,
}

impl State {
    /// Adds a worker under a new connection number. A worker that comes back under its name
    /// replaces its old stream, which cannot be alive any longer.
    pub(super) fn attach(
        &mut self,
        member: Member,
        capacity: usize,
        outbox: mpsc::Sender<Result<v1::AttachResponse, Status>>,
        close: CancellationToken,
    ) -> u64 {
        for old in self.workers.values().filter(|worker| worker.member.id == member.id) {
            tracing::warn!(worker = member.id, "worker attached again; its old stream ends");
            old.close.cancel();
        }
        let connection = self.next_connection;
        self.next_connection += 1;
        let silent = false;
        self.workers.insert(connection, Worker { member, capacity, silent, outbox, close });
        connection
    }

    /// Queues a message for a worker. A worker that does not read is cut off; `false` if it is not
    /// attached any longer.
    pub(super) fn send(&self, connection: u64, message: Message) -> bool {
        let Some(worker) = self.workers.get(&connection) else { return false };
        let sent = worker.outbox.try_send(Ok(v1::AttachResponse { message: Some(message) }));
        if let Err(error) = &sent {
            tracing::warn!(worker = worker.member.id, %error, "worker does not read its stream");
            worker.close.cancel();
        }
        sent.is_ok()
    }

    /// Sessions of one connection.
    pub(super) fn leases_of(&self, connection: u64) -> impl Iterator<Item = LeaseKey> + '_ {
        let mine = move |(_, session): &(&LeaseKey, &Session)| session.connection == connection;
        self.sessions.iter().filter(mine).map(|(lease, _)| *lease)
    }

    /// The session of `lease` if `connection` holds it.
    pub(super) fn session(&mut self, lease: LeaseKey, connection: u64) -> Option<&mut Session> {
        self.sessions.get_mut(&lease).filter(|session| session.connection == connection)
    }

    /// The workers that take shards of `queue`.
    pub(super) fn candidates(&self, queue: &QueueName) -> Vec<Candidate> {
        let takes = |Worker { member, silent, .. }: &Worker| {
            !silent && !member.draining && member.models.iter().any(|model| queue.is_of(model))
        };
        let mut leases: BTreeMap<u64, usize> = BTreeMap::new();
        for session in self.sessions.values() {
            *leases.entry(session.connection).or_default() += 1;
        }
        let takers = self.workers.iter().filter(|(_, worker)| takes(worker));
        let candidate = |(&connection, worker): (&u64, &Worker)| Candidate {
            connection,
            capacity: worker.capacity,
            leases: leases.get(&connection).copied().unwrap_or_default(),
        };
        takers.map(candidate).collect()
    }
}

/// Whether a worker may attach beside the `others` of the cluster.
pub(super) fn check(hello: &v1::WorkerHello, others: &[Arc<Member>]) -> Result<()> {
    check_hello(hello)?;
    others
        .iter()
        .filter(|worker| worker.id != hello.worker_id)
        .try_for_each(|worker| check_same_models(worker, hello))
}

fn check_hello(hello: &v1::WorkerHello) -> Result<()> {
    if hello.protocol_version != PROTOCOL_VERSION {
        return Err(Error::Incompatible(format!(
            "worker `{}` speaks protocol {}, this coordinator {PROTOCOL_VERSION}; run the same \
             release on both",
            hello.worker_id, hello.protocol_version
        )));
    }
    if hello.worker_id.is_empty() || hello.worker_id.len() > 128 {
        return Err(Error::invalid("hello.worker_id", "must have 1 to 128 characters"));
    }
    if !(1..=MAX_CAPACITY).contains(&hello.capacity) {
        let problem = format!("is {}; it must be from 1 to {MAX_CAPACITY}", hello.capacity);
        return Err(Error::invalid("hello.capacity", problem));
    }
    if hello.models.is_empty() {
        return Err(Error::invalid("hello.models", "is empty; a worker has one model at least"));
    }
    let mut names = BTreeSet::new();
    for model in &hello.models {
        check_model(model)?;
        if !names.insert(&model.name) {
            return Err(Error::invalid("hello.models", format!("`{}` twice", model.name)));
        }
    }
    Ok(())
}

fn check_model(model: &v1::ModelInfo) -> Result<()> {
    let missing = [
        ("name", model.name.is_empty()),
        ("hash", model.hash.is_empty()),
        ("sampler", model.sampler.is_empty()),
        ("granularity", model.granularity == 0),
        ("max_side", model.max_side < model.granularity),
        ("max_batch", model.max_batch == 0),
    ];
    match missing.iter().find(|(_, missing)| *missing) {
        None => Ok(()),
        Some((field, _)) => {
            let problem = format!("`{}` has no usable {field}", model.name);
            Err(Error::invalid("hello.models", problem))
        }
    }
}

/// One name means one generator: two workers must not make different images for it.
fn check_same_models(worker: &Member, hello: &v1::WorkerHello) -> Result<()> {
    for model in &hello.models {
        let other = worker.models.iter().find(|other| other.name == model.name);
        if let Some(other) =
            other.filter(|other| (&other.hash, &other.sampler) != (&model.hash, &model.sampler))
        {
            return Err(Error::Incompatible(format!(
                "model `{}` of worker `{}` has hash {} and sampler {}, but worker `{}` serves \
                 hash {} and sampler {} under that name; give one of them another name",
                model.name,
                hello.worker_id,
                model.hash,
                model.sampler,
                worker.id,
                other.hash,
                other.sampler
            )));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use fairlead_fuzz::{bounded, fuzz, spoiled};
    use prost::Message as _;

    #[test]
    fn spoiled_hellos_are_sound_or_refused_by_field() {
        let model = |name: &str| v1::ModelInfo {
            name: name.into(),
            hash: "abc".into(),
            sampler: "ddim".into(),
            granularity: 8,
            max_side: 64,
            max_batch: 4,
            ..Default::default()
        };
        let valid = v1::WorkerHello {
            worker_id: "w".into(),
            protocol_version: PROTOCOL_VERSION,
            models: vec![model("sd"), model("sd3")],
            capacity: 2,
        };
        check(&valid, &[]).expect("it may attach");
        let other = Member { id: "other".into(), models: vec![model("sd")], ..Member::default() };
        let others = [Arc::new(other)];
        fuzz(spoiled(valid.encode_to_vec()), |bytes| {
            let Ok(hello) = v1::WorkerHello::decode(&*bytes) else { return };
            match bounded(bytes.len(), || check(&hello, &others)) {
                Ok(()) => {
                    assert!((1..=MAX_CAPACITY).contains(&hello.capacity));
                    let sound = |model: &v1::ModelInfo| {
                        model.max_side >= model.granularity && model.max_batch > 0
                    };
                    assert!(hello.models.iter().all(sound) && !hello.models.is_empty());
                }
                Err(Error::Invalid { field, .. }) => {
                    assert!(field.starts_with("hello."), "{field}")
                }
                Err(error) => assert!(matches!(error, Error::Incompatible(_)), "{error}"),
            }
        });
    }
}
