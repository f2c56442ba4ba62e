//! The durable store that several coordinators share: Redis. A job is one record; a transition reads
//! it, runs [`crate::transition`] and writes it back with one script that refuses if somebody else has
//! written in between. The same script moves the job's shards between queues and leases and appends its
//! events, so that no reader sees half of it. `prelude.lua` lists the keys.

mod base;
mod link;
mod live;
mod scripts;
mod settings;
mod tail;
mod writers;

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::{Arc, OnceLock},
    time::{Duration, Instant},
};

use ::redis::{AsyncCommands, ExistenceCheck, ScriptInvocation, SetExpiry, SetOptions};
use async_trait::async_trait;
use fairlead_common::ids::JobId;
use fairlead_proto::v1::{StepProgress, WatchJobResponse};
use prost::Message;
use tokio::sync::mpsc;

pub(crate) use self::link::without_password;
use self::{
    base::Base,
    live::Live,
    scripts::{Versioned, add_change, add_shards, member_key, queue_key, queue_name},
    writers::Writers,
};
use super::{
    Applied, Backlog, CLAIM, Change, Charge, Created, Found, Full, Lookup, Member, MemberKey,
    NewJob, Roster, Seen, Store, StoreError, decode, enqueue, lookups, unreadable,
};
use crate::{
    clock::{Clock, millis},
    state::{ActiveShard, JobRecord, QueueName},
    transition::Transition,
};

/// News that wait for the coordinator; more wait in Redis.
const NEWS: usize = 1_024;
/// Jobs looked at in one read while mending.
const MENDED_AT_ONCE: usize = 100;
/// How long the one coordinator that mends keeps others from it, should it die.
const MENDING: Duration = Duration::from_secs(60);

/// A time to wait, as scripts answer it.
fn wait_ms(value: &[u8]) -> Result<u64, StoreError> {
    let wait = std::str::from_utf8(value).ok().and_then(|wait| wait.parse().ok());
    wait.ok_or_else(|| StoreError::Corrupt("a time to wait".to_owned()))
}

/// A store in a Redis that any number of coordinators use.
#[derive(Debug)]
pub(crate) struct RedisStore {
    base: Arc<Base>,
    writers: Writers,
    live: OnceLock<Live>,
}

impl RedisStore {
    /// Whether `url` says where a Redis is.
    pub(crate) fn check(url: &str) -> Result<(), StoreError> {
        link::Link::new(url).map(drop)
    }

    /// A store under `prefix`, which tells clusters apart that share a Redis. Nothing is connected yet.
    pub(crate) fn new(url: &str, prefix: &str) -> Result<Self, StoreError> {
        let base = Arc::new(Base::new(url, prefix)?);
        let writers = Writers::new(Arc::clone(&base));
        Ok(Self { base, writers, live: OnceLock::new() })
    }

    /// Refuses a Redis whose settings let it lose jobs, unless that is accepted.
    pub(crate) async fn vet(&self, may_lose_jobs: bool) -> Result<(), StoreError> {
        let told = self.base.link.run("read settings", |mut connection| async move {
            let mut told = String::new();
            for section in ["memory", "persistence"] {
                let mut command = ::redis::cmd("INFO");
                told += &command.arg(section).query_async::<String>(&mut connection).await?;
            }
            Ok(told)
        });
        let told = match told.await {
            Ok(told) => told,
            // A user that may not ask.
            Err(StoreError::Backend { problem, .. }) => {
                tracing::warn!(problem, "redis does not tell its settings");
                String::new()
            }
            Err(error) => return Err(error),
        };
        let found = settings::unfit(&told).join(", and ");
        let name = self.base.link.name();
        match (found.is_empty(), may_lose_jobs) {
            (true, _) => Ok(()),
            (false, true) => {
                tracing::warn!(redis = name, "{found}; used all the same, as was asked for");
                Ok(())
            }
            (false, false) => {
                let problem = format!(
                    "{name} is not fit to keep jobs: {found}; or accept that with --redis-may-lose-jobs"
                );
                Err(StoreError::Backend { what: "redis", problem })
            }
        }
    }

