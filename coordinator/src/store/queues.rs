//! The queues of a store that one process holds: an index over the shards that have not ended, kept
//! in memory and built from the stored jobs. Pure: `now` is an argument.
//!
//! Each generator has its own queue. In it a shard that was delivered before comes first, then the
//! priority decides, then whose turn it is: tenants get device time in equal parts by start-time fair
//! queueing (Goyal, Vin and Cheng 1996), so that a thousand jobs of one tenant do not delay another's
//! first. A tenant's shards keep their order.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use super::{Backlog, Full};
use crate::{
    clock::is_beyond,
    state::{ActiveShard, JobRecord, Lane, QueueName},
    tenants::Quota,
};

/// Place of a queued shard among those of its tenant and priority.
type Place = (u64, String);

#[derive(Debug, Default)]
pub(super) struct Queues {
    shards: HashMap<String, ActiveShard>,
    queues: BTreeMap<QueueName, Queue>,
    /// Shards that wait, of each tenant that has any.
    waiting: BTreeMap<String, usize>,
    /// Queued shards that are not due yet.
    delayed: BTreeSet<(i64, String)>,
    /// Leased shards by the end of their lease.
    leases: BTreeSet<(i64, String)>,
}

#[derive(Debug, Default)]
struct Queue {
    /// Due shards.
    lanes: BTreeMap<Lane, BTreeSet<Place>>,
    /// Shards that wait, due or not.
    queued: usize,
    turns: Turns,
}

/// How far each tenant is in a queue: the virtual time of start-time fair queueing.
#[derive(Debug, Default)]
struct Turns {
    /// Where the next shard of a tenant starts, if it is past the level.
    next: BTreeMap<String, u64>,
    /// Start of the shard that was taken last.
    level: u64,
}

impl Queues {
    /// Every shard that has not ended, of all jobs.
    pub(super) fn new(shards: impl IntoIterator<Item = ActiveShard>) -> Self {
        let mut queues = Self::default();
        shards.into_iter().for_each(|shard| queues.put(shard));
        queues
    }

    /// These shards, as they are stored, in place of those that are here: some of what was written last
    /// may be lost. A lease that was renewed meanwhile ends no earlier for that.
    pub(super) fn again(&self, stored: Vec<ActiveShard>) -> Self {
        Self::new(stored.into_iter().map(|mut shard| {
            let known = self.shards.get(&shard.shard_id);
            if let Some(known) = known.filter(|known| known.leased && known.token == shard.token) {
                shard.expires_unix_ms = shard.expires_unix_ms.max(known.expires_unix_ms);
            }
            shard
        }))
    }

    /// Brings the shards of a job to where its record says they are.
    pub(super) fn update(&mut self, record: &JobRecord) {
        record.shards.iter().for_each(|shard| self.remove(&shard.id));
        record.active().for_each(|shard| self.put(shard));
    }

    /// Adds a shard that is not in yet.
    fn put(&mut self, shard: ActiveShard) {
        let id = shard.shard_id.clone();
        if shard.leased {
            self.leases.insert((shard.expires_unix_ms, id.clone()));
        } else {
            self.queues.entry(shard.queue.clone()).or_default().queued += 1;
            *self.waiting.entry(shard.lane.tenant.clone()).or_default() += 1;
            // Due ones move to their lane when somebody looks.
            self.delayed.insert((shard.not_before_unix_ms, id.clone()));
        }
        self.shards.insert(id, shard);
    }

    fn remove(&mut self, id: &str) {
        let Some(old) = self.shards.remove(id) else { return };
        if old.leased {
            self.leases.remove(&(old.expires_unix_ms, old.shard_id));
            return;
        }
        self.delayed.remove(&(old.not_before_unix_ms, old.shard_id.clone()));
        if let Some(waiting) = self.waiting.get_mut(&old.lane.tenant) {
            *waiting -= 1;
            self.waiting.retain(|_, waiting| *waiting > 0);
        }
        let Some(queue) = self.queues.get_mut(&old.queue) else { return };
        queue.queued -= 1;
        if let Some(places) = queue.lanes.get_mut(&old.lane) {
            places.remove(&(old.position, old.shard_id));
            queue.lanes.retain(|_, places| !places.is_empty());
        }
    }

    /// Up to `limit` due shards of one generator, in the order in which workers get them. They stay
    /// queued, but their tenants have had their turn.
    pub(super) fn take(&mut self, name: &QueueName, limit: usize, now: i64) -> Vec<ActiveShard> {
        self.promote(now);
        let Some(Queue { lanes, turns, .. }) = self.queues.get_mut(name) else { return Vec::new() };
        let mut lanes: BTreeMap<&Lane, _> =
            lanes.iter().map(|(lane, places)| (lane, places.iter().peekable())).collect();
        let mut taken = Vec::new();
        while taken.len() < limit {
            lanes.retain(|_, places| places.peek().is_some());
            let Some((lane, places)) = lanes.iter_mut().min_by_key(|(lane, _)| turns.of(lane))
            else {
                break;
            };
            let shard = places.next().and_then(|(_, id)| self.shards.get(id));
            if let Some(shard) = shard {
                turns.take(&lane.tenant, shard.work);
                taken.push(shard.clone());
            }
        }
        taken
    }

    /// Up to `limit` shards whose lease has ended, those of the oldest first.
    pub(super) fn expired(&self, now: i64, limit: usize) -> Vec<ActiveShard> {
        let ended = self.leases.iter().take_while(|(end, _)| *end <= now);
        let beyond = self.leases.iter().rev().take_while(|(end, _)| is_beyond(*end, now));
        ended.chain(beyond).take(limit).filter_map(|(_, id)| self.shards.get(id)).cloned().collect()
    }

