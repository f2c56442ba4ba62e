//! The store that the simulated coordinators share. It outlives them, tells the model of every transition,
//! and fails as stores do: it is slow, does not answer, loses the answer to what it did, or its queues.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
    time::Duration,
};

use async_trait::async_trait;
use fairlead_common::ids::{JobId, ShardId};
use fairlead_proto::v1::{StepProgress, WatchJobResponse};
use parking_lot::Mutex;
use rand::{Rng, SeedableRng, rngs::StdRng};
use tokio::sync::mpsc;

use super::{model::Model, world::Time};
use crate::{
    clock::{Clock, is_beyond, millis},
    lease::Phase,
    state::{ActiveShard, JobRecord, QueueName},
    store::{
        Applied, Backlog, CLAIM, Change, Charge, Created, Found, Lookup, Member, MemberKey,
        MemoryStore, NewJob, Roster, Store, StoreError,
    },
    transition::Transition,
};

/// News that wait for one coordinator.
const NEWS: usize = 256;

/// What is wrong with the store now.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Weather {
    /// It does not answer.
    pub(super) away: bool,
    /// Answers take long.
    pub(super) slow: bool,
    /// Some answers get lost: what was asked for has happened.
    pub(super) lossy: bool,
    /// Coordinators do not hear of each other.
    pub(super) deaf: bool,
    /// How far its clock is ahead, milliseconds.
    pub(super) ahead_ms: i64,
}

/// The database behind all coordinators.
#[derive(Debug)]
pub(super) struct Database {
    tables: MemoryStore,
    model: Arc<Mutex<Model>>,
    time: Time,
    shared: bool,
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    rng: StdRng,
    weather: Weather,
    /// Coordinators that hear what others do.
    bells: Vec<mpsc::Sender<Change>>,
    /// Some news were not told.
    missed: bool,
    /// Shards that were handed to one coordinator, until when.
    claims: BTreeMap<String, i64>,
    /// Shards that the queues have lost.
    lost: BTreeSet<String>,
}

impl State {
    /// Tells every coordinator.
    fn ring(&mut self, mut news: Vec<Change>) {
        if self.weather.deaf {
            self.missed |= !news.is_empty();
            return;
        }
        if std::mem::take(&mut self.missed) {
            news.push(Change::Everything);
        }
        self.bells.retain(|bell| !bell.is_closed());
        for bell in &self.bells {
            self.missed |= news.iter().any(|change| bell.try_send(change.clone()).is_err());
        }
    }
}

impl Database {
    /// An empty one; `shared` by several coordinators, or one's own.
    pub(super) fn new(seed: u64, shared: bool, model: Arc<Mutex<Model>>, time: Time) -> Self {
        let state = State {
            rng: StdRng::seed_from_u64(seed),
            weather: Weather::default(),
            bells: Vec::new(),
            missed: false,
            claims: BTreeMap::new(),
            lost: BTreeSet::new(),
        };
        Self { tables: MemoryStore::default(), model, time, shared, state: Mutex::new(state) }
    }

    /// Changes what is wrong with it.
    pub(super) fn set_weather(&self, change: impl FnOnce(&mut Weather)) {
        change(&mut self.state.lock().weather);
        self.ring([]);
    }

    /// Forgets the queues, but not the jobs: a flush, or a failover. Says how many shards are lost.
    pub(super) fn lose_queues(&self) -> usize {
        let now = self.time.unix_ms();
        let shards = self.model.lock().open_shards();
        let state = &mut *self.state.lock();
        state.claims.retain(|_, until| *until > now);
        state.lost.extend(shards);
        state.lost.len()
    }

    fn pause(&self) -> Duration {
        let State { rng, weather, .. } = &mut *self.state.lock();
        let most = match (weather.slow, rng.random_bool(0.3)) {
            (true, _) => 400,
            (false, true) => 4,
            (false, false) => 0,
        };
        Duration::from_millis(rng.random_range(0..=most))
    }

    fn is_away(&self) -> bool {
        self.state.lock().weather.away
    }

    fn loses_answer(&self) -> bool {
        let State { rng, weather, .. } = &mut *self.state.lock();
        weather.lossy && rng.random_bool(0.15)
    }

    /// The way of a question to the database. A coordinator may die on it, or on the way back.
    async fn ask(&self, what: &'static str) -> Result<(), StoreError> {
        tokio::time::sleep(self.pause()).await;
        if self.is_away() { Err(away(what)) } else { Ok(()) }
    }

