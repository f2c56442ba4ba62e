//! The hosts of one run, the network between them, and the loop that moves time.

use std::{
    collections::BTreeMap,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::Duration,
};

use fairlead_common::{grpc::Channels, signature::Signer};
use object_store::memory::InMemory;
use parking_lot::Mutex;
use rand::{Rng, SeedableRng, rngs::StdRng};
use tokio_util::sync::CancellationToken;
use tonic::transport::Channel;
use turmoil::{Builder, Sim};

use super::{
    client,
    faults::Faults,
    model::Model,
    net, node,
    objects::Objects,
    store::{Database, SimulatedStore},
    worker,
};
use crate::{
    config::CoordinatorOptions,
    outputs::Outputs,
    server::serve_until,
    service::{Coordinator, Ground},
};

/// How far time moves at once; nothing on the network is faster.
const TICK: Duration = Duration::from_millis(5);
/// For how long things go wrong.
pub(super) const CHAOS: Duration = Duration::from_secs(45);
/// How long after that every job must have ended.
const PATIENCE: Duration = Duration::from_secs(150);
/// When the simulated world began, Unix milliseconds.
const EPOCH_MS: u64 = 1_750_000_000_000;
/// Deadline of every call.
const DEADLINE: Duration = Duration::from_secs(8);

const WORKERS: [&str; 3] = ["worker-1", "worker-2", "worker-3"];
const CLIENTS: [&str; 2] = ["client-1", "client-2"];
/// Each concept has two nodes.
const NODES: [(&str, &[&str]); 3] =
    [("node-1", &["axe", "bomb"]), ("node-2", &["bomb", "knife"]), ("node-3", &["knife", "axe"])];

/// Simulated time, the same for all hosts.
#[derive(Debug, Clone, Default)]
pub(super) struct Time(Arc<AtomicU64>);

impl Time {
    /// Since the world began.
    pub(super) fn elapsed(&self) -> Duration {
        // Between two ticks no host is at work.
        turmoil::sim_elapsed().unwrap_or(Duration::from_millis(self.0.load(Ordering::Relaxed)))
    }

    pub(super) fn unix_ms(&self) -> i64 {
        let elapsed = u64::try_from(self.elapsed().as_millis()).expect("a run is short");
        (EPOCH_MS + elapsed).cast_signed()
    }

    fn set(&self, elapsed: Duration) {
        let elapsed = u64::try_from(elapsed.as_millis()).expect("a run is short");
        self.0.store(elapsed, Ordering::Relaxed);
    }
}

/// What all hosts share, beside the network.
#[derive(Debug)]
pub(super) struct World {
    pub(super) model: Arc<Mutex<Model>>,
    pub(super) database: Arc<Database>,
    pub(super) time: Time,
    seed: u64,
    pub(super) objects: Arc<Objects>,
    signer: Signer,
    coordinators: Vec<&'static str>,
    healed: AtomicBool,
    /// Stops the coordinator of this name.
    shutdowns: Mutex<BTreeMap<String, CancellationToken>>,
    /// How often each host has started.
    lives: Mutex<BTreeMap<String, u64>>,
}

/// How a run ended.
pub(super) struct Run {
    pub(super) history: Vec<String>,
    /// Empty if everything held.
    pub(super) problems: Vec<String>,
    /// For people: what became of the images.
    pub(super) summary: String,
}

impl World {
    fn new(seed: u64) -> Arc<Self> {
        let mut rng = StdRng::seed_from_u64(seed);
        let time = Time::default();
        let stored = Arc::new(InMemory::new());
        let objects = Arc::new(Objects::new(Arc::clone(&stored), StdRng::from_rng(&mut rng)));
        let signer = Signer::generate();
        let model = Model::new(time.clone(), stored, signer.public());
        let model = Arc::new(Mutex::new(model));
        let coordinators: &[&str] = match rng.random_bool(0.6) {
            true => &["coordinator-1", "coordinator-2"],
            false => &["coordinator-1"],
        };
        let shared = coordinators.len() > 1;
        let database = Database::new(rng.random(), shared, Arc::clone(&model), time.clone());
        Arc::new(Self {
            model,
            database: Arc::new(database),
            time,
            seed,
            objects,
            signer,
            coordinators: coordinators.to_vec(),
            healed: AtomicBool::new(false),
            shutdowns: Mutex::default(),
            lives: Mutex::default(),
        })
    }

    pub(super) fn note(&self, what: impl AsRef<str>) {
        self.model.lock().note(what);
    }

    /// Whether this is a run in which all but coordinators work: then no job may fail.
    pub(super) fn only_coordinators_die(&self) -> bool {
        self.seed % 8 == 7
    }

    /// Whether nothing goes wrong any longer.
    pub(super) fn is_healed(&self) -> bool {
        self.healed.load(Ordering::Relaxed)
    }

    /// Randomness of a host's own, other in each of its lives.
    pub(super) fn rng(&self, host: &str) -> StdRng {
        let mut lives = self.lives.lock();
        let life = lives.entry(host.to_owned()).or_default();
        *life += 1;
        let name = host.bytes().fold(*life, |hash, byte| hash.wrapping_mul(31) + u64::from(byte));
        StdRng::seed_from_u64(self.seed ^ name.wrapping_mul(0x9e37_79b9_7f4a_7c15))
    }

