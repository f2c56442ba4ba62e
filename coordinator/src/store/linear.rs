//! Histories of what several callers ask of a store while it fails, checked for linearizability by stateright's
//! tester: each shard must look as if its calls had taken place one at a time, each between its begin and its
//! end. A call whose answer was lost may have taken place at any time since, or never.
//!
//! The register here knows nothing of [`crate::lease`]: it is the same rules written down once more.

use std::sync::{
    Arc,
    atomic::{AtomicU64, Ordering},
};

use fairlead_common::{ids::ShardId, testing::RedisServer};
use fairlead_proto::v1::{ImageInfo, ImageStatus};
use parking_lot::Mutex;
use rand::{Rng, SeedableRng, rngs::StdRng, seq::IndexedRandom};
use stateright::semantics::{ConsistencyTester, LinearizabilityTester, SequentialSpec};

use super::{contract::stored, *};
use crate::{
    lease::{Failure, LeaseKey, Phase},
    simulation,
};

/// Callers at the same time, and calls of each.
const CALLERS: u64 = 4;
const CALLS: u32 = 12;
/// Shards of the job, each a register of its own.
const SHARDS: u32 = 2;
/// Deliveries after which a shard has failed.
const MOST: u32 = 5;

#[derive(Debug, Clone, PartialEq)]
enum Call {
    /// At this time.
    Grant(u64),
    Renew(u64),
    Commit(u64),
    Fail(u64),
    GiveBack(u64),
    Read,
}

#[derive(Debug, Clone, PartialEq)]
enum Answer {
    Token(u64),
    Done,
    Refused,
    State(Phase, u64),
}

/// One shard: who holds it, and whether somebody has finished it.
#[derive(Debug, Clone)]
struct Register {
    phase: Phase,
    token: u64,
    deliveries: u32,
}

impl Register {
    fn new() -> Self {
        Self { phase: Phase::Queued, token: 0, deliveries: 0 }
    }

    fn end(&mut self, token: u64, phase: Phase) -> Answer {
        if self.phase != Phase::Leased || self.token != token {
            return Answer::Refused;
        }
        self.phase = phase;
        Answer::Done
    }
}

impl SequentialSpec for Register {
    type Op = Call;
    type Ret = Answer;

    fn invoke(&mut self, call: &Call) -> Answer {
        match *call {
            Call::Grant(now) if self.phase == Phase::Queued => {
                self.token = (self.token + 1).max(now);
                self.phase = Phase::Leased;
                self.deliveries += 1;
                Answer::Token(self.token)
            }
            Call::Grant(_) => Answer::Refused,
            Call::Renew(token) => self.end(token, Phase::Leased),
            Call::Commit(token) if self.phase == Phase::Done && self.token == token => Answer::Done,
            Call::Commit(token) => self.end(token, Phase::Done),
            Call::Fail(token) if self.deliveries == MOST => self.end(token, Phase::Failed),
            Call::Fail(token) => self.end(token, Phase::Queued),
            Call::GiveBack(token) => {
                let answer = self.end(token, Phase::Queued);
                self.deliveries -= u32::from(answer == Answer::Done);
                answer
            }
            Call::Read => Answer::State(self.phase, self.token),
        }
    }
}

/// What is wrong with the store on purpose.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Bug {
    None,
    /// It takes any token for the current one.
    TakesStaleTokens,
}

/// Begins and ends of calls, in the order in which they took place.
#[derive(Debug, Default)]
struct History(Mutex<Vec<(ShardId, u64, Event)>>);

#[derive(Debug, Clone)]
enum Event {
    Begin(Call),
    End(Answer),
}

impl History {
    fn note(&self, shard: ShardId, caller: u64, event: Event) {
        self.0.lock().push((shard, caller, event));
    }

