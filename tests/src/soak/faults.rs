//! What is done to the cluster, at random moments, one thing after the other and now and then two at once.

use std::{fmt, sync::Arc, time::Duration};

use anyhow::Result;
use rand::{
    Rng, SeedableRng,
    seq::{IndexedRandom, SliceRandom},
};
use rand_chacha::ChaCha8Rng;
use tokio::time::sleep;
use tokio_util::sync::CancellationToken;

use super::{
    cluster::{Cluster, LEASE, Service},
    ledger::{Breach, Ledger},
};
use crate::proxy::Flow;

/// Longest pause between two faults, and longest time that one lasts beyond what it needs; milliseconds.
const PAUSE: u64 = 1_500;
const HOLD: u64 = 2_500;
/// What a slow line adds to each chunk.
const LATENCY: Duration = Duration::from_millis(150);
/// How often two faults come at once.
const TWICE: f64 = 0.25;

/// Whom a fault hits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Victim {
    Coordinator,
    Worker,
    Node,
    Redis,
}

/// What happens to it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Harm {
    /// SIGKILL, then a new start.
    Kill,
    /// SIGTERM, its end, then a new start.
    Drain,
    /// SIGSTOP for longer than a lease, then SIGCONT.
    Freeze,
    /// Its connections break, new ones too.
    Cut,
    /// Nothing passes its connections, and nobody is told.
    Silence,
    /// Its connections are slow.
    Slow,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Fault {
    victim: Victim,
    harm: Harm,
}

impl Fault {
    fn all() -> Vec<Self> {
        use Harm::{Cut, Drain, Freeze, Kill, Silence, Slow};
        let mut all = Vec::new();
        for victim in [Victim::Coordinator, Victim::Worker, Victim::Node] {
            all.extend([Kill, Drain, Freeze, Cut, Silence, Slow].map(|harm| Self { victim, harm }));
        }
        all.extend([Kill, Freeze].map(|harm| Self { victim: Victim::Redis, harm }));
        all
    }

    /// Whether it may come beside another: a coordinator that starts needs the Redis.
    fn goes_beside(self, other: Self) -> bool {
        self.victim != other.victim && matches!(self.victim, Victim::Worker | Victim::Node)
    }
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (victim, line) = match self.victim {
            Victim::Coordinator => ("coordinator", "from Redis"),
            Victim::Worker => ("worker", "from coordinators"),
            Victim::Node => ("energy node", "from all"),
            Victim::Redis => ("redis", ""),
        };
        match self.harm {
            Harm::Kill => write!(f, "{victim} killed"),
            Harm::Drain => write!(f, "{victim} told to stop"),
            Harm::Freeze => write!(f, "{victim} frozen for longer than a lease"),
            Harm::Cut => write!(f, "{victim} cut {line}"),
            Harm::Silence => write!(f, "{victim} unheard, {line}"),
            Harm::Slow => write!(f, "{victim} slow, {line}"),
        }
    }
}

/// Deals faults of all kinds, each as often as the others.
struct Deck {
    rng: ChaCha8Rng,
    left: Vec<Fault>,
}

impl Deck {
    fn draw(&mut self) -> Fault {
        if self.left.is_empty() {
            self.left = Fault::all();
            self.left.shuffle(&mut self.rng);
        }
        self.left.pop().expect("it was filled")
    }

    /// The next fault, and perhaps one beside it.
    fn deal(&mut self) -> Vec<Fault> {
        let mut dealt = vec![self.draw()];
        if self.rng.random_bool(TWICE)
            && let Some(at) = self.left.iter().position(|fault| fault.goes_beside(dealt[0]))
        {
            dealt.push(self.left.remove(at));
        }
        dealt
    }

    fn up_to(&mut self, most: u64) -> Duration {
        Duration::from_millis(self.rng.random_range(0..=most))
    }
}

/// Harms the cluster until `stop`, and leaves it whole.
pub(super) async fn run(
    cluster: Arc<Cluster>,
    ledger: Arc<Ledger>,
    seed: u64,
    stop: CancellationToken,
) {
    let mut deck = Deck { rng: ChaCha8Rng::seed_from_u64(seed), left: Vec::new() };
    loop {
        let pause = deck.up_to(PAUSE);
        tokio::select! {
            () = stop.cancelled() => return,
            () = sleep(pause) => {}
        }
        let faults = deck.deal();
        let names = faults.iter().map(Fault::to_string).collect::<Vec<_>>().join(", ");
        let mut harms = Vec::new();
        for fault in &faults {
            ledger.fault(&fault.to_string());
            let (which, hold) = (which(&cluster, *fault, &mut deck.rng), deck.up_to(HOLD));
            harms.push(harm(&cluster, *fault, which, hold));
        }
        for harmed in futures::future::join_all(harms).await {
            if let Err(error) = harmed {
                ledger.breach(Breach::Ended, format!("{names}: {error:#}"));
            }
        }
        for service in cluster.services() {
            match service.revive().await {
                Ok(None) => {}
                Ok(Some(status)) => {
                    let message = format!("{names}: `{}` ended with {status}", service.name());
                    ledger.breach(Breach::Ended, message);
                }
                Err(error) => ledger.breach(Breach::Ended, format!("{error:#}")),
            }
        }
    }
}

/// The service that a fault hits; none for the Redis.
fn which<'a>(cluster: &'a Cluster, fault: Fault, rng: &mut ChaCha8Rng) -> Option<&'a Service> {
    match fault.victim {
        Victim::Coordinator => cluster.coordinators.choose(rng),
        Victim::Worker => cluster.workers.choose(rng),
        Victim::Node => cluster.nodes.choose(rng),
        Victim::Redis => None,
    }
}

async fn harm(
    cluster: &Cluster,
    fault: Fault,
    service: Option<&Service>,
    hold: Duration,
) -> Result<()> {
    let Some(service) = service else { return harm_redis(cluster, fault.harm, hold).await };
    let flow = match fault.harm {
        Harm::Kill => {
            service.kill().await?;
            sleep(hold).await;
            return service.start().await;
        }
        Harm::Drain => {
            service.drain().await?;
            sleep(hold).await;
            return service.start().await;
        }
        Harm::Freeze => {
            service.signal("STOP").await?;
            sleep(LEASE + hold).await;
            return service.signal("CONT").await;
        }
        Harm::Cut => Flow::Cut,
        Harm::Silence => Flow::Silent,
        Harm::Slow => Flow::Slow(LATENCY),
    };
    service.lines().for_each(|line| line.set(flow));
    sleep(LEASE + hold).await;
    service.lines().for_each(|line| line.set(Flow::Open));
    Ok(())
}

async fn harm_redis(cluster: &Cluster, harm: Harm, hold: Duration) -> Result<()> {
    if harm == Harm::Kill {
        cluster.redis(|redis| redis.kill()).await?;
        sleep(hold).await;
        return cluster.redis(|redis| redis.restart()).await;
    }
    cluster.redis(|redis| redis.signal("STOP")).await?;
    sleep(LEASE + hold).await;
    cluster.redis(|redis| redis.signal("CONT")).await
}