    /// The way of the answer back.
    async fn answer<T>(
        &self,
        what: &'static str,
        answer: Result<T, StoreError>,
    ) -> Result<T, StoreError> {
        tokio::time::sleep(self.pause()).await;
        if self.is_away() || self.loses_answer() { Err(away(what)) } else { answer }
    }

    /// Tells every coordinator.
    fn ring(&self, news: impl IntoIterator<Item = Change>) {
        self.state.lock().ring(news.into_iter().collect());
    }

    /// What of a transition others must hear.
    fn news(before: &JobRecord, applied: &Applied) -> Vec<Change> {
        let mut news = Vec::new();
        if applied.has_events {
            news.extend(before.id().map(Change::Job));
        }
        for (old, new) in before.shards.iter().zip(&applied.record.shards) {
            let ended = old.lease.phase() == Phase::Leased && new.lease.phase() != Phase::Leased;
            if ended {
                news.extend(old.id.parse::<ShardId>().ok().map(Change::Lease));
            }
            if new.lease.phase() == Phase::Queued {
                news.push(Change::Queue);
            }
        }
        news
    }

    /// Leaves out what the queues have lost.
    fn visible(&self, shards: Vec<ActiveShard>) -> Vec<ActiveShard> {
        let state = self.state.lock();
        shards.into_iter().filter(|shard| !state.lost.contains(&shard.shard_id)).collect()
    }

    /// Leaves out what another coordinator was given, and gives away the rest.
    fn claim(&self, shards: Vec<ActiveShard>, now: i64) -> Vec<ActiveShard> {
        if !self.shared {
            return shards;
        }
        let claims = &mut self.state.lock().claims;
        let free = |shard: &ActiveShard| {
            claims.get(&shard.shard_id).is_none_or(|until| *until <= now || is_beyond(*until, now))
        };
        let free: Vec<ActiveShard> = shards.into_iter().filter(free).collect();
        claims.extend(free.iter().map(|shard| (shard.shard_id.clone(), now + millis(CLAIM))));
        free
    }

    /// What follows from a transition.
    fn applied(&self, before: &JobRecord, transition: &Transition, applied: &Applied) {
        let moved = before.shards.iter().zip(&applied.record.shards);
        let moved = moved.filter(|(old, new)| old.lease != new.lease).map(|(old, _)| &old.id);
        let state = &mut *self.state.lock();
        for id in moved {
            state.claims.remove(id);
            // What is written now is where its record says it is.
            state.lost.remove(id);
        }
        self.model.lock().applied(before, transition, applied);
        state.ring(Self::news(before, applied));
    }
}

fn away(what: &'static str) -> StoreError {
    StoreError::Away { what, problem: "the simulated store does not answer".into() }
}

/// A coordinator's way to the database.
#[derive(Debug)]
pub(super) struct SimulatedStore(pub(super) Arc<Database>);

#[async_trait]
impl Store for SimulatedStore {
    async fn create(&self, new: NewJob, now: i64) -> Result<Created, StoreError> {
        self.0.ask("create").await?;
        let created = self.0.tables.create(new, now).await;
        if let Ok(Created::New(record)) = &created {
            self.0.model.lock().created(record);
            self.0.ring([Change::Queue]);
        }
        self.0.answer("create", created).await
    }

    async fn get(&self, job: JobId) -> Result<Option<JobRecord>, StoreError> {
        self.0.ask("get").await?;
        self.0.answer("get", self.0.tables.get(job).await).await
    }

    async fn list(
        &self,
        tenant: Option<&str>,
        before: Option<JobId>,
        limit: usize,
    ) -> Result<Vec<JobRecord>, StoreError> {
        self.0.ask("list").await?;
        self.0.answer("list", self.0.tables.list(tenant, before, limit).await).await
    }

    async fn apply(
        &self,
        job: JobId,
        transition: Transition,
        now: i64,
    ) -> Result<Applied, StoreError> {
        self.0.ask("apply").await?;
        let before = self.0.tables.get(job).await?.ok_or(StoreError::UnknownJob(job))?;
        let applied = self.0.tables.apply(job, transition.clone(), now).await;
        if let Ok(applied) = &applied {
            self.0.applied(&before, &transition, applied);
        }
        let answer = self.0.answer("apply", applied).await;
        if let (Transition::Commit { lease, .. }, Err(StoreError::Away { .. })) =
            (&transition, &answer)
        {
            self.0.model.lock().unsure(*lease);
        }
        answer
    }

    async fn take(
        &self,
        queue: &QueueName,
        limit: usize,
        now: i64,
    ) -> Result<Vec<ActiveShard>, StoreError> {
        self.0.ask("take").await?;
        let taken = self.0.tables.take(queue, limit, now).await?;
        self.0.answer("take", Ok(self.0.claim(self.0.visible(taken), now))).await
    }