    /// Whether the calls of each shard have an order that explains their answers.
    fn is_linearizable(&self) -> bool {
        let mut registers = BTreeMap::new();
        for (shard, caller, event) in self.0.lock().iter().cloned() {
            let register = registers
                .entry(shard)
                .or_insert_with(|| LinearizabilityTester::new(Register::new()));
            match event {
                Event::Begin(call) => register.on_invoke(caller, call),
                Event::End(answer) => register.on_return(caller, answer),
            }
            .expect("a caller makes one call at a time");
        }
        registers.values().all(|register| register.is_consistent())
    }
}

/// What all callers of one run share.
struct Run {
    stores: Vec<Arc<dyn Store>>,
    job: JobId,
    shards: Vec<ShardId>,
    /// Every token that anybody was given.
    tokens: Mutex<Vec<LeaseKey>>,
    history: History,
    bug: Bug,
    /// Odd while the store fails in ways that may make a call twice.
    trouble: AtomicU64,
    /// Names callers; one that did not hear an answer goes on under another name.
    names: AtomicU64,
}

impl Run {
    async fn new(stores: Vec<Arc<dyn Store>>, bug: Bug) -> Arc<Self> {
        let (job, shards) = stored(stores[0].as_ref(), SHARDS, 1).await;
        Arc::new(Self {
            stores,
            job,
            shards,
            tokens: Mutex::default(),
            history: History::default(),
            bug,
            trouble: AtomicU64::new(0),
            names: AtomicU64::new(0),
        })
    }

    async fn all(self: &Arc<Self>, seed: u64) {
        let callers = (0..CALLERS).map(|number| {
            let rng = StdRng::seed_from_u64(seed.wrapping_mul(CALLERS).wrapping_add(number));
            tokio::spawn(Arc::clone(self).caller(rng, number as usize))
        });
        for caller in futures::future::join_all(callers.collect::<Vec<_>>()).await {
            caller.expect("no panic");
        }
    }

    async fn caller(self: Arc<Self>, mut rng: StdRng, number: usize) {
        let store = Arc::clone(&self.stores[number % self.stores.len()]);
        let mut name = self.names.fetch_add(1, Ordering::Relaxed);
        for turn in 0..CALLS {
            let (shard, call) = self.draw(&mut rng, turn);
            let before = self.trouble.load(Ordering::SeqCst);
            self.history.note(shard, name, Event::Begin(call.clone()));
            let answer = self.ask(store.as_ref(), shard, &call, name).await;
            let after = self.trouble.load(Ordering::SeqCst);
            // It may have been made twice: refused the second time, it took place all the same.
            let is_sure = (before == after && before.is_multiple_of(2))
                || matches!(call, Call::Renew(_) | Call::Commit(_) | Call::Read);
            match answer.filter(|answer| is_sure || *answer != Answer::Refused) {
                Some(answer) => {
                    if let Answer::Token(token) = answer {
                        self.tokens.lock().push(LeaseKey { shard, token });
                    }
                    self.history.note(shard, name, Event::End(answer));
                }
                None => name = self.names.fetch_add(1, Ordering::Relaxed),
            }
        }
    }

    fn draw(&self, rng: &mut StdRng, turn: u32) -> (ShardId, Call) {
        let tokens = self.tokens.lock();
        // Mostly a recent one, at times one of long ago.
        let recent = &tokens[tokens.len().saturating_sub(4)..];
        if let Some(LeaseKey { shard, token }) = recent.choose(rng).copied() {
            match rng.random_range(0..100) {
                0..35 => {}
                35..50 => return (shard, Call::Renew(token)),
                50..65 => return (shard, Call::Fail(token)),
                65..75 => return (shard, Call::GiveBack(token)),
                75..85 => return (shard, Call::Commit(token)),
                _ => return (shard, Call::Read),
            }
        }
        let shard = *self.shards.choose(rng).expect("there are some");
        (shard, Call::Grant(10 + u64::from(turn)))
    }

