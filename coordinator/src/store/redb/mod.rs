//! The embedded durable store: one redb file. redb blocks and has one writer at a time, so calls
//! run on blocking threads and writers queue on an async lock in front of them. The order of the queues
//! is kept in memory and built when the file is opened.

mod file;
#[cfg(test)]
mod tests;

use std::{cell::RefCell, collections::BTreeSet, path::Path, sync::Arc, time::Duration};

use ::redb::{
    Database, Durability, ReadableDatabase, ReadableTable, TableDefinition, WriteTransaction,
};
use async_trait::async_trait;
use fairlead_common::ids::JobId;
use fairlead_proto::v1::WatchJobResponse;
use parking_lot::Mutex;
use prost::Message;

use self::file::{DataFile, Opening};
use super::{
    Applied, Backlog, Charge, Created, Found, Lookup, Member, MemberKey, NewJob, Roster, Seen,
    Store, StoreError, decode, enqueue, grown, lookups, members::Members, queues::Queues,
    rates::Rates, unreadable,
};
use crate::{
    state::{ActiveShard, JobRecord, QueueName},
    transition::{self, Transition},
};

type Blob = &'static [u8];

/// Job id (hyphenated hex, ordered by time) to [`JobRecord`].
const JOBS: TableDefinition<'_, &str, Blob> = TableDefinition::new("jobs");
/// Queue position to [`ActiveShard`].
const ACTIVE: TableDefinition<'_, u64, Blob> = TableDefinition::new("active");
/// Job id and sequence number to [`WatchJobResponse`].
const EVENTS: TableDefinition<'_, (&str, u64), Blob> = TableDefinition::new("events");
/// [`Lookup`] to [`Found`].
const LOOKUPS: TableDefinition<'_, &str, Blob> = TableDefinition::new("lookups");
/// JSON of a [`Probe`]'s concept and energy, or of a generator's name: [`Seen`].
const SEEN: TableDefinition<'_, &str, ()> = TableDefinition::new("seen");
/// Age of the store at a job's end, and the job's id.
const ENDED: TableDefinition<'_, (u64, &str), ()> = TableDefinition::new("ended");
/// Counters.
const META: TableDefinition<'_, &str, u64> = TableDefinition::new("meta");

const NEXT_POSITION: &str = "next_position";
const AGE: &str = "age";
const REOPENED: &str = "reopened";
const FORMAT: &str = "format";
/// Grows when stored values change their meaning.
const FORMAT_VERSION: u64 = 3;

/// A store in one file that one coordinator holds at a time.
#[derive(Debug)]
pub(crate) struct RedbStore {
    file: Arc<DataFile>,
    writer: Arc<tokio::sync::Mutex<()>>,
    /// Changed by the writer once its transaction is committed.
    queues: Arc<Mutex<Queues>>,
    /// Registrations do not outlive the process: members register again.
    members: Arc<Mutex<Members>>,
    rates: Arc<Mutex<Rates>>,
}

impl RedbStore {
    /// Opens or creates the database at `path`; blocks.
    pub(crate) fn open(path: &Path) -> Result<Self, StoreError> {
        Self::open_with(path, file::on_disk())
    }

    fn open_with(path: &Path, opening: Opening) -> Result<Self, StoreError> {
        let file = DataFile::open(path, opening, prepare)?;
        let (active, seen) = file.run("open", |db| Ok((active(db)?, seen(db)?)))?;
        Ok(Self {
            file: Arc::new(file),
            writer: Arc::default(),
            queues: Arc::new(Mutex::new(Queues::new(active))),
            members: Arc::new(Mutex::new(Members::new(seen))),
            rates: Arc::default(),
        })
    }

