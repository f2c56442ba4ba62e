//! What goes wrong, and when: drawn from the seed, and healed at the end.

use std::time::Duration;

use rand::{Rng, rngs::StdRng, seq::IndexedRandom};
use turmoil::Sim;

use super::{
    store::Weather,
    world::{CHAOS, World},
};

const YEAR_MS: i64 = 365 * 24 * 3_600_000;

/// Something that is wrong for a while.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Fault {
    /// A host is dead.
    Dead(&'static str),
    /// Nothing gets from one host to the other, or back.
    Apart(&'static str, &'static str),
    /// Nothing gets from the first host to the second; the way back is open.
    OneWay(&'static str, &'static str),
    /// What is sent between them arrives at the end, all at once.
    Held(&'static str, &'static str),
    /// What is sent between them takes long.
    Far(&'static str, &'static str),
    StoreAway,
    StoreSlow,
    StoreLossy,
    StoreDeaf,
    /// The store's clock is a year ahead.
    StoreAhead,
    /// Images and records cannot always be written or read.
    ObjectsFail,
}

/// The faults of one run.
pub(super) struct Faults {
    rng: StdRng,
    next: Duration,
    active: Vec<(Duration, Fault)>,
}

impl Faults {
    pub(super) fn new(rng: StdRng) -> Self {
        // First everybody finds everybody.
        Self { rng, next: Duration::from_secs(2), active: Vec::new() }
    }

    /// Ends what is over and begins what is due.
    pub(super) fn tick(&mut self, sim: &mut Sim<'_>, world: &World) {
        let now = sim.elapsed();
        let (over, active) = self.active.drain(..).partition(|(end, _)| *end <= now);
        self.active = active;
        over.into_iter().for_each(|(_, fault): (_, Fault)| fault.end(sim, world));
        if now < self.next {
            return;
        }
        if world.only_coordinators_die() {
            self.next = now + Duration::from_millis(self.rng.random_range(300..1_500));
            return self.end_a_coordinator(sim, world);
        }
        self.next = now + Duration::from_millis(self.rng.random_range(300..4_000));
        match self.rng.random_range(0..100) {
            0..6 => {
                let host = self.pick(world.coordinators());
                world.note(format!("fault: {host} is asked to stop"));
                world.shut_down(host);
            }
            6..12 if world.coordinators().len() > 1 => {
                let lost = world.database.lose_queues();
                world.note(format!("fault: the queues lose {lost} shards"));
            }
            _ => self.begin(sim, world),
        }
    }

    /// Ends everything.
    pub(super) fn heal(&mut self, sim: &mut Sim<'_>, world: &World) {
        self.active.drain(..).for_each(|(_, fault)| fault.end(sim, world));
        world.note("everything is healed");
    }

    fn pick<T: Copy>(&mut self, from: &[T]) -> T {
        *from.choose(&mut self.rng).expect("there are some")
    }

    /// Kills a coordinator for a moment, or asks it to stop.
    fn end_a_coordinator(&mut self, sim: &mut Sim<'_>, world: &World) {
        let host = self.pick(world.coordinators());
        let fault = Fault::Dead(host);
        if self.active.iter().any(|(_, other)| other.meets(&fault)) {
            return;
        }
        if self.rng.random_bool(0.1) {
            world.note(format!("fault: {host} is asked to stop"));
            return world.shut_down(host);
        }
        world.note(format!("fault: {fault:?} for a moment"));
        fault.start(sim, world);
        let length = Duration::from_millis(self.rng.random_range(50..1_000));
        self.active.push(((sim.elapsed() + length).min(CHAOS), fault));
    }

    fn begin(&mut self, sim: &mut Sim<'_>, world: &World) {
        let fault = self.draw(world);
        // One at a time on each link and host, so that its end heals it.
        if self.active.iter().any(|(_, other)| other.meets(&fault)) {
            return;
        }
        let most = if matches!(fault, Fault::StoreAway) { 8_000 } else { 20_000 };
        let length = Duration::from_millis(self.rng.random_range(100..most));
        let end = (sim.elapsed() + length).min(CHAOS);
        world.note(format!("fault: {fault:?} for {length:?}"));
        fault.start(sim, world);
        self.active.push((end, fault));
    }

    fn draw(&mut self, world: &World) -> Fault {
        let coordinator = self.pick(world.coordinators());
        let servant = self.pick(&World::servants());
        let others = world.hosts();
        let other = loop {
            let other = self.pick(&others);
            if other != coordinator {
                break other;
            }
        };
        match self.rng.random_range(0..100) {
            0..14 => Fault::Dead(coordinator),
            14..32 => Fault::Dead(servant),
            32..44 => Fault::Apart(coordinator, other),
            44..50 => Fault::OneWay(coordinator, other),
            50..56 => Fault::OneWay(other, coordinator),
            56..64 => Fault::Held(coordinator, other),
            64..74 => Fault::Far(coordinator, other),
            74..81 => Fault::StoreAway,
            81..88 => Fault::StoreSlow,
            88..93 => Fault::StoreLossy,
            93..96 => Fault::StoreDeaf,
            96..98 => Fault::StoreAhead,
            _ => Fault::ObjectsFail,
        }
    }
}

impl Fault {
    fn link(&self) -> Option<[&'static str; 2]> {
        match *self {
            Self::Apart(a, b) | Self::OneWay(a, b) | Self::Held(a, b) | Self::Far(a, b) => {
                let mut link = [a, b];
                link.sort_unstable();
                Some(link)
            }
            _ => None,
        }
    }

    /// Whether both are about the same thing.
    fn meets(&self, other: &Self) -> bool {
        self == other || self.link().is_some_and(|link| Some(link) == other.link())
    }

    fn start(&self, sim: &mut Sim<'_>, world: &World) {
        match *self {
            Self::Dead(host) => sim.crash(host),
            Self::Apart(a, b) => sim.partition(a, b),
            Self::OneWay(from, to) => sim.partition_oneway(from, to),
            Self::Held(a, b) => sim.hold(a, b),
            Self::Far(a, b) => sim.set_link_latency(a, b, Duration::from_millis(900)),
            Self::ObjectsFail => world.objects.fail(true),
            _ => self.set_weather(world, true),
        }
    }

    fn end(&self, sim: &mut Sim<'_>, world: &World) {
        world.note(format!("fault: {self:?} is over"));
        match *self {
            Self::Dead(host) => sim.bounce(host),
            Self::Apart(a, b) => sim.repair(a, b),
            Self::OneWay(from, to) => sim.repair_oneway(from, to),
            Self::Held(a, b) => sim.release(a, b),
            Self::Far(a, b) => sim.set_link_latency(a, b, Duration::from_millis(10)),
            Self::ObjectsFail => world.objects.fail(false),
            _ => self.set_weather(world, false),
        }
    }

    fn set_weather(&self, world: &World, on: bool) {
        world.database.set_weather(|Weather { away, slow, lossy, deaf, ahead_ms }| match self {
            Self::StoreAway => *away = on,
            Self::StoreSlow => *slow = on,
            Self::StoreLossy => *lossy = on,
            Self::StoreAhead => *ahead_ms = i64::from(on) * YEAR_MS,
            _ => *deaf = on,
        });
    }
}
