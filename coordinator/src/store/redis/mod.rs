//! The durable store that several coordinators share: Redis. A job is one record; a transition reads
//! it, runs [`crate::transition`] and writes it back with one script that refuses if somebody else has
//! written in between. The same script moves the job's shards between queues and leases and appends its
//! events, so that no reader sees half of it. `prelude.lua` lists the keys.

mod link;
mod live;
mod tail;

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::{Arc, OnceLock},
};

use ::redis::{AsyncCommands, FromRedisValue, Script, ScriptInvocation};
use async_trait::async_trait;
use fairlead_common::ids::JobId;
use fairlead_proto::v1::{StepProgress, WatchJobResponse};
use prost::Message;
use tokio::sync::mpsc;

pub(crate) use self::link::without_password;
use self::{link::Link, live::Live};
use super::{
    Applied, Backlog, CLAIM, Change, Created, Found, Full, Lookup, Member, MemberKey, NewJob,
    Roster, Seen, Store, StoreError, decode, enqueue, lookups,
};
use crate::{
    clock::millis,
    state::{ActiveShard, JobRecord, QueueName},
    transition::{self, Effect, Transition},
};

/// How often a transition is tried that others keep getting ahead of.
const CONFLICTS: u32 = 100;

/// News that wait for the coordinator; more wait in Redis.
const NEWS: usize = 1_024;
/// Jobs looked at in one read while mending.
const MENDED_AT_ONCE: usize = 100;

/// A store in a Redis that any number of coordinators use.
#[derive(Debug)]
pub(crate) struct RedisStore {
    link: Arc<Link>,
    /// Begins every key.
    prefix: String,
    scripts: Scripts,
    live: OnceLock<Live>,
}

#[derive(Debug)]
struct Scripts {
    create: Script,
    write: Script,
    take: Script,
    expired: Script,
    forget: Script,
    mend: Script,
    members: Script,
}

impl Scripts {
    fn new() -> Self {
        let script = |body| Script::new(&[include_str!("prelude.lua"), body].concat());
        Self {
            create: script(include_str!("create.lua")),
            write: script(include_str!("write.lua")),
            take: script(include_str!("take.lua")),
            expired: script(include_str!("expired.lua")),
            forget: script(include_str!("forget.lua")),
            mend: script(include_str!("mend.lua")),
            members: script(include_str!("members.lua")),
        }
    }
}

/// A record and the version it was read at.
struct Versioned {
    version: u64,
    record: JobRecord,
}

impl RedisStore {
    /// Whether `url` says where a Redis is.
    pub(crate) fn check(url: &str) -> Result<(), StoreError> {
        Link::new(url).map(drop)
    }

    /// A store under `prefix`, which tells clusters apart that share a Redis. Nothing is connected yet.
    pub(crate) fn new(url: &str, prefix: &str) -> Result<Self, StoreError> {
        let link = Arc::new(Link::new(url)?);
        Ok(Self {
            link,
            prefix: format!("{{{prefix}}}"),
            scripts: Scripts::new(),
            live: OnceLock::new(),
        })
    }

    fn key(&self, name: &str) -> String {
        format!("{}:{name}", self.prefix)
    }

    fn job_key(&self, job: JobId) -> String {
        self.key(&format!("job:{job}"))
    }