    /// Runs `body` in a write transaction and commits what it changed.
    async fn write<T: Send + 'static>(
        &self,
        durable: bool,
        body: impl FnOnce(&WriteTransaction) -> Result<(T, Change), StoreError> + Send + 'static,
    ) -> Result<T, StoreError> {
        let guard = Arc::clone(&self.writer).lock_owned().await;
        let (file, queues) = (Arc::clone(&self.file), Arc::clone(&self.queues));
        blocking("write", move || {
            // Held by the blocking thread: a caller that goes away does not let two writers in.
            let _guard = guard;
            file.run("write", |database| {
                let mut txn = database.begin_write().map_err(backend("write"))?;
                if !durable {
                    txn.set_durability(Durability::None).map_err(backend("write"))?;
                }
                let (value, change) = body(&txn)?;
                match change {
                    Change::None => txn.abort().map_err(backend("abort"))?,
                    Change::Other => txn.commit().map_err(backend("commit"))?,
                    Change::Shards(record) => {
                        txn.commit().map_err(backend("commit"))?;
                        queues.lock().update(&record);
                    }
                }
                Ok(value)
            })
        })
        .await
    }

    async fn read<T: Send + 'static>(
        &self,
        body: impl FnOnce(&::redb::ReadTransaction) -> Result<T, StoreError> + Send + 'static,
    ) -> Result<T, StoreError> {
        let file = Arc::clone(&self.file);
        blocking("read", move || {
            file.run("read", |database| body(&database.begin_read().map_err(backend("read"))?))
        })
        .await
    }

    /// What is kept in memory, which is worth nothing while the file cannot be written.
    fn sound<T, R>(
        &self,
        memory: &Mutex<T>,
        read: impl FnOnce(&mut T) -> R,
    ) -> Result<R, StoreError> {
        self.file.check()?;
        Ok(read(&mut memory.lock()))
    }
}

/// Makes the tables and checks the format.
fn prepare(database: &Database) -> Result<(), StoreError> {
    let txn = database.begin_write().map_err(backend("open"))?;
    {
        let jobs = txn.open_table(JOBS).map_err(backend("open"))?;
        txn.open_table(ACTIVE).map_err(backend("open"))?;
        txn.open_table(EVENTS).map_err(backend("open"))?;
        txn.open_table(LOOKUPS).map_err(backend("open"))?;
        txn.open_table(SEEN).map_err(backend("open"))?;
        let mut ended = txn.open_table(ENDED).map_err(backend("open"))?;
        let mut meta = txn.open_table(META).map_err(backend("open"))?;
        let found = meta.get(FORMAT).map_err(backend("open"))?.map(|value| value.value());
        if let Some(version) = found.filter(|&version| version != FORMAT_VERSION) {
            let problem = format!("it has format {version}, this build reads {FORMAT_VERSION}");
            return Err(StoreError::Backend { what: "open", problem });
        }
        meta.insert(FORMAT, FORMAT_VERSION).map_err(backend("open"))?;
        // A release before noted ends by the clock: as if those jobs had ended now.
        if meta.get(AGE).map_err(backend("open"))?.is_none() {
            meta.insert(AGE, 0).map_err(backend("open"))?;
            for entry in jobs.iter().map_err(backend("jobs"))? {
                let (id, value) = entry.map_err(backend("jobs"))?;
                if readable(id.value(), value.value()).is_some_and(|record| record.is_terminal()) {
                    ended.insert((0, id.value()), ()).map_err(backend("ended"))?;
                }
            }
        }
    }
    txn.commit().map_err(backend("open"))
}

async fn blocking<T: Send + 'static>(
    what: &'static str,
    body: impl FnOnce() -> Result<T, StoreError> + Send + 'static,
) -> Result<T, StoreError> {
    tokio::task::spawn_blocking(body)
        .await
        .unwrap_or_else(|error| Err(StoreError::Backend { what, problem: error.to_string() }))
}

/// An error of redb. One of the disk is none of the store: it may go away.
fn backend<E: Into<::redb::Error>>(what: &'static str) -> impl FnOnce(E) -> StoreError {
    move |error| match error.into() {
        error @ (::redb::Error::Io(_) | ::redb::Error::PreviousIo) => {
            StoreError::Away { what, problem: error.to_string() }
        }
        error => StoreError::Backend { what, problem: error.to_string() },
    }
}