    /// Mends some open jobs; says how many shards were put back.
    async fn mend_jobs(&self, ids: &[String], now: i64) -> Result<usize, StoreError> {
        let found = self.versions(ids).await?;
        self.base
            .script("mend jobs", &self.base.scripts.mend, now, |invocation| {
                invocation.arg(ids.len());
                for id in ids {
                    let found = found.iter().find(|found| found.record.job.job_id == *id);
                    let tenant = found.map_or("", |found| &found.record.tenant);
                    let version = found.map(|found| found.version.to_string()).unwrap_or_default();
                    invocation.arg(id).arg(tenant).arg(version);
                    let active: Vec<ActiveShard> =
                        found.iter().flat_map(|found| found.record.active()).collect();
                    add_shards(invocation, &active);
                }
            })
            .await
    }

    /// Those of `ids` that are there. One that cannot be read does not hide the others.
    async fn versions(&self, ids: &[String]) -> Result<Vec<Versioned>, StoreError> {
        if ids.is_empty() {
            return Ok(Vec::new());
        }
        let mut pipeline = ::redis::pipe();
        for id in ids {
            pipeline.hmget(self.base.key(&format!("job:{id}")), &["v", "r"]);
        }
        let pipeline = &pipeline;
        let found: Vec<(Option<u64>, Option<Vec<u8>>)> = self
            .base
            .link
            .run("read jobs", |mut connection| async move {
                pipeline.query_async(&mut connection).await
            })
            .await?;
        let read = |(id, (version, bytes)): (&String, (Option<u64>, Option<Vec<u8>>))| {
            let (version, bytes) = version.zip(bytes)?;
            match decode(&bytes, "a job") {
                Ok(record) => Some(Versioned { version, record }),
                Err(error) => {
                    unreadable(id, &error);
                    None
                }
            }
        };
        Ok(ids.iter().zip(found).filter_map(read).collect())
    }

    async fn records(&self, ids: &[String]) -> Result<Vec<JobRecord>, StoreError> {
        Ok(self.versions(ids).await?.into_iter().map(|found| found.record).collect())
    }
}

#[async_trait]
impl Store for RedisStore {
    async fn create(&self, new: NewJob, now: i64) -> Result<Created, StoreError> {
        let NewJob { mut record, key, max_queued, quota } = new;
        let events = enqueue(&mut record, &mut 0, now);
        let lookups = lookups(&record, None);
        let (name, entry) = match &key {
            Some((key, body_hash)) => {
                let job_id = record.job.job_id.clone();
                let found = Found { job_id, index: 0, body_hash: body_hash.clone() };
                (Lookup::Key(&record.tenant, key).index_key(), found.encode_to_vec())
            }
            None => (String::new(), Vec::new()),
        };
        let answer: Vec<Vec<u8>> = self
            .base
            .script("store a job", &self.base.scripts.create, now, |invocation| {
                invocation.arg(&record.job.job_id).arg(&record.tenant).arg(&name).arg(&entry);
                invocation.arg(max_queued).arg(quota.max_queued.map_or(-1, |most| most as i64));
                invocation.arg(quota.images_per_minute.unwrap_or_default());
                invocation.arg(quota.withheld_per_minute.unwrap_or_default());
                invocation.arg(record.job.images.len()).arg(lookups.len());
                for (key, found) in &lookups {
                    invocation.arg(key).arg(found.encode_to_vec());
                }
                invocation.arg(record.shards.len());
                add_change(invocation, None, &record, false, &events);
            })
            .await?;
        let value = answer.get(1).map(Vec::as_slice).unwrap_or_default();
        match answer.first().map(Vec::as_slice) {
            Some(b"new") => Ok(Created::New(Box::new(record))),
            Some(b"full") => Ok(Created::Full(Full::Queue)),
            Some(b"tenant") => Ok(Created::Full(Full::Tenant)),
            Some(b"rate") => Ok(Created::Full(Full::Rate { wait_ms: wait_ms(value)? })),
            Some(b"withheld") => Ok(Created::Full(Full::Withheld { wait_ms: wait_ms(value)? })),
            _ => Ok(Created::Existing(decode(value, "a lookup")?)),
        }
    }