    /// What waits and runs, and when the next delayed shard is due.
    pub(super) fn backlog(&mut self, now: i64) -> Backlog {
        self.promote(now);
        let queues = self.queues.iter().filter(|(_, queue)| queue.queued > 0);
        Backlog {
            queued: queues.map(|(name, queue)| (name.clone(), queue.queued)).collect(),
            running: self.leases.len(),
            next_due_unix_ms: self.delayed.first().map(|(due, _)| *due),
        }
    }

    /// Whether a new job fits.
    pub(super) fn room(
        &self,
        job: &JobRecord,
        max_queued: usize,
        quota: Quota,
    ) -> Result<(), Full> {
        let queued = self.shards.len() - self.leases.len();
        if queued + job.shards.len() > max_queued {
            return Err(Full::Queue);
        }
        let waiting = self.waiting.get(&job.tenant).copied().unwrap_or_default();
        match quota.max_queued {
            Some(most) if waiting + job.shards.len() > most => Err(Full::Tenant),
            _ => Ok(()),
        }
    }

    fn promote(&mut self, now: i64) {
        loop {
            let is_due = self.delayed.first().is_some_and(|(due, _)| *due <= now);
            let is_beyond = self.delayed.last().is_some_and(|(due, _)| is_beyond(*due, now));
            let next = match (is_due, is_beyond) {
                (true, _) => self.delayed.pop_first(),
                (false, true) => self.delayed.pop_last(),
                (false, false) => return,
            };
            let Some((_, id)) = next else { return };
            let Some(shard) = self.shards.get(&id) else { continue };
            let queue = self.queues.entry(shard.queue.clone()).or_default();
            queue.lanes.entry(shard.lane.clone()).or_default().insert((shard.position, id));
        }
    }
}

impl Turns {
    /// Where a tenant's next shard starts: no credit for the time it had nothing to do.
    fn start(&self, tenant: &str) -> u64 {
        self.next.get(tenant).copied().unwrap_or_default().max(self.level)
    }

    /// Which lane is next: the smallest.
    fn of<'a>(&self, lane: &'a Lane) -> (i32, u64, &'a str) {
        (lane.class, self.start(&lane.tenant), &lane.tenant)
    }

    fn take(&mut self, tenant: &str, work: u64) {
        self.level = self.start(tenant);
        self.next.insert(tenant.to_owned(), self.level.saturating_add(work));
        self.next.retain(|_, start| *start > self.level);
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::state::Class;

    fn queue() -> QueueName {
        QueueName { model: "sd".into(), hash: "1".into() }
    }

    fn shard(tenant: &str, class: Class, position: u64, work: u64) -> ActiveShard {
        ActiveShard {
            shard_id: format!("{tenant}{position}"),
            position,
            queue: queue(),
            lane: Lane { class: class.into(), tenant: tenant.into() },
            work,
            ..Default::default()
        }
    }

    /// Takes them all, one at a time.
    fn order(mut queues: Queues) -> Vec<String> {
        let mut order = Vec::new();
        while let Some(shard) = queues.take(&queue(), 1, 0).pop() {
            queues.remove(&shard.shard_id);
            order.push(shard.shard_id);
        }
        order
    }

    #[test]
    fn a_tenant_with_many_shards_does_not_delay_another() {
        let many = (0..6).map(|i| shard("a", Class::Normal, i, 10));
        let few = (6..8).map(|i| shard("b", Class::Normal, i, 10));
        let taken = order(Queues::new(many.chain(few)));
        assert_eq!(taken, ["a0", "b6", "a1", "b7", "a2", "a3", "a4", "a5"]);
    }

    #[test]
    fn turns_are_by_work_and_idle_time_earns_nothing() {
        let heavy = (0..3).map(|i| shard("a", Class::Normal, i, 20));
        let light = (3..7).map(|i| shard("b", Class::Normal, i, 10));
        let mut queues = Queues::new(heavy.chain(light));
        let ids =
            |taken: Vec<ActiveShard>| taken.into_iter().map(|s| s.shard_id).collect::<Vec<_>>();
        assert_eq!(ids(queues.take(&queue(), 7, 0)), ["a0", "b3", "b4", "a1", "b5", "b6", "a2"]);
        queues.put(shard("c", Class::Normal, 9, 10));
        queues.put(shard("c", Class::Normal, 10, 10));
        assert_eq!(ids(queues.take(&queue(), 3, 0)), ["b3", "c9", "b4"], "no credit");
    }

    #[test]
    fn a_lower_class_comes_first() {
        let classes = [Class::Low, Class::Normal, Class::High, Class::Again];
        let shards = (0..4).map(|i| shard("a", classes[i], i as u64, 10));
        assert_eq!(order(Queues::new(shards)), ["a3", "a2", "a1", "a0"]);
    }

    proptest! {
        #[test]
        fn everything_is_taken_once_and_a_lane_keeps_its_order(
            shards in prop::collection::vec(("[a-c]", 0i32..4, 1u64..100), 0..40),
        ) {
            let shards: Vec<_> = shards.into_iter().enumerate().map(|(i, (tenant, class, work))| {
                let class = Class::try_from(class).expect("in range");
                shard(&tenant, class, i as u64, work)
            }).collect();
            let taken = order(Queues::new(shards.clone()));
            let place = |id: &str| taken.iter().position(|other| other == id);
            prop_assert_eq!(taken.len(), shards.len());
            for (i, one) in shards.iter().enumerate() {
                prop_assert!(place(&one.shard_id).is_some());
                for other in &shards[i..] {
                    let in_order = place(&one.shard_id) <= place(&other.shard_id);
                    prop_assert!(one.lane != other.lane || in_order);
                    let first = one.lane.class < other.lane.class;
                    prop_assert!(!first || in_order);
                }
            }
        }
    }
}
