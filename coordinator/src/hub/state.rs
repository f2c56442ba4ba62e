//! What the hub knows about attached workers and the shards they hold.

use std::{collections::BTreeMap, sync::Arc};

use fairlead_common::{
    bounds::{self, MAX_CAPACITY},
    identity::Identity,
    ids::JobId,
};
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
    registry::{Reservation, model_key},
    state::{JobRecord, QueueName},
    store::Member,
};

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

/// Whether a worker may attach. `who` has shown a certificate; the `others` of the cluster are there.
/// Another description under a name that is taken is another model ([`crate::registry::Registry::models`]):
/// nobody keeps a worker out by being first.
pub(super) fn check(
    hello: &v1::WorkerHello,
    who: Option<&Identity>,
    others: &[Arc<Member>],
) -> Result<()> {
    let invalid = |field| move |problem: String| Error::invalid(field, problem);
    bounds::path(&hello.worker_id).map_err(invalid("hello.worker_id"))?;
    if hello.protocol_version != PROTOCOL_VERSION {
        return Err(Error::Incompatible(format!(
            "worker `{}` speaks protocol {}, this coordinator {PROTOCOL_VERSION}; run the same \
             release on both",
            hello.worker_id, hello.protocol_version
        )));
    }
    if let Some(who) = who.filter(|who| !who.may_be(&hello.worker_id)) {
        return Err(Error::Forbidden(format!(
            "hello.worker_id: `{}` is not who the certificate is for, {who}; leave out --worker-id, or call it \
             `{name}` or `{name}/PART`",
            hello.worker_id,
            name = who.name
        )));
    }
    if !(1..=MAX_CAPACITY).contains(&hello.capacity) {
        let problem = format!("is {}; it must be from 1 to {MAX_CAPACITY}", hello.capacity);
        return Err(Error::invalid("hello.capacity", problem));
    }
    bounds::models(&hello.models).map_err(invalid("hello.models"))?;
    let same = |model: &v1::ModelInfo, other: &v1::ModelInfo| {
        model.name == other.name && model_key(model) != model_key(other)
    };
    for worker in others.iter().filter(|worker| worker.id != hello.worker_id) {
        let differs = |model: &&v1::ModelInfo| worker.models.iter().any(|other| same(model, other));
        if let Some(model) = hello.models.iter().find(differs) {
            tracing::warn!(
                worker = hello.worker_id,
                model = model.name,
                hash = model.hash,
                other = worker.id,
                "two workers have different models of one name"
            );
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
        check(&valid, None, &[]).expect("it may attach");
        fuzz(spoiled(valid.encode_to_vec()), |bytes| {
            let Ok(hello) = v1::WorkerHello::decode(&*bytes) else { return };
            match bounded(bytes.len(), || check(&hello, None, &[])) {
                Ok(()) => {
                    assert!((1..=MAX_CAPACITY).contains(&hello.capacity));
                    let sound = |model: &v1::ModelInfo| {
                        model.max_side >= model.granularity && model.max_batch > 0
                    };
                    assert!(bounds::is_path(&hello.worker_id));
                    assert!(hello.models.iter().all(sound) && !hello.models.is_empty());
                }
                Err(Error::Invalid { field, .. }) => {
                    assert!(field.starts_with("hello."), "{field}")
                }
                Err(error) => assert!(matches!(error, Error::Incompatible(_)), "{error}"),
            }
        });
    }

    #[test]
    fn a_worker_is_called_as_its_certificate() {
        let (certificate, _) = fairlead_common::testing::Authority::new()
            .certificate(&["fairlead://worker/worker-1"], &[]);
        let who = Identity::of(&certificate).expect("it is right");
        let hello = |id: &str| v1::WorkerHello {
            worker_id: id.into(),
            protocol_version: PROTOCOL_VERSION,
            models: vec![v1::ModelInfo {
                name: "sd".into(),
                hash: "abc".into(),
                sampler: "ddim".into(),
                granularity: 8,
                max_side: 64,
                max_batch: 4,
                ..Default::default()
            }],
            capacity: 2,
        };
        for good in ["worker-1", "worker-1/2"] {
            check(&hello(good), Some(&who), &[]).expect(good);
        }
        for bad in ["worker-2", "worker-10", "worker"] {
            let error = check(&hello(bad), Some(&who), &[]).expect_err(bad).to_string();
            assert!(error.contains("not who the certificate is for, worker `worker-1`"), "{error}");
        }
        let error = check(&hello("w\u{1b}c"), None, &[]).expect_err("control").to_string();
        assert!(error.contains("hello.worker_id: `w\\u{1b}c` must be"), "{error}");
        let many = v1::WorkerHello { models: vec![Default::default(); 65], ..hello("worker-1") };
        check(&many, None, &[]).expect_err("too many models");
    }
}
