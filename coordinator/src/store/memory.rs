//! State in memory: for a temporary cluster and for tests. Nothing survives the process.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::Duration,
};

use async_trait::async_trait;
use fairlead_common::ids::JobId;
use fairlead_proto::v1::WatchJobResponse;
use parking_lot::Mutex;

use super::{
    Applied, Backlog, Charge, Created, Found, Lookup, Member, MemberKey, NewJob, Roster, Store,
    StoreError, enqueue, grown, lookups, members::Members, queues::Queues, rates::Rates,
};
use crate::{
    state::{ActiveShard, JobRecord, QueueName},
    transition::{self, Transition},
};

/// A store that lives as long as the process.
#[derive(Debug, Default)]
pub(crate) struct MemoryStore {
    tables: Mutex<Tables>,
}

#[derive(Debug, Default)]
struct Tables {
    jobs: BTreeMap<JobId, JobRecord>,
    queues: Queues,
    members: Members,
    rates: Rates,
    events: BTreeMap<(JobId, u64), WatchJobResponse>,
    lookups: BTreeMap<String, Found>,
    next_position: u64,
    age: u64,
    /// Jobs that have ended, by the age at their end.
    ended: BTreeSet<(u64, JobId)>,
}

impl Tables {
    fn write(&mut self, id: JobId, record: JobRecord, events: Vec<WatchJobResponse>) {
        self.queues.update(&record);
        self.events.extend(events.into_iter().map(|event| ((id, event.sequence), event)));
        let is_over = record.is_terminal();
        let before = self.jobs.insert(id, record);
        if is_over && before.is_none_or(|before| !before.is_terminal()) {
            self.ended.insert((self.age, id));
        }
    }
}

#[async_trait]
impl Store for MemoryStore {
    async fn create(&self, new: NewJob, now: i64) -> Result<Created, StoreError> {
        let NewJob { mut record, key, max_queued, quota } = new;
        let id = record.id().ok_or_else(|| StoreError::Corrupt("a new job's id".into()))?;
        let tables = &mut *self.tables.lock();
        if let Some((key, _)) = &key
            && let Some(found) = tables.lookups.get(&Lookup::Key(&record.tenant, key).index_key())
        {
            return Ok(Created::Existing(found.clone()));
        }
        let room = tables.queues.room(&record, max_queued, quota);
        if let Err(full) = room.and_then(|()| tables.rates.admit(&record, quota, now)) {
            return Ok(Created::Full(full));
        }
        let events = enqueue(&mut record, &mut tables.next_position, now);
        tables.lookups.extend(lookups(&record, key.as_ref()));
        tables.write(id, record.clone(), events);
        Ok(Created::New(Box::new(record)))
    }

    async fn get(&self, job: JobId) -> Result<Option<JobRecord>, StoreError> {
        Ok(self.tables.lock().jobs.get(&job).cloned())
    }

    async fn list(
        &self,
        tenant: Option<&str>,
        before: Option<JobId>,
        limit: usize,
    ) -> Result<Vec<JobRecord>, StoreError> {
        let tables = self.tables.lock();
        let older = |(id, _): &(&JobId, &JobRecord)| before.is_none_or(|before| **id < before);
        let theirs = |record: &&JobRecord| tenant.is_none_or(|tenant| record.tenant == tenant);
        let newest = tables.jobs.iter().rev().filter(older).map(|(_, record)| record);
        Ok(newest.filter(theirs).take(limit).cloned().collect())
    }

    async fn apply(
        &self,
        job: JobId,
        transition: Transition,
        now: i64,
    ) -> Result<Applied, StoreError> {
        let tables = &mut *self.tables.lock();
        let mut record = tables.jobs.get(&job).cloned().ok_or(StoreError::UnknownJob(job))?;
        let (effect, events) = transition::apply(&mut record, &transition, now)?;
        let has_events = !events.is_empty();
        tables.write(job, record.clone(), events);
        Ok(Applied { record, effect, has_events })
    }

    async fn charge(&self, charge: Charge, now: i64) -> Result<bool, StoreError> {
        Ok(self.tables.lock().rates.charge(&charge, now))
    }

    async fn take(
        &self,
        queue: &QueueName,
        limit: usize,
        now: i64,
    ) -> Result<Vec<ActiveShard>, StoreError> {
        Ok(self.tables.lock().queues.take(queue, limit, now))
    }

    async fn expired(&self, now: i64, limit: usize) -> Result<Vec<ActiveShard>, StoreError> {
        Ok(self.tables.lock().queues.expired(now, limit))
    }

    async fn backlog(&self, now: i64) -> Result<Backlog, StoreError> {
        Ok(self.tables.lock().queues.backlog(now))
    }

    async fn events(
        &self,
        job: JobId,
        after: u64,
        limit: usize,
    ) -> Result<Vec<WatchJobResponse>, StoreError> {
        let tables = self.tables.lock();
        let range = (job, after.saturating_add(1))..=(job, u64::MAX);
        Ok(tables.events.range(range).take(limit).map(|(_, event)| event.clone()).collect())
    }

    async fn find(&self, lookup: Lookup<'_>) -> Result<Option<Found>, StoreError> {
        Ok(self.tables.lock().lookups.get(&lookup.index_key()).cloned())
    }

    async fn join(&self, member: Member, now: i64, ttl_ms: i64) -> Result<(), StoreError> {
        self.tables.lock().members.join(member, now.saturating_add(ttl_ms));
        Ok(())
    }

    async fn keep(
        &self,
        members: &[MemberKey],
        now: i64,
        ttl_ms: i64,
    ) -> Result<Vec<MemberKey>, StoreError> {
        Ok(self.tables.lock().members.keep(members, now.saturating_add(ttl_ms)))
    }

    async fn leave(&self, member: &MemberKey) -> Result<bool, StoreError> {
        Ok(self.tables.lock().members.leave(member))
    }

    async fn retire(&self, concept: &str) -> Result<BTreeSet<String>, StoreError> {
        let gone = self.tables.lock().members.retire(concept);
        Ok(gone.into_iter().map(|probe| probe.energy).collect())
    }

    async fn roster(&self, known: Option<u64>, now: i64) -> Result<Option<Roster>, StoreError> {
        Ok(self.tables.lock().members.roster(known, now))
    }

    async fn age(&self, since: Option<(u64, Duration)>) -> Result<u64, StoreError> {
        let age = &mut self.tables.lock().age;
        *age = grown(*age, since);
        Ok(*age)
    }

    async fn ended(&self, before: u64, limit: usize) -> Result<Vec<JobRecord>, StoreError> {
        let tables = self.tables.lock();
        let old = tables.ended.iter().take_while(|(age, _)| *age < before).take(limit);
        Ok(old.filter_map(|(_, job)| tables.jobs.get(job)).cloned().collect())
    }

    async fn forget(&self, old: Vec<JobRecord>) -> Result<(), StoreError> {
        let tables = &mut *self.tables.lock();
        let gone: BTreeSet<JobId> = old.iter().filter_map(JobRecord::id).collect();
        let names: BTreeSet<&str> = old.iter().map(|record| record.job.job_id.as_str()).collect();
        tables.jobs.retain(|job, _| !gone.contains(job));
        tables.ended.retain(|(_, job)| !gone.contains(job));
        tables.events.retain(|(job, _), _| !gone.contains(job));
        tables.lookups.retain(|_, found| !names.contains(found.job_id.as_str()));
        Ok(())
    }
}