/// What a write transaction changed.
enum Change {
    /// Nothing: it is not committed.
    None,
    /// Nothing that queues show.
    Other,
    /// This job and its shards.
    Shards(Box<JobRecord>),
}

/// Every shard that has not ended.
fn active(database: &Database) -> Result<Vec<ActiveShard>, StoreError> {
    let txn = database.begin_read().map_err(backend("read"))?;
    let active = txn.open_table(ACTIVE).map_err(backend("active"))?;
    let entries = active.iter().map_err(backend("active"))?;
    let mut shards = Vec::new();
    for entry in entries {
        match decode(entry.map_err(backend("active"))?.1.value(), "a queued shard") {
            Ok(shard) => shards.push(shard),
            Err(error) => tracing::error!(%error, "left out"),
        }
    }
    Ok(shards)
}

/// What members of earlier processes had.
fn seen(database: &Database) -> Result<Seen, StoreError> {
    let txn = database.begin_read().map_err(backend("read"))?;
    let table = txn.open_table(SEEN).map_err(backend("seen"))?;
    let mut seen = Seen::default();
    for entry in table.iter().map_err(backend("seen"))? {
        seen.insert(entry.map_err(backend("seen"))?.0.value())?;
    }
    Ok(seen)
}

/// Writes a job's record, events and index entries.
fn put(
    txn: &WriteTransaction,
    record: &JobRecord,
    events: &[WatchJobResponse],
) -> Result<(), StoreError> {
    let id = record.job.job_id.as_str();
    let mut jobs = txn.open_table(JOBS).map_err(backend("jobs"))?;
    jobs.insert(id, record.encode_to_vec().as_slice()).map_err(backend("jobs"))?;
    let mut active = txn.open_table(ACTIVE).map_err(backend("active"))?;
    for shard in record.shards.iter().filter(|shard| shard.lease.is_terminal()) {
        active.remove(shard.position).map_err(backend("active"))?;
    }
    for shard in record.active() {
        let value = shard.encode_to_vec();
        active.insert(shard.position, value.as_slice()).map_err(backend("active"))?;
    }
    let mut table = txn.open_table(EVENTS).map_err(backend("events"))?;
    for event in events {
        let value = event.encode_to_vec();
        table.insert((id, event.sequence), value.as_slice()).map_err(backend("events"))?;
    }
    Ok(())
}

/// Notes how old the store is at the end of a job.
fn end(txn: &WriteTransaction, job: &str) -> Result<(), StoreError> {
    let age = number(&txn.open_table(META).map_err(backend("meta"))?, AGE)?;
    let mut ended = txn.open_table(ENDED).map_err(backend("ended"))?;
    ended.insert((age, job), ()).map_err(backend("ended"))?;
    Ok(())
}

/// A counter; one that was never set is 0.
fn number(meta: &impl ReadableTable<&'static str, u64>, name: &str) -> Result<u64, StoreError> {
    let found = meta.get(name).map_err(backend("meta"))?;
    Ok(found.map(|value| value.value()).unwrap_or_default())
}

/// A stored job; one that cannot be read is reported and left out, so that it does not hide the others.
fn readable(id: &str, bytes: &[u8]) -> Option<JobRecord> {
    decode(bytes, "a job").inspect_err(|error| unreadable(id, error)).ok()
}

fn get(txn: &WriteTransaction, job: JobId) -> Result<Option<JobRecord>, StoreError> {
    let jobs = txn.open_table(JOBS).map_err(backend("jobs"))?;
    let bytes = jobs.get(job.to_string().as_str()).map_err(backend("jobs"))?;
    bytes.map(|bytes| decode(bytes.value(), "a job")).transpose()
}