    async fn expired(&self, now: i64, limit: usize) -> Result<Vec<ActiveShard>, StoreError> {
        self.0.ask("expired").await?;
        let expired = self.0.tables.expired(now, limit).await?;
        self.0.answer("expired", Ok(self.0.visible(expired))).await
    }

    async fn backlog(&self, now: i64) -> Result<Backlog, StoreError> {
        self.0.ask("backlog").await?;
        self.0.answer("backlog", self.0.tables.backlog(now).await).await
    }

    async fn events(
        &self,
        job: JobId,
        after: u64,
        limit: usize,
    ) -> Result<Vec<WatchJobResponse>, StoreError> {
        self.0.ask("events").await?;
        self.0.answer("events", self.0.tables.events(job, after, limit).await).await
    }

    async fn find(&self, lookup: Lookup<'_>) -> Result<Option<Found>, StoreError> {
        self.0.ask("find").await?;
        self.0.answer("find", self.0.tables.find(lookup).await).await
    }

    fn changes(&self) -> Option<mpsc::Receiver<Change>> {
        self.0.shared.then(|| {
            let (bell, news) = mpsc::channel(NEWS);
            // What came before was missed.
            let _ = bell.try_send(Change::Everything);
            self.0.state.lock().bells.push(bell);
            news
        })
    }

    fn tell(&self, job: JobId, step: &StepProgress) {
        // The teller hears it as well: progress is not kept, so nothing is lost by hearing it twice.
        let state = self.0.state.lock();
        if !state.weather.deaf && !state.weather.away {
            let news = || Change::Progress(job, Box::new(step.clone()));
            state.bells.iter().for_each(|bell| drop(bell.try_send(news())));
        }
    }

    async fn clock(&self) -> Result<i64, StoreError> {
        self.0.ask("clock").await?;
        let ahead = self.0.state.lock().weather.ahead_ms;
        self.0.answer("clock", Ok(self.0.time.unix_ms() + ahead)).await
    }

    fn is_shared(&self) -> bool {
        self.0.shared
    }

    async fn mend(&self, _clock: &Clock) -> Result<usize, StoreError> {
        self.0.ask("mend").await?;
        let found = std::mem::take(&mut self.0.state.lock().lost).len();
        self.0.answer("mend", Ok(found)).await
    }

    async fn join(&self, member: Member, now: i64, ttl_ms: i64) -> Result<(), StoreError> {
        self.0.ask("join").await?;
        let joined = self.0.tables.join(member, now, ttl_ms).await;
        self.0.ring([Change::Members]);
        self.0.answer("join", joined).await
    }

    async fn keep(
        &self,
        members: &[MemberKey],
        now: i64,
        ttl_ms: i64,
    ) -> Result<Vec<MemberKey>, StoreError> {
        self.0.ask("keep").await?;
        self.0.answer("keep", self.0.tables.keep(members, now, ttl_ms).await).await
    }

    async fn leave(&self, member: &MemberKey) -> Result<bool, StoreError> {
        self.0.ask("leave").await?;
        let left = self.0.tables.leave(member).await;
        self.0.ring([Change::Members]);
        self.0.answer("leave", left).await
    }

    async fn charge(&self, charge: Charge, now: i64) -> Result<bool, StoreError> {
        self.0.ask("charge").await?;
        self.0.answer("charge", self.0.tables.charge(charge, now).await).await
    }

    async fn retire(&self, concept: &str) -> Result<BTreeSet<String>, StoreError> {
        self.0.ask("retire").await?;
        self.0.answer("retire", self.0.tables.retire(concept).await).await
    }

    async fn roster(&self, known: Option<u64>, now: i64) -> Result<Option<Roster>, StoreError> {
        self.0.ask("roster").await?;
        self.0.answer("roster", self.0.tables.roster(known, now).await).await
    }

    async fn age(&self, since: Option<(u64, Duration)>) -> Result<u64, StoreError> {
        self.0.ask("age").await?;
        self.0.answer("age", self.0.tables.age(since).await).await
    }

    async fn ended(&self, before: u64, limit: usize) -> Result<Vec<JobRecord>, StoreError> {
        self.0.ask("ended").await?;
        self.0.answer("ended", self.0.tables.ended(before, limit).await).await
    }

    async fn forget(&self, old: Vec<JobRecord>) -> Result<(), StoreError> {
        self.0.ask("forget").await?;
        self.0.answer("forget", self.0.tables.forget(old).await).await
    }
}
