//! A simulation of the whole cluster in one process: real coordinators, and workers, energy nodes and clients
//! that speak the real protocol, under simulated time on a simulated network. One number, the seed, decides
//! everything: what is asked for, who lies, what fails and when, and in which order tasks run. So a run that
//! breaks a rule can be seen again. `CONTRIBUTING.md` says how.
//!
//! A run has a process of its own, which is this test binary again: only so does nothing that an earlier run
//! left behind (counters, hash keys) decide anything.

mod client;
mod entropy;
mod faults;
mod model;
mod net;
mod node;
mod objects;
mod store;
mod truth;
mod worker;
mod world;

use std::{
    io::Read,
    process::{Command, Stdio},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    thread,
};

use fairlead_common::signature::Signer;
use parking_lot::Mutex;
use tracing_subscriber::{
    EnvFilter,
    fmt::{format::Writer, time::FormatTime},
};

/// Seeds of an ordinary test run.
const SEEDS: u64 = 60;
/// Lines of history that a failure shows.
const LAST_LINES: usize = 60;

use crate::store::Store;

static PANICS: Mutex<Vec<String>> = Mutex::new(Vec::new());

/// The time in logs.
struct SimulatedTime;

impl FormatTime for SimulatedTime {
    fn format_time(&self, writer: &mut Writer<'_>) -> std::fmt::Result {
        write!(writer, "{:9.3}", turmoil::sim_elapsed().unwrap_or_default().as_secs_f64())
    }
}

/// A store outside any run, and what is wrong with it.
pub(crate) fn lone_store(seed: u64) -> (Arc<dyn Store>, Trouble) {
    let time = world::Time::default();
    let (objects, signer) = (Arc::default(), Signer::generate().public());
    let model = Arc::new(Mutex::new(model::Model::new(time.clone(), objects, signer)));
    let database = Arc::new(store::Database::new(seed, false, model, time));
    (Arc::new(store::SimulatedStore(Arc::clone(&database))), Trouble(database))
}

/// What goes wrong with a [`lone_store`].
pub(crate) struct Trouble(Arc<store::Database>);

impl Trouble {
    /// Its clock is so many milliseconds ahead.
    pub(crate) fn set_clock(&self, ahead_ms: i64) {
        self.0.set_weather(|weather| weather.ahead_ms = ahead_ms);
    }

    /// It is slow; answers get lost if `lossy`.
    pub(crate) fn be_slow(&self, lossy: bool) {
        self.0.set_weather(|weather| (weather.slow, weather.lossy) = (true, lossy));
    }
}

/// What has panicked since the last look.
fn panics() -> Vec<String> {
    std::mem::take(&mut PANICS.lock())
}

fn number(variable: &str) -> Option<u64> {
    let text = std::env::var(variable).ok()?;
    Some(text.parse().unwrap_or_else(|_| panic!("{variable}={text} is no number")))
}

/// Runs one seed in this process and says how it went.
fn run_here(seed: u64) -> world::Run {
    entropy::seed(seed);
    std::panic::set_hook(Box::new(|panic| PANICS.lock().push(panic.to_string())));
    // A fresh thread: this one may have drawn its hash keys already.
    let running = thread::spawn(move || world::run(seed));
    running.join().unwrap_or_else(|_| panic!("the simulation panicked: {:?}", panics()))
}

/// What one seed printed in a process of its own, and whether everything held.
fn run_apart(seed: u64) -> (bool, String) {
    let test = std::env::current_exe().expect("this test has a file");
    let mut child = Command::new(test)
        .args(["simulation::one_seed", "--exact", "--ignored", "--nocapture"])
        .env("SEED", seed.to_string())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .expect("this test can start itself");
    let mut text = String::new();
    child.stdout.take().expect("piped").read_to_string(&mut text).expect("it prints text");
    (child.wait().expect("it ends").success(), text)
}

/// Runs `SEEDS` seeds from `FROM` on; the first that breaks a rule fails the test.
#[test]
fn whatever_fails_the_invariants_hold() {
    let first = number("FROM").unwrap_or(0);
    let end = first + number("SEEDS").unwrap_or(SEEDS);
    let next = AtomicU64::new(first);
    let failed = Mutex::new(None);
    let workers = thread::available_parallelism().map_or(1, usize::from);
    thread::scope(|scope| {
        for _ in 0..workers {
            scope.spawn(|| {
                while failed.lock().is_none() {
                    let seed = next.fetch_add(1, Ordering::Relaxed);
                    if seed >= end {
                        return;
                    }
                    let (held, text) = run_apart(seed);
                    if !held {
                        failed.lock().get_or_insert((seed, text));
                    }
                }
            });
        }
    });
    if let Some((seed, text)) = failed.into_inner() {
        let lines: Vec<&str> = text.lines().collect();
        let last = lines[lines.len().saturating_sub(LAST_LINES)..].join("\n");
        panic!(
            "{last}\n\nseed {seed} broke a rule; see all of it with `make simulate SEED={seed}`"
        );
    }
}

/// A seed is one history: what fails can be seen again.
#[test]
fn a_seed_has_one_history() {
    for seed in [3, 4] {
        let (one, other) = (run_apart(seed).1, run_apart(seed).1);
        // What the test harness adds holds real time.
        let history = |text: &str| -> Vec<String> {
            let told = |line: &&str| !line.starts_with("test ");
            text.lines().filter(told).map(str::to_owned).collect()
        };
        let (one, other) = (history(&one), history(&other));
        let differs = one.iter().zip(&other).find(|(one, other)| one != other);
        assert_eq!(differs, None, "seed {seed}");
        assert_eq!(one.len(), other.len(), "seed {seed}");
        assert!(one.len() > 100, "seed {seed}: {one:?}");
    }
}

/// Runs the seed `SEED` and prints its history.
#[test]
#[ignore = "one run of `make simulate SEED=...`; the tests above start it"]
fn one_seed() {
    let seed = number("SEED").expect("SEED says which run");
    if std::env::var_os("RUST_LOG").is_some() {
        let log = tracing_subscriber::fmt().with_timer(SimulatedTime).with_writer(std::io::stderr);
        log.with_env_filter(EnvFilter::from_default_env()).init();
    }
    let run = run_here(seed);
    for line in &run.history {
        println!("{line}");
    }
    println!("seed {seed}: {}", run.summary);
    for problem in &run.problems {
        println!("BROKEN: {problem}");
    }
    assert!(run.problems.is_empty(), "seed {seed} broke a rule");
}