fn create(
    txn: &WriteTransaction,
    new: NewJob,
    queues: &Queues,
    rates: &mut Rates,
    now: i64,
) -> Result<Created, StoreError> {
    let NewJob { mut record, key, max_queued, quota } = new;
    {
        let mut index = txn.open_table(LOOKUPS).map_err(backend("lookups"))?;
        if let Some((key, _)) = &key {
            let key = Lookup::Key(&record.tenant, key).index_key();
            if let Some(found) = index.get(key.as_str()).map_err(backend("lookups"))? {
                return Ok(Created::Existing(decode(found.value(), "a lookup")?));
            }
        }
        let room = queues.room(&record, max_queued, quota);
        if let Err(full) = room.and_then(|()| rates.admit(&record, quota, now)) {
            return Ok(Created::Full(full));
        }
        for (key, found) in lookups(&record, key.as_ref()) {
            let value = found.encode_to_vec();
            index.insert(key.as_str(), value.as_slice()).map_err(backend("lookups"))?;
        }
    }
    let mut meta = txn.open_table(META).map_err(backend("meta"))?;
    let position = meta.get(NEXT_POSITION).map_err(backend("meta"))?;
    let mut position = position.map(|value| value.value()).unwrap_or_default();
    let events = enqueue(&mut record, &mut position, now);
    meta.insert(NEXT_POSITION, position).map_err(backend("meta"))?;
    put(txn, &record, &events)?;
    Ok(Created::New(Box::new(record)))
}

fn forget(txn: &WriteTransaction, old: &[JobRecord]) -> Result<(), StoreError> {
    let mut jobs = txn.open_table(JOBS).map_err(backend("jobs"))?;
    let mut events = txn.open_table(EVENTS).map_err(backend("events"))?;
    let mut index = txn.open_table(LOOKUPS).map_err(backend("lookups"))?;
    let names: BTreeSet<&str> = old.iter().map(|record| record.job.job_id.as_str()).collect();
    for record in old {
        let id = record.job.job_id.as_str();
        jobs.remove(id).map_err(backend("jobs"))?;
        events.retain_in((id, 0)..=(id, u64::MAX), |_, _| false).map_err(backend("events"))?;
        for (key, _) in lookups(record, None) {
            index.remove(key.as_str()).map_err(backend("lookups"))?;
        }
    }
    let mut ended = txn.open_table(ENDED).map_err(backend("ended"))?;
    // The oldest come first.
    let mut left = names.len();
    let of_them = ended.extract_if(|(_, id), ()| names.contains(id)).map_err(backend("ended"))?;
    for entry in of_them {
        entry.map_err(backend("ended"))?;
        left = left.saturating_sub(1);
        if left == 0 {
            break;
        }
    }
    // Which keys lead to them only the keys tell: one look at all for all.
    let gone = |found: &[u8]| {
        Found::decode(found).is_ok_and(|found| names.contains(found.job_id.as_str()))
    };
    index.retain_in("key/".."key0", |_, found| !gone(found)).map_err(backend("lookups"))?;
    Ok(())
}

#[async_trait]
impl Store for RedbStore {
    async fn create(&self, new: NewJob, now: i64) -> Result<Created, StoreError> {
        let (queues, rates) = (Arc::clone(&self.queues), Arc::clone(&self.rates));
        self.write(true, move |txn| {
            let created = create(txn, new, &queues.lock(), &mut rates.lock(), now)?;
            let change = match &created {
                Created::New(record) => Change::Shards(record.clone()),
                Created::Existing(_) | Created::Full(_) => Change::None,
            };
            Ok((created, change))
        })
        .await
    }

    async fn get(&self, job: JobId) -> Result<Option<JobRecord>, StoreError> {
        self.read(move |txn| {
            let jobs = txn.open_table(JOBS).map_err(backend("jobs"))?;
            let bytes = jobs.get(job.to_string().as_str()).map_err(backend("jobs"))?;
            bytes.map(|bytes| decode(bytes.value(), "a job")).transpose()
        })
        .await
    }