    pub(super) fn coordinators(&self) -> &[&'static str] {
        &self.coordinators
    }

    /// A channel to any coordinator.
    pub(super) fn any_coordinator(&self, rng: &mut StdRng) -> Channel {
        let host = self.coordinators[rng.random_range(0..self.coordinators.len())];
        self.channel(&net::address(host))
    }

    pub(super) fn channel(&self, address: &str) -> Channel {
        net::channel(address, DEADLINE).expect("hosts have good names")
    }

    /// Asks a coordinator to stop, as a signal does.
    pub(super) fn shut_down(&self, host: &str) {
        if let Some(shutdown) = self.shutdowns.lock().get(host) {
            shutdown.cancel();
        }
    }

    /// A coordinator and what starts it again.
    async fn keep_coordinator(self: Arc<Self>, host: &'static str) -> turmoil::Result {
        loop {
            match self.coordinator(host).await {
                Ok(()) => self.note(format!("{host}: stopped")),
                Err(error) => self.note(format!("{host}: cannot start: {error}")),
            }
            tokio::time::sleep(Duration::from_millis(700)).await;
        }
    }

    async fn coordinator(&self, host: &'static str) -> crate::Result<()> {
        let shutdown = CancellationToken::new();
        self.shutdowns.lock().insert(host.to_owned(), shutdown.clone());
        let options = CoordinatorOptions {
            coordinator_id: host.to_owned(),
            lease_ttl: Duration::from_secs(6),
            node_ttl: Duration::from_secs(5),
            check_timeout: Duration::from_secs(3),
            retry_delay: Duration::from_millis(500),
            max_wait: Duration::from_secs(40),
            drain_timeout: Duration::from_secs(2),
            ..CoordinatorOptions::default()
        };
        let timeout = options.check_timeout;
        let ground = Ground {
            store: Arc::new(SimulatedStore(Arc::clone(&self.database))),
            outputs: Outputs::new(self.objects.clone()),
            signer: self.signer.clone(),
            channels: Channels::made_by(move |node| net::channel(&node.address, timeout)),
        };
        let coordinator = Coordinator::start_on(ground, options.clone()).await?;
        let incoming = net::incoming().await.expect("the port is free on a host of its own");
        self.note(format!("{host}: serves"));
        serve_until(incoming, coordinator, options, shutdown).await
    }

    fn build(self: &Arc<Self>) -> Sim<'static> {
        let mut sim = Builder::new()
            .rng_seed(self.seed)
            .epoch(std::time::UNIX_EPOCH + Duration::from_millis(EPOCH_MS))
            .simulation_duration(10 * (CHAOS + PATIENCE))
            .tick_duration(TICK)
            .min_message_latency(Duration::from_millis(1))
            .max_message_latency(Duration::from_millis(40))
            .tcp_capacity(4_096)
            .enable_random_order()
            .build();
        for &host in &self.coordinators {
            let world = Arc::clone(self);
            sim.host(host, move || Arc::clone(&world).keep_coordinator(host));
        }
        for (host, concepts) in NODES {
            let world = Arc::clone(self);
            sim.host(host, move || node::run(Arc::clone(&world), host, concepts));
        }
        for host in WORKERS {
            let world = Arc::clone(self);
            sim.host(host, move || worker::run(Arc::clone(&world), host));
        }
        for host in CLIENTS {
            sim.client(host, client::run(Arc::clone(self), host));
        }
        sim
    }

    /// Everybody but the clients and the coordinators.
    pub(super) fn servants() -> Vec<&'static str> {
        NODES.iter().map(|(host, _)| *host).chain(WORKERS).collect()
    }

    /// Everybody.
    pub(super) fn hosts(&self) -> Vec<&'static str> {
        self.coordinators.iter().copied().chain(Self::servants()).chain(CLIENTS).collect()
    }

    /// Moves time until everything has ended, something is wrong, or patience is over.
    fn play(&self, sim: &mut Sim<'_>) {
        let mut faults = Faults::new(StdRng::seed_from_u64(!self.seed));
        loop {
            let finished = match sim.step() {
                Ok(finished) => finished,
                Err(error) => return self.model.lock().broken(format!("a host failed: {error}")),
            };
            self.time.set(sim.elapsed());
            match sim.elapsed() < CHAOS {
                true => faults.tick(sim, self),
                false if !self.healed.swap(true, Ordering::Relaxed) => faults.heal(sim, self),
                false => {}
            }
            let mut model = self.model.lock();
            if self.only_coordinators_die() {
                model.none_may_fail();
            }
            super::panics().into_iter().for_each(|panic| model.broken(panic));
            if !model.problems().is_empty() || (finished && model.open_jobs().is_empty()) {
                return;
            }
            if sim.elapsed() > CHAOS + PATIENCE {
                model.late(PATIENCE);
                return;
            }
        }
    }
}

/// The run of `seed`, from its first to its last moment.
pub(super) fn run(seed: u64) -> Run {
    let world = World::new(seed);
    let mut sim = world.build();
    world.play(&mut sim);
    let model = world.model.lock();
    let (seconds, n) = (world.time.elapsed().as_secs(), world.coordinators.len());
    let summary = format!("{n} coordinators, {seconds} s, {:?}", model.tally());
    Run { history: model.history().to_vec(), problems: model.problems().to_vec(), summary }
}