    /// What the store answers; nothing if it is not known whether the call took place.
    async fn ask(
        &self,
        store: &dyn Store,
        shard: ShardId,
        call: &Call,
        name: u64,
    ) -> Option<Answer> {
        let now = match *call {
            Call::Grant(now) => now.cast_signed(),
            // Before any grant: what fails waits for nothing.
            _ => 0,
        };
        let lease = |token| LeaseKey { shard, token };
        let transition = match *call {
            Call::Read => {
                let record = store.get(self.job).await.ok()?.expect("it was stored");
                let lease = &record.shard(shard).expect("it has it").lease;
                return Some(Answer::State(lease.phase(), lease.token()));
            }
            // Told apart by its holder from any other.
            Call::Grant(_) => {
                Transition::Grant { shard, worker: format!("{name} {now}"), ttl_ms: 1 }
            }
            Call::Renew(token) => Transition::Renew { leases: vec![lease(token)], ttl_ms: 1 },
            Call::GiveBack(token) => Transition::GiveBack { lease: lease(token) },
            Call::Fail(token) => {
                let failure = Failure { reason: String::new(), retryable: true, delay_ms: 0 };
                Transition::Fail { lease: lease(token), failure }
            }
            Call::Commit(token) => {
                let token = self.compared(store, shard, token).await?;
                let index = self.shards.iter().position(|other| *other == shard)? as u32;
                let status = ImageStatus::Withheld.into();
                let image = ImageInfo { index, status, ..ImageInfo::default() };
                Transition::Commit { lease: lease(token), images: vec![image], notices: Vec::new() }
            }
        };
        match store.apply(self.job, transition, now).await {
            Ok(applied) => Some(match applied.effect {
                Effect::Granted { lease, .. } => Answer::Token(lease.token),
                Effect::Renewed { lost } if !lost.is_empty() => Answer::Refused,
                _ => Answer::Done,
            }),
            Err(StoreError::Refused(_)) => Some(Answer::Refused),
            Err(_) => None,
        }
    }

    /// The token as the store compares it.
    async fn compared(&self, store: &dyn Store, shard: ShardId, token: u64) -> Option<u64> {
        match self.bug {
            Bug::None => Some(token),
            Bug::TakesStaleTokens => {
                let record = store.get(self.job).await.ok()?.expect("it was stored");
                record.shard(shard).map(|shard| shard.lease.token())
            }
        }
    }
}

/// Whether the history of one seed on the simulated store, which is slow and loses answers, is linearizable.
fn simulated(seed: u64, bug: Bug) -> bool {
    let mut builder = tokio::runtime::Builder::new_current_thread();
    let runtime = builder.enable_time().start_paused(true).build().expect("a runtime");
    runtime.block_on(async {
        let (store, trouble) = simulation::lone_store(seed);
        let run = Run::new(vec![store], bug).await;
        // To show that no order explains a history, all are tried: without lost answers there are fewer.
        trouble.be_slow(bug == Bug::None);
        run.all(seed).await;
        run.history.is_linearizable()
    })
}

#[test]
fn histories_of_a_store_that_loses_answers_are_linearizable() {
    for seed in 0..100 {
        assert!(simulated(seed, Bug::None), "seed {seed}");
    }
}

#[test]
fn a_store_that_takes_stale_tokens_is_caught() {
    assert!((0..100).any(|seed| !simulated(seed, Bug::TakesStaleTokens)));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn histories_of_a_redis_that_is_killed_are_linearizable() {
    let dir = tempfile::tempdir().expect("a directory");
    let mut server = RedisServer::start(dir.path());
    for seed in 0..4 {
        let store = || RedisStore::new(&server.url(), "fairlead").expect("an address");
        let stores: Vec<Arc<dyn Store>> = vec![Arc::new(store()), Arc::new(store())];
        let run = Run::new(stores, Bug::None).await;
        let calls = tokio::spawn({
            let run = Arc::clone(&run);
            async move { run.all(seed).await }
        });
        for _ in 0..2 {
            run.trouble.fetch_add(1, Ordering::SeqCst);
            server.kill();
            server.restart();
            run.trouble.fetch_add(1, Ordering::SeqCst);
        }
        calls.await.expect("no panic");
        assert!(run.history.is_linearizable(), "seed {seed}: {:?}", run.history);
    }
}