    async fn list(
        &self,
        tenant: Option<&str>,
        before: Option<JobId>,
        limit: usize,
    ) -> Result<Vec<JobRecord>, StoreError> {
        let tenant = tenant.map(str::to_owned);
        self.read(move |txn| {
            let jobs = txn.open_table(JOBS).map_err(backend("jobs"))?;
            let before = before.map(|id| id.to_string());
            let range = match &before {
                Some(before) => jobs.range::<&str>(..before.as_str()),
                None => jobs.range::<&str>(..),
            };
            let newest = range.map_err(backend("jobs"))?.rev();
            let mut records = Vec::new();
            for entry in newest {
                let (id, value) = entry.map_err(backend("jobs"))?;
                let record = readable(id.value(), value.value());
                let is_theirs = |record: &JobRecord| {
                    tenant.as_ref().is_none_or(|tenant| record.tenant == *tenant)
                };
                records.extend(record.filter(is_theirs));
                if records.len() >= limit {
                    break;
                }
            }
            records.truncate(limit);
            Ok(records)
        })
        .await
    }

    async fn apply(
        &self,
        job: JobId,
        transition: Transition,
        now: i64,
    ) -> Result<Applied, StoreError> {
        self.write(transition.must_be_durable(), move |txn| {
            let mut record = get(txn, job)?.ok_or(StoreError::UnknownJob(job))?;
            let was_open = !record.is_terminal();
            let (effect, events) = transition::apply(&mut record, &transition, now)?;
            put(txn, &record, &events)?;
            if was_open && record.is_terminal() {
                end(txn, &record.job.job_id)?;
            }
            let change = Change::Shards(Box::new(record.clone()));
            Ok((Applied { record, effect, has_events: !events.is_empty() }, change))
        })
        .await
    }

    async fn charge(&self, charge: Charge, now: i64) -> Result<bool, StoreError> {
        Ok(self.rates.lock().charge(&charge, now))
    }

    async fn take(
        &self,
        queue: &QueueName,
        limit: usize,
        now: i64,
    ) -> Result<Vec<ActiveShard>, StoreError> {
        self.sound(&self.queues, |queues| queues.take(queue, limit, now))
    }

    async fn expired(&self, now: i64, limit: usize) -> Result<Vec<ActiveShard>, StoreError> {
        self.sound(&self.queues, |queues| queues.expired(now, limit))
    }

    async fn backlog(&self, now: i64) -> Result<Backlog, StoreError> {
        self.sound(&self.queues, |queues| queues.backlog(now))
    }

    async fn events(
        &self,
        job: JobId,
        after: u64,
        limit: usize,
    ) -> Result<Vec<WatchJobResponse>, StoreError> {
        self.read(move |txn| {
            let events = txn.open_table(EVENTS).map_err(backend("events"))?;
            let id = job.to_string();
            let range = (id.as_str(), after.saturating_add(1))..=(id.as_str(), u64::MAX);
            let entries = events.range(range).map_err(backend("events"))?.take(limit);
            entries
                .map(|entry| decode(entry.map_err(backend("events"))?.1.value(), "an event"))
                .collect()
        })
        .await
    }

    async fn find(&self, lookup: Lookup<'_>) -> Result<Option<Found>, StoreError> {
        let key = lookup.index_key();
        self.read(move |txn| {
            let index = txn.open_table(LOOKUPS).map_err(backend("lookups"))?;
            let found = index.get(key.as_str()).map_err(backend("lookups"))?;
            found.map(|found| decode(found.value(), "a lookup")).transpose()
        })
        .await
    }

    async fn join(&self, member: Member, now: i64, ttl_ms: i64) -> Result<(), StoreError> {
        let entries = Seen::entries(&member);
        if !self.sound(&self.members, |known| known.join(member, now.saturating_add(ttl_ms)))? {
            return Ok(());
        }
        self.write(true, move |txn| {
            let mut table = txn.open_table(SEEN).map_err(backend("seen"))?;
            for entry in &entries {
                table.insert(entry.as_str(), ()).map_err(backend("seen"))?;
            }
            Ok(((), Change::Other))
        })
        .await
    }