    async fn get(&self, job: JobId) -> Result<Option<JobRecord>, StoreError> {
        Ok(self.base.read(job).await?.map(|found| found.record))
    }

    async fn list(
        &self,
        tenant: Option<&str>,
        before: Option<JobId>,
        limit: usize,
    ) -> Result<Vec<JobRecord>, StoreError> {
        let key = &match tenant {
            Some(tenant) => self.base.key(&format!("jobs:{tenant}")),
            None => self.base.key("jobs"),
        };
        let mut from = before.map_or_else(|| "+".to_owned(), |id| format!("({id}"));
        let mut records = Vec::new();
        // More than once only where some cannot be read.
        while records.len() < limit {
            let (first, wanted) = (&from, limit - records.len());
            let most = isize::try_from(wanted).unwrap_or(isize::MAX);
            let ids: Vec<String> = self
                .base
                .link
                .run("list jobs", |mut connection| async move {
                    connection.zrevrangebylex_limit(key, first, "-", 0, most).await
                })
                .await?;
            records.extend(self.records(&ids).await?);
            match ids.last() {
                Some(last) if ids.len() == wanted => from = format!("({last}"),
                _ => break,
            }
        }
        Ok(records)
    }

    async fn apply(
        &self,
        job: JobId,
        transition: Transition,
        now: i64,
    ) -> Result<Applied, StoreError> {
        self.writers.apply(job, transition, now).await
    }

    async fn take(
        &self,
        queue: &QueueName,
        limit: usize,
        now: i64,
    ) -> Result<Vec<ActiveShard>, StoreError> {
        let taken: Vec<Vec<u8>> = self
            .base
            .script("take shards", &self.base.scripts.take, now, |invocation| {
                let claim = millis(CLAIM);
                invocation.arg(queue_key(queue)).arg(limit).arg(claim);
            })
            .await?;
        taken.iter().map(|bytes| decode(bytes, "a shard")).collect()
    }

    async fn expired(&self, now: i64, limit: usize) -> Result<Vec<ActiveShard>, StoreError> {
        // Lua's numbers are doubles.
        let limit = limit.min(i32::MAX as usize);
        let expired: Vec<Vec<u8>> = self
            .base
            .script("read leases", &self.base.scripts.expired, now, |invocation| {
                invocation.arg(limit);
            })
            .await?;
        expired.iter().map(|bytes| decode(bytes, "a shard")).collect()
    }

    async fn backlog(&self, now: i64) -> Result<Backlog, StoreError> {
        type Answer = (Vec<(String, usize)>, usize, Option<f64>);
        let (waiting, running, next): Answer =
            self.base.script("count shards", &self.base.scripts.backlog, now, |_| {}).await?;
        let mut queued = BTreeMap::new();
        for (name, count) in waiting {
            let queue = name.rsplit_once('|').map_or(name.as_str(), |(queue, _)| queue);
            *queued.entry(queue_name(queue)).or_default() += count;
        }
        Ok(Backlog { queued, running, next_due_unix_ms: next.map(|due| due as i64) })
    }

    async fn events(
        &self,
        job: JobId,
        after: u64,
        limit: usize,
    ) -> Result<Vec<WatchJobResponse>, StoreError> {
        let (key, from) = (&self.base.key(&format!("events:{job}")), after.saturating_add(1));
        type Entry = (String, (String, Vec<u8>));
        let entries: Vec<Entry> = self
            .base
            .link
            .run("read events", |mut connection| async move {
                let mut command = ::redis::cmd("XRANGE");
                command.arg(key).arg(from).arg("+").arg("COUNT").arg(limit);
                command.query_async(&mut connection).await
            })
            .await?;
        entries.iter().map(|(_, (_, bytes))| decode(bytes, "an event")).collect()
    }