    /// Runs a script with the arguments that `arguments` adds to the prefix and the time.
    async fn script<T: FromRedisValue>(
        &self,
        what: &'static str,
        script: &Script,
        now: i64,
        arguments: impl Fn(&mut ScriptInvocation<'_>),
    ) -> Result<T, StoreError> {
        let mut invocation = script.key(&self.prefix);
        invocation.arg(now);
        arguments(&mut invocation);
        let invocation = &invocation;
        self.link
            .run(what, |mut connection| async move {
                invocation.invoke_async::<T>(&mut connection).await
            })
            .await
    }

    async fn read(&self, job: JobId) -> Result<Option<Versioned>, StoreError> {
        let key = &self.job_key(job);
        let found: (Option<u64>, Option<Vec<u8>>) =
            self.link
                .run("read a job", |mut connection| async move {
                    connection.hmget(key, &["v", "r"]).await
                })
                .await?;
        let (Some(version), Some(bytes)) = found else { return Ok(None) };
        Ok(Some(Versioned { version, record: decode(&bytes, "a job")? }))
    }

    async fn mend_job(&self, job: JobId, now: i64) -> Result<usize, StoreError> {
        let Some(Versioned { version, record }) = self.read(job).await? else { return Ok(0) };
        let active: Vec<ActiveShard> = record.active().collect();
        self.script("mend a job", &self.scripts.mend, now, |invocation| {
            invocation.arg(&record.job.job_id).arg(&record.tenant).arg(version);
            add_shards(invocation, &active);
        })
        .await
    }

    async fn records(&self, ids: &[String]) -> Result<Vec<JobRecord>, StoreError> {
        if ids.is_empty() {
            return Ok(Vec::new());
        }
        let mut pipeline = ::redis::pipe();
        for id in ids {
            pipeline.hget(self.key(&format!("job:{id}")), "r");
        }
        let pipeline = &pipeline;
        let found: Vec<Option<Vec<u8>>> = self
            .link
            .run("read jobs", |mut connection| async move {
                pipeline.query_async(&mut connection).await
            })
            .await?;
        found.iter().flatten().map(|bytes| decode(bytes, "a job")).collect()
    }
}

fn queue_key(QueueName { model, hash }: &QueueName) -> String {
    format!("{model}@{hash}")
}

fn queue_name(key: &str) -> QueueName {
    let (model, hash) = key.rsplit_once('@').unwrap_or((key, ""));
    QueueName { model: model.to_owned(), hash: hash.to_owned() }
}

fn member_key(MemberKey { kind, id, .. }: &MemberKey) -> String {
    format!("{}|{id}", i32::from(*kind))
}

/// Adds the arguments that `shards` in prelude.lua reads.
fn add_shards(invocation: &mut ScriptInvocation<'_>, shards: &[ActiveShard]) {
    invocation.arg(shards.len());
    for shard in shards {
        invocation
            .arg(&shard.shard_id)
            .arg(queue_key(&shard.queue))
            .arg(shard.lane.class)
            .arg(&shard.lane.tenant)
            .arg(shard.work)
            .arg(u8::from(shard.leased))
            .arg(shard.expires_unix_ms)
            .arg(shard.not_before_unix_ms)
            .arg(shard.encode_to_vec());
    }
}

/// Adds the arguments that `write` in prelude.lua reads: what makes `after` of `before`.
fn add_change(
    invocation: &mut ScriptInvocation<'_>,
    before: Option<&Versioned>,
    after: &JobRecord,
    events: &[WatchJobResponse],
) {
    let version = before.map_or(0, |before| before.version);
    let was_open = before.is_none_or(|before| !before.record.is_terminal());
    let ended = match was_open && after.is_terminal() {
        true => after.job.updated_unix_ms.to_string(),
        false => String::new(),
    };
    invocation.arg(version + 1).arg(after.encode_to_vec()).arg(ended).arg(events.len());
    for event in events {
        invocation.arg(event.sequence).arg(event.encode_to_vec());
    }
    let old: BTreeMap<String, ActiveShard> = before
        .into_iter()
        .flat_map(|before| before.record.active())
        .map(|shard| (shard.shard_id.clone(), shard))
        .collect();
    let changed: Vec<ActiveShard> =
        after.active().filter(|shard| old.get(&shard.shard_id) != Some(shard)).collect();
    add_shards(invocation, &changed);
    let ended = after.shards.iter().filter(|shard| shard.lease.is_terminal());
    let gone: Vec<&str> =
        ended.map(|shard| shard.id.as_str()).filter(|id| old.contains_key(*id)).collect();
    invocation.arg(gone.len());
    for id in gone {
        invocation.arg(id);
    }
}

/// Whether the stored record already holds what this very grant asks for: the answer to its first try
/// was lost.
fn was_granted(record: &JobRecord, transition: &Transition, now: i64) -> Option<Effect> {
    let Transition::Grant { shard, worker, ttl_ms } = transition else { return None };
    let shard = record.shard(*shard)?;
    let lease = &shard.lease;
    let is_it = lease.holder() == worker && lease.expires_unix_ms() == now.saturating_add(*ttl_ms);
    is_it.then_some(Effect::Granted { lease: shard.key()?, attempt: lease.deliveries() })
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
            .script("store a job", &self.scripts.create, now, |invocation| {
                invocation.arg(&record.job.job_id).arg(&record.tenant).arg(&name).arg(&entry);
                invocation.arg(max_queued).arg(quota.max_queued.map_or(-1, |most| most as i64));
                invocation.arg(quota.images_per_minute.unwrap_or_default());
                invocation.arg(record.job.images.len()).arg(lookups.len());
                for (key, found) in &lookups {
                    invocation.arg(key).arg(found.encode_to_vec());
                }
                invocation.arg(record.shards.len());
                add_change(invocation, None, &record, &events);
            })
            .await?;
        let value = answer.get(1).map(Vec::as_slice).unwrap_or_default();
        match answer.first().map(Vec::as_slice) {
            Some(b"new") => Ok(Created::New(Box::new(record))),
            Some(b"full") => Ok(Created::Full(Full::Queue)),
            Some(b"tenant") => Ok(Created::Full(Full::Tenant)),
            Some(b"rate") => {
                let wait_ms = std::str::from_utf8(value).ok().and_then(|wait| wait.parse().ok());
                let wait_ms =
                    wait_ms.ok_or_else(|| StoreError::Corrupt("a time to wait".to_owned()))?;
                Ok(Created::Full(Full::Rate { wait_ms }))
            }
            _ => Ok(Created::Existing(decode(value, "a lookup")?)),
        }
    }