    async fn keep(
        &self,
        members: &[MemberKey],
        now: i64,
        ttl_ms: i64,
    ) -> Result<Vec<MemberKey>, StoreError> {
        self.sound(&self.members, |known| known.keep(members, now.saturating_add(ttl_ms)))
    }

    async fn leave(&self, member: &MemberKey) -> Result<bool, StoreError> {
        self.sound(&self.members, |members| members.leave(member))
    }

    async fn retire(&self, concept: &str) -> Result<BTreeSet<String>, StoreError> {
        let gone = self.sound(&self.members, |members| members.retire(concept))?;
        let entries: Vec<String> = gone.iter().map(Seen::entry).collect();
        self.write(true, move |txn| {
            let mut table = txn.open_table(SEEN).map_err(backend("seen"))?;
            for entry in &entries {
                table.remove(entry.as_str()).map_err(backend("seen"))?;
            }
            Ok(((), Change::Other))
        })
        .await?;
        Ok(gone.into_iter().map(|probe| probe.energy).collect())
    }

    async fn roster(&self, known: Option<u64>, now: i64) -> Result<Option<Roster>, StoreError> {
        self.sound(&self.members, |members| members.roster(known, now))
    }

    async fn check(&self) -> Result<(), StoreError> {
        let (file, queues) = (Arc::clone(&self.file), Arc::clone(&self.queues));
        let guard = Arc::clone(&self.writer).lock_owned().await;
        blocking("check", move || {
            let _guard = guard;
            let stored = RefCell::new(Vec::new());
            // Written to, so that a disk that is still full is not taken for one that works.
            let is_new = file.reopen(|database| {
                let txn = database.begin_write().map_err(backend("open"))?;
                {
                    let mut meta = txn.open_table(META).map_err(backend("meta"))?;
                    let reopened = number(&meta, REOPENED)?;
                    meta.insert(REOPENED, reopened + 1).map_err(backend("meta"))?;
                }
                txn.commit().map_err(backend("commit"))?;
                *stored.borrow_mut() = active(database)?;
                Ok(())
            })?;
            if is_new {
                let mut queues = queues.lock();
                *queues = queues.again(stored.into_inner());
            }
            Ok(())
        })
        .await
    }

    async fn age(&self, since: Option<(u64, Duration)>) -> Result<u64, StoreError> {
        self.write(false, move |txn| {
            let mut meta = txn.open_table(META).map_err(backend("meta"))?;
            let before = number(&meta, AGE)?;
            let age = grown(before, since);
            meta.insert(AGE, age).map_err(backend("meta"))?;
            Ok((age, if age > before { Change::Other } else { Change::None }))
        })
        .await
    }

    async fn ended(&self, before: u64, limit: usize) -> Result<Vec<JobRecord>, StoreError> {
        self.read(move |txn| {
            let jobs = txn.open_table(JOBS).map_err(backend("jobs"))?;
            let ended = txn.open_table(ENDED).map_err(backend("ended"))?;
            let mut old = Vec::new();
            for entry in ended.range(..(before, "")).map_err(backend("ended"))? {
                let key = entry.map_err(backend("ended"))?.0;
                let id = key.value().1;
                let Some(bytes) = jobs.get(id).map_err(backend("jobs"))? else { continue };
                old.extend(readable(id, bytes.value()));
                if old.len() >= limit {
                    break;
                }
            }
            old.truncate(limit);
            Ok(old)
        })
        .await
    }

    async fn forget(&self, old: Vec<JobRecord>) -> Result<(), StoreError> {
        if old.is_empty() {
            return Ok(());
        }
        self.write(true, move |txn| Ok((forget(txn, &old)?, Change::Other))).await
    }
}