    async fn find(&self, lookup: Lookup<'_>) -> Result<Option<Found>, StoreError> {
        let key = &self.base.key(&format!("lookup:{}", lookup.index_key()));
        let found: Option<Vec<u8>> = self
            .base
            .link
            .run("look up", |mut connection| async move { connection.get(key).await })
            .await?;
        found.map(|bytes| decode(&bytes, "a lookup")).transpose()
    }

    fn changes(&self) -> Option<mpsc::Receiver<Change>> {
        let (news, changes) = mpsc::channel(NEWS);
        self.live
            .get_or_init(|| Live::start(&self.base.link, &self.base.key("live:"), news.clone()));
        tail::follow(Arc::clone(&self.base.link), self.base.key("bell"), news);
        Some(changes)
    }

    fn tell(&self, job: JobId, step: &StepProgress) {
        if let Some(live) = self.live.get() {
            live.tell(job, step);
        }
    }

    fn listen(&self, job: JobId, on: bool) {
        if let Some(live) = self.live.get() {
            live.listen(job, on);
        }
    }

    async fn clock(&self) -> Result<i64, StoreError> {
        let (seconds, micros): (i64, i64) = self
            .base
            .link
            .once("read the time", |mut connection| async move {
                ::redis::cmd("TIME").query_async(&mut connection).await
            })
            .await?;
        Ok(seconds * 1_000 + micros / 1_000)
    }

    async fn mend(&self, clock: &Clock) -> Result<usize, StoreError> {
        let (open, mender) = (&self.base.key("open"), &self.base.key("mender"));
        let options = SetOptions::default()
            .conditional_set(ExistenceCheck::NX)
            .with_expiration(SetExpiry::PX(MENDING.as_millis() as u64));
        let mine: bool = self
            .base
            .link
            .once("take a turn at mending", |mut connection| async move {
                connection.set_options(mender, "", options).await
            })
            .await?;
        let (mut cursor, mut mended) = (0u64, 0);
        if !mine {
            return Ok(0);
        }
        loop {
            let begun = Instant::now();
            let (next, ids): (u64, Vec<String>) = self
                .base
                .link
                .run("read open jobs", |mut connection| async move {
                    let mut command = ::redis::cmd("SSCAN");
                    command.arg(open).arg(cursor).arg("COUNT").arg(MENDED_AT_ONCE);
                    command.query_async(&mut connection).await
                })
                .await?;
            mended += self.mend_jobs(&ids, clock.now()).await?;
            cursor = next;
            if cursor == 0 {
                break;
            }
            // Redis has other things to do.
            tokio::time::sleep(4 * begun.elapsed()).await;
        }
        self.base
            .link
            .run("end a turn at mending", |mut connection| async move {
                connection.del::<_, ()>(mender).await
            })
            .await?;
        Ok(mended)
    }

    async fn join(&self, member: Member, now: i64, ttl_ms: i64) -> Result<(), StoreError> {
        let seen = Seen::entries(&member);
        self.base
            .script("join", &self.base.scripts.members, now, |invocation| {
                invocation.arg("join").arg(member_key(&member.key())).arg(&member.registration);
                invocation.arg(now.saturating_add(ttl_ms)).arg(member.encode_to_vec());
                invocation.arg(seen.len()).arg(&seen);
            })
            .await
    }

    async fn keep(
        &self,
        members: &[MemberKey],
        now: i64,
        ttl_ms: i64,
    ) -> Result<Vec<MemberKey>, StoreError> {
        let lost: Vec<usize> = self
            .base
            .script("renew", &self.base.scripts.members, now, |invocation| {
                invocation.arg("keep").arg(now.saturating_add(ttl_ms)).arg(members.len());
                for member in members {
                    invocation.arg(member_key(member)).arg(&member.registration);
                }
            })
            .await?;
        Ok(lost.into_iter().filter_map(|index| members.get(index)).cloned().collect())
    }

    async fn leave(&self, member: &MemberKey) -> Result<bool, StoreError> {
        self.base
            .script("leave", &self.base.scripts.members, 0, |invocation| {
                invocation.arg("leave").arg(member_key(member)).arg(&member.registration);
            })
            .await
    }