    async fn get(&self, job: JobId) -> Result<Option<JobRecord>, StoreError> {
        Ok(self.read(job).await?.map(|found| found.record))
    }

    async fn list(
        &self,
        tenant: Option<&str>,
        before: Option<JobId>,
        limit: usize,
    ) -> Result<Vec<JobRecord>, StoreError> {
        let key = &match tenant {
            Some(tenant) => self.key(&format!("jobs:{tenant}")),
            None => self.key("jobs"),
        };
        let from = &before.map_or_else(|| "+".to_owned(), |id| format!("({id}"));
        let limit = isize::try_from(limit).unwrap_or(isize::MAX);
        let ids: Vec<String> = self
            .link
            .run("list jobs", |mut connection| async move {
                connection.zrevrangebylex_limit(key, from, "-", 0, limit).await
            })
            .await?;
        self.records(&ids).await
    }

    async fn apply(
        &self,
        job: JobId,
        transition: Transition,
        now: i64,
    ) -> Result<Applied, StoreError> {
        for attempt in 0..CONFLICTS {
            let before = self.read(job).await?.ok_or(StoreError::UnknownJob(job))?;
            let mut record = before.record.clone();
            let (effect, events) = match transition::apply(&mut record, &transition, now) {
                Ok(applied) => applied,
                Err(refusal) if attempt > 0 => {
                    let effect = was_granted(&before.record, &transition, now).ok_or(refusal)?;
                    return Ok(Applied { record: before.record, effect, has_events: true });
                }
                Err(refusal) => return Err(refusal.into()),
            };
            let written: bool = self
                .script("write a job", &self.scripts.write, now, |invocation| {
                    invocation.arg(job.to_string()).arg(before.version);
                    add_change(invocation, Some(&before), &record, &events);
                })
                .await?;
            if written {
                return Ok(Applied { record, effect, has_events: !events.is_empty() });
            }
        }
        let problem = format!("job {job} changed {CONFLICTS} times while it was written");
        Err(StoreError::Backend { what: "write a job", problem })
    }