    async fn charge(&self, charge: Charge, now: i64) -> Result<bool, StoreError> {
        let Charge { tenant, images, per_minute } = charge;
        let charge = |invocation: &mut ScriptInvocation<'_>| {
            invocation.arg(&tenant).arg(images).arg(per_minute.max(1));
        };
        let scripts = &self.base.scripts;
        self.base.script("count withheld images", &scripts.charge, now, charge).await
    }

    async fn retire(&self, concept: &str) -> Result<BTreeSet<String>, StoreError> {
        let mut seen = Seen::default();
        let key = &self.base.key("seen");
        let entries: Vec<String> =
            self.base
                .link
                .run("read what was seen", |mut connection| async move {
                    connection.smembers(key).await
                })
                .await?;
        for entry in &entries {
            seen.insert(entry)?;
        }
        let gone = seen.retire(concept);
        self.base
            .script::<()>("retire a concept", &self.base.scripts.members, 0, |invocation| {
                invocation.arg("retire").arg(gone.len());
                for probe in &gone {
                    invocation.arg(Seen::entry(probe));
                }
            })
            .await?;
        Ok(gone.into_iter().map(|probe| probe.energy).collect())
    }

    async fn recall(&self, seen: &Seen) -> Result<(), StoreError> {
        let entries = seen.all_entries();
        self.base
            .script("recall", &self.base.scripts.members, 0, |invocation| {
                invocation.arg("recall").arg(entries.len()).arg(&entries);
            })
            .await
    }

    fn is_shared(&self) -> bool {
        true
    }

    async fn roster(&self, known: Option<u64>, now: i64) -> Result<Option<Roster>, StoreError> {
        type Entries = Option<Vec<String>>;
        type Answer = (u64, Option<Vec<Vec<u8>>>, Entries, Entries);
        let (version, members, seen, retired): Answer = self
            .base
            .script("read the roster", &self.base.scripts.members, now, |invocation| {
                let known = known.map(|version| version.to_string()).unwrap_or_default();
                invocation.arg("roster").arg(known);
            })
            .await?;
        let Some(members) = members else { return Ok(None) };
        let mut roster = Roster { version, ..Roster::default() };
        for bytes in members {
            roster.members.push(Arc::new(decode(&bytes, "a member")?));
        }
        roster.members.sort_by(|a, b| (a.kind, &a.id).cmp(&(b.kind, &b.id)));
        for entry in seen.unwrap_or_default() {
            roster.seen.insert(&entry)?;
        }
        for entry in retired.unwrap_or_default() {
            roster.retired.insert(&entry)?;
        }
        Ok(Some(roster))
    }

    async fn age(&self, since: Option<(u64, Duration)>) -> Result<u64, StoreError> {
        self.base
            .script("count time", &self.base.scripts.age, 0, |invocation| {
                match since {
                    Some((known, passed)) => invocation.arg(known).arg(millis(passed)),
                    None => invocation.arg("").arg(0),
                };
            })
            .await
    }

    async fn ended(&self, before: u64, limit: usize) -> Result<Vec<JobRecord>, StoreError> {
        let key = &self.base.key("aged");
        let most = isize::try_from(limit).unwrap_or(isize::MAX);
        let ids: Vec<String> = self
            .base
            .link
            .run("read ended jobs", |mut connection| async move {
                connection.zrangebyscore_limit(key, "-inf", format!("({before}"), 0, most).await
            })
            .await?;
        self.records(&ids).await
    }

    async fn forget(&self, old: Vec<JobRecord>) -> Result<(), StoreError> {
        for record in &old {
            let lookups = lookups(record, None);
            self.base
                .script::<()>("forget a job", &self.base.scripts.forget, 0, |invocation| {
                    invocation.arg(&record.job.job_id).arg(&record.tenant).arg(lookups.len());
                    for (key, _) in &lookups {
                        invocation.arg(key);
                    }
                })
                .await?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod failover;
#[cfg(test)]
mod tests;