    async fn take(
        &self,
        queue: &QueueName,
        limit: usize,
        now: i64,
    ) -> Result<Vec<ActiveShard>, StoreError> {
        let taken: Vec<Vec<u8>> = self
            .script("take shards", &self.scripts.take, now, |invocation| {
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
            .script("read leases", &self.scripts.expired, now, |invocation| {
                invocation.arg(limit);
            })
            .await?;
        expired.iter().map(|bytes| decode(bytes, "a shard")).collect()
    }

    async fn backlog(&self, now: i64) -> Result<Backlog, StoreError> {
        let mut pipeline = ::redis::pipe();
        pipeline
            .hgetall(self.key("queued"))
            .zcard(self.key("leases"))
            .zrangebyscore_limit_withscores(self.key("delayed"), format!("({now}"), "+inf", 0, 1);
        let pipeline = &pipeline;
        type Counts = (BTreeMap<String, i64>, usize, Vec<(String, f64)>);
        let (queued, running, next): Counts = self
            .link
            .run("count shards", |mut connection| async move {
                pipeline.query_async(&mut connection).await
            })
            .await?;
        let mut of_queues = BTreeMap::new();
        for (key, count) in queued {
            let queue = key.rsplit_once('|').map_or(key.as_str(), |(queue, _)| queue);
            *of_queues.entry(queue_name(queue)).or_default() += usize::try_from(count).unwrap_or(0);
        }
        of_queues.retain(|_, count| *count > 0);
        let next_due_unix_ms = next.first().map(|(_, due)| *due as i64);
        Ok(Backlog { queued: of_queues, running, next_due_unix_ms })
    }

    async fn events(
        &self,
        job: JobId,
        after: u64,
        limit: usize,
    ) -> Result<Vec<WatchJobResponse>, StoreError> {
        let (key, from) = (&self.key(&format!("events:{job}")), after.saturating_add(1));
        type Entry = (String, (String, Vec<u8>));
        let entries: Vec<Entry> = self
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
        let key = &self.key(&format!("lookup:{}", lookup.index_key()));
        let found: Option<Vec<u8>> = self
            .link
            .run("look up", |mut connection| async move { connection.get(key).await })
            .await?;
        found.map(|bytes| decode(&bytes, "a lookup")).transpose()
    }

    fn changes(&self) -> Option<mpsc::Receiver<Change>> {
        let (news, changes) = mpsc::channel(NEWS);
        self.live.get_or_init(|| Live::start(&self.link, &self.key("live:"), news.clone()));
        tail::follow(Arc::clone(&self.link), self.key("bell"), news);
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
            .link
            .run("read the time", |mut connection| async move {
                ::redis::cmd("TIME").query_async(&mut connection).await
            })
            .await?;
        Ok(seconds * 1_000 + micros / 1_000)
    }

    async fn mend(&self, now: i64) -> Result<usize, StoreError> {
        let key = &self.key("open");
        let (mut cursor, mut mended) = (0u64, 0);
        loop {
            let (next, ids): (u64, Vec<JobId>) = self
                .link
                .run("read open jobs", |mut connection| async move {
                    let mut command = ::redis::cmd("SSCAN");
                    command.arg(key).arg(cursor).arg("COUNT").arg(MENDED_AT_ONCE);
                    let (next, ids): (u64, Vec<String>) =
                        command.query_async(&mut connection).await?;
                    Ok((next, ids.iter().filter_map(|id| id.parse().ok()).collect()))
                })
                .await?;
            for job in ids {
                mended += self.mend_job(job, now).await?;
            }
            cursor = next;
            if cursor == 0 {
                return Ok(mended);
            }
        }
    }

    async fn join(&self, member: Member, now: i64, ttl_ms: i64) -> Result<(), StoreError> {
        let seen = Seen::entries(&member);
        self.script("join", &self.scripts.members, now, |invocation| {
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
            .script("renew", &self.scripts.members, now, |invocation| {
                invocation.arg("keep").arg(now.saturating_add(ttl_ms)).arg(members.len());
                for member in members {
                    invocation.arg(member_key(member)).arg(&member.registration);
                }
            })
            .await?;
        Ok(lost.into_iter().filter_map(|index| members.get(index)).cloned().collect())
    }

    async fn leave(&self, member: &MemberKey) -> Result<bool, StoreError> {
        self.script("leave", &self.scripts.members, 0, |invocation| {
            invocation.arg("leave").arg(member_key(member)).arg(&member.registration);
        })
        .await
    }

    async fn retire(&self, concept: &str) -> Result<BTreeSet<String>, StoreError> {
        let mut seen = Seen::default();
        let key = &self.key("seen");
        let entries: Vec<String> =
            self.link
                .run("read what was seen", |mut connection| async move {
                    connection.smembers(key).await
                })
                .await?;
        for entry in &entries {
            seen.insert(entry)?;
        }
        let gone = seen.retire(concept);
        self.script::<()>("retire a concept", &self.scripts.members, 0, |invocation| {
            invocation.arg("retire").arg(gone.len());
            for probe in &gone {
                invocation.arg(Seen::entry(probe));
            }
        })
        .await?;
        Ok(gone.into_iter().map(|probe| probe.energy).collect())
    }

    async fn roster(&self, known: Option<u64>, now: i64) -> Result<Option<Roster>, StoreError> {
        type Answer = (u64, Option<Vec<Vec<u8>>>, Option<Vec<String>>);
        let (version, members, seen): Answer = self
            .script("read the roster", &self.scripts.members, now, |invocation| {
                let known = known.map(|version| version.to_string()).unwrap_or_default();
                invocation.arg("roster").arg(known);
            })
            .await?;
        let Some(members) = members else { return Ok(None) };
        let mut roster = Roster { version, ..Roster::default() };
        for bytes in members {
            roster.members.push(Arc::new(decode(&bytes, "a member")?));
        }
        for entry in seen.unwrap_or_default() {
            roster.seen.insert(&entry)?;
        }
        Ok(Some(roster))
    }

    async fn forget(&self, before: i64, limit: usize) -> Result<Vec<JobRecord>, StoreError> {
        let key = &self.key("ended");
        let most = isize::try_from(limit).unwrap_or(isize::MAX);
        let ids: Vec<String> = self
            .link
            .run("read ended jobs", |mut connection| async move {
                connection.zrangebyscore_limit(key, "-inf", format!("({before}"), 0, most).await
            })
            .await?;
        let records = self.records(&ids).await?;
        for record in &records {
            let lookups = lookups(record, None);
            self.script::<()>("forget a job", &self.scripts.forget, before, |invocation| {
                invocation.arg(&record.job.job_id).arg(&record.tenant).arg(lookups.len());
                for (key, _) in &lookups {
                    invocation.arg(key);
                }
            })
            .await?;
        }
        Ok(records)
    }
}

#[cfg(test)]
mod tests;
