//! What several processes on one Redis see of each other, and what is left when it loses something.

use std::time::Duration;

use fairlead_common::testing::RedisServer;
use fairlead_proto::v1;

use super::*;
use crate::lease::Commit;
use crate::registry::Registry;
use crate::store::contract::{self, commit, grant, queue_of, stored, take};
use crate::transition::Effect;

const PATIENCE: Duration = Duration::from_secs(30);

struct World {
    server: RedisServer,
    // Removed after the server has ended.
    _dir: tempfile::TempDir,
}

impl World {
    fn new() -> Self {
        let dir = tempfile::tempdir().expect("a directory");
        Self { server: RedisServer::start(dir.path()), _dir: dir }
    }

    /// The store as one more process has it.
    fn store(&self) -> RedisStore {
        RedisStore::new(&self.server.url(), "fairlead").expect("an address")
    }

    fn delete(&self, key: &str) {
        let answer =
            self.server.command(&format!("DEL \"{{fairlead}}:{key}\"")).expect("it answers");
        assert_eq!(answer, ":1\r\n", "{key}");
    }
}

async fn heard(changes: &mut mpsc::Receiver<Change>, wanted: impl Fn(&Change) -> bool) -> Change {
    let found = async {
        loop {
            let change = changes.recv().await.expect("it follows");
            if wanted(&change) {
                return change;
            }
        }
    };
    tokio::time::timeout(PATIENCE, found).await.expect("it is heard")
}

#[tokio::test]
async fn two_processes_do_not_take_the_same_shard_but_a_dead_ones_comes_back() {
    let world = World::new();
    let (one, other) = (world.store(), world.store());
    let (id, shards) = stored(&one, 3, 1).await;
    assert_eq!(take(&one, id, 2, 10).await, shards[..2]);
    assert_eq!(take(&other, id, 5, 11).await, shards[2..]);
    let lease = grant(&one, id, shards[0], 12).await;
    // Shard 1 was taken by a process that then died.
    let free = 10 + millis(CLAIM);
    assert_eq!(take(&other, id, 5, free - 1).await, []);
    assert_eq!(take(&other, id, 5, free).await, shards[1..2]);
    one.apply(id, commit(lease, 0..1), free).await.expect("the token is current");
}

#[tokio::test]
async fn every_process_hears_what_the_others_do() {
    let world = World::new();
    let (one, other) = (world.store(), world.store());
    let mut news = other.changes().expect("others may be at work");
    heard(&mut news, |change| *change == Change::Everything).await;
    let (id, shards) = stored(&one, 1, 1).await;
    heard(&mut news, |change| *change == Change::Queue).await;
    heard(&mut news, |change| *change == Change::Job(id)).await;
    grant(&one, id, shards[0], 10).await;
    let cancel = Transition::Cancel { reason: String::new() };
    one.apply(id, cancel, 11).await.expect("it cancels");
    heard(&mut news, |change| *change == Change::Lease(shards[0])).await;
    one.join(Member { id: "a".into(), ..Member::default() }, 0, 10).await.expect("it joins");
    heard(&mut news, |change| *change == Change::Members).await;
}

#[tokio::test]
async fn progress_reaches_those_who_listen_and_no_one_hears_himself() {
    let world = World::new();
    let (one, other) = (world.store(), world.store());
    let mut mine = one.changes().expect("others may be at work");
    let mut news = other.changes().expect("others may be at work");
    let (wanted, unwanted) = (JobId::generate(0), JobId::generate(0));
    for store in [&one, &other] {
        store.listen(wanted, true);
    }
    let step = |index| StepProgress { index, ..StepProgress::default() };
    // A subscription takes a moment, and what is said before it is lost: as it should.
    let steps = async {
        for index in 0.. {
            one.tell(unwanted, &step(index));
            one.tell(wanted, &step(index));
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    let first = tokio::select! {
        change = heard(&mut news, |change| matches!(change, Change::Progress(..))) => change,
        () = steps => unreachable!("it never ends"),
    };
    assert!(matches!(first, Change::Progress(job, _) if job == wanted), "{first:?}");
    other.tell(wanted, &step(u32::MAX));
    let answer = heard(&mut mine, |change| matches!(change, Change::Progress(..))).await;
    assert_eq!(answer, Change::Progress(wanted, Box::new(step(u32::MAX))), "not its own words");
}

#[tokio::test]
async fn calls_outlast_a_restart_and_nothing_is_lost() {
    let mut world = World::new();
    let store = world.store();
    let (id, shards) = stored(&store, 1, 1).await;
    let lease = grant(&store, id, shards[0], 10).await;
    let before = store.get(id).await.expect("a job");
    world.server.kill();
    let (after, ()) = tokio::join!(store.get(id), async { world.server.restart() });
    assert_eq!(after.expect("it waits"), before);
    store.apply(id, commit(lease, 0..1), 12).await.expect("the token survived");
}

#[tokio::test]
async fn what_the_queues_lost_comes_back_from_the_records() {
    let world = World::new();
    let store = world.store();
    let (id, shards) = stored(&store, 3, 1).await;
    assert_eq!(take(&store, id, 1, 10).await, shards[..1]);
    let lease = grant(&store, id, shards[0], 10).await;
    let store_of_clock: Arc<dyn Store> = Arc::new(world.store());
    let clock = Clock::of(store_of_clock).await.expect("it tells the time");
    let waiting = async || store.backlog(11).await.expect("index").queued.values().sum::<usize>();
    assert_eq!(store.mend(&clock).await.expect("it looks"), 0, "nothing is missing");
    let stream = format!("queue:{}:2|", queue_key(&queue_of(id)));
    let (lanes, own) = (queue_key(&queue_of(id)), format!("waiting:{}|", queue_key(&queue_of(id))));
    let lanes = format!("lanes:{lanes}");
    let losses: [&[&str]; 7] =
        [&[&stream], &["places"], &["shards"], &["leases"], &[&lanes], &[&own], &["waits"]];
    for keys in losses {
        keys.iter().for_each(|key| world.delete(key));
        assert!(store.mend(&clock).await.expect("it mends") > 0, "{keys:?}");
        assert_eq!(store.mend(&clock).await.expect("it looks"), 0, "{keys:?}");
        assert_eq!(waiting().await, 2, "{keys:?}");
    }
    // A lease of what nobody knows stands in no one's way.
    let orphan = "ZADD {fairlead}:leases 1 orphan";
    assert_eq!(world.server.command(orphan).expect("it answers"), ":1\r\n");
    assert_eq!(store.expired(12, 1).await.expect("index"), []);
    // The mended ones are like new, in whatever order; what was leased still is.
    let mut taken = take(&store, id, 5, 13).await;
    taken.sort_by_key(|id| shards.iter().position(|shard| shard == id));
    assert_eq!(taken, shards[1..]);
    let expired = store.expired(10 + contract::TTL, 5).await.expect("index");
    assert_eq!(expired.len(), 1);
    store.apply(id, commit(lease, 0..1), 14).await.expect("the token is current");
}

#[tokio::test]
async fn a_group_that_somebody_destroyed_is_made_again() {
    let world = World::new();
    let store = world.store();
    let (id, shards) = stored(&store, 2, 1).await;
    assert_eq!(take(&store, id, 1, 10).await, shards[..1]);
    grant(&store, id, shards[0], 10).await;
    let stream = format!("{{fairlead}}:queue:{}:2|", queue_key(&queue_of(id)));
    // The words of a command are apart by spaces, and this name has one.
    let destroy = format!("XGROUP DESTROY \"{stream}\" workers");
    assert_eq!(world.server.command(&destroy).expect("it answers"), ":1\r\n");
    assert_eq!(take(&store, id, 2, 11).await, []);
    assert_eq!(take(&store, id, 2, 11).await, shards[1..], "what is leased is not handed out");
}

#[tokio::test]
async fn a_process_that_missed_news_is_told_that_anything_may_have_changed() {
    let world = World::new();
    let (one, other) = (world.store(), world.store());
    let mut news = other.changes().expect("others may be at work");
    heard(&mut news, |change| *change == Change::Everything).await;
    stored(&one, 1, 1).await;
    heard(&mut news, |change| matches!(change, Change::Job(_))).await;
    // As if entries had been trimmed before they were read.
    world.server.command("INCRBY {fairlead}:rung 5").expect("it answers");
    let (id, _) = stored(&one, 1, 1).await;
    heard(&mut news, |change| *change == Change::Everything).await;
    heard(&mut news, |change| *change == Change::Job(id)).await;
}

#[tokio::test]
async fn a_holder_that_ends_its_lease_does_not_wake_the_others() {
    let world = World::new();
    let (one, other) = (world.store(), world.store());
    let mut news = other.changes().expect("others may be at work");
    let (id, shards) = stored(&one, 2, 1).await;
    let mine = grant(&one, id, shards[0], 10).await;
    grant(&one, id, shards[1], 10).await;
    one.apply(id, commit(mine, 0..1), 11).await.expect("the token is current");
    let cancel = Transition::Cancel { reason: String::new() };
    one.apply(id, cancel, 12).await.expect("it cancels");
    let first = heard(&mut news, |change| matches!(change, Change::Lease(_))).await;
    assert_eq!(first, Change::Lease(shards[1]));
}

#[tokio::test]
async fn calls_wait_for_a_server_that_takes_no_writes_now() {
    let world = World::new();
    let store = world.store();
    let (id, shards) = stored(&store, 1, 1).await;
    let set = |replicas: u32| {
        let command = format!("CONFIG SET min-replicas-to-write {replicas}");
        assert_eq!(world.server.command(&command).expect("it answers"), "+OK\r\n");
    };
    // As when every replica is behind. Neither an error nor an empty queue.
    set(1);
    let later = async {
        tokio::time::sleep(Duration::from_millis(200)).await;
        set(0);
    };
    let (taken, created, ()) = tokio::join!(take(&store, id, 1, 10), stored(&store, 1, 1), later);
    assert_eq!((taken, created.1.len()), (shards, 1));
}

#[tokio::test]
async fn what_a_cluster_has_seen_outlives_the_store() {
    let world = World::new();
    let registry = async || {
        let store: Arc<dyn Store> = Arc::new(world.store());
        let clock = Clock::of(Arc::clone(&store)).await.expect("it tells the time");
        let ttl = Duration::from_secs(60);
        Registry::new(store, clock, ttl, ttl / 2)
    };
    let seen = |registry: &Registry| -> Vec<String> {
        registry.seen().probes.into_iter().map(|probe| probe.concept).collect()
    };
    let one = registry().await;
    let node = |id: &str, concept: &str| {
        let concept =
            v1::ConceptRef { name: concept.into(), version: "1".into(), ..Default::default() };
        v1::NodeInfo {
            node_id: id.into(),
            address: "http://127.0.0.1:7101".into(),
            protocol_version: fairlead_proto::PROTOCOL_VERSION,
            preprocessing_version: fairlead_proto::PREPROCESSING_VERSION,
            concepts: vec![v1::ConceptInfo { concept: Some(concept), ..Default::default() }],
            ..Default::default()
        }
    };
    for (id, concept) in [("a", "axe"), ("b", "bomb"), ("c", "cigarette")] {
        let registration = one.register(node(id, concept)).await.expect("it is valid");
        if id == "c" {
            one.deregister(id, &registration).await.expect("it is registered");
        }
    }
    one.retire("cigarette").await.expect("nobody serves it");
    assert_eq!(world.server.command("FLUSHALL").expect("it answers"), "+OK\r\n");
    // One node comes back, the other does not.
    one.register(node("a", "axe")).await.expect("it is valid");
    assert_eq!(
        seen(&one),
        ["axe", "bomb"],
        "what is gone stays required, what is retired does not"
    );
    let other = registry().await;
    other.refresh().await.expect("it reads");
    assert_eq!(seen(&other), ["axe", "bomb"], "the store knows it again");
    one.register(node("c", "cigarette")).await.expect("it is valid");
    other.refresh().await.expect("it reads");
    assert_eq!(seen(&other).len(), 3, "who serves a retired concept brings it back");
}

#[tokio::test]
async fn an_ended_job_is_not_taken_for_an_open_one() {
    let world = World::new();
    let store: Arc<dyn Store> = Arc::new(world.store());
    let clock = Clock::of(Arc::clone(&store)).await.expect("it tells the time");
    let (id, _) = stored(store.as_ref(), 1, 1).await;
    let cancel = Transition::Cancel { reason: String::new() };
    store.apply(id, cancel, 11).await.expect("it cancels");
    let open = |key: &str| world.server.command(&format!("SCARD {{fairlead}}:{key}"));
    for gone in [id.to_string(), JobId::generate(0).to_string()] {
        let added = world.server.command(&format!("SADD {{fairlead}}:open {gone}"));
        assert_eq!(added.expect("it answers"), ":1\r\n");
    }
    assert_eq!(store.mend(&clock).await.expect("it looks"), 0);
    assert_eq!(open("open").expect("it answers"), ":0\r\n");
}

/// Every shard of a job at once, from two processes: each transition counts once, whatever is written
/// together.
#[tokio::test]
async fn transitions_of_a_job_that_come_together_all_count() {
    const SHARDS: u32 = 16;
    let world = World::new();
    let stores = [Arc::new(world.store()), Arc::new(world.store())];
    let (id, shards) = stored(stores[0].as_ref(), SHARDS, 1).await;
    let making = shards.iter().enumerate().map(|(image, &shard)| {
        let store = Arc::clone(&stores[image % 2]);
        tokio::spawn(async move {
            let lease = grant(store.as_ref(), id, shard, 12).await;
            let image = image as u32;
            let applied = store.apply(id, commit(lease, image..image + 1), 13).await;
            applied.expect("its lease is the newest").effect
        })
    });
    for effect in futures::future::join_all(making.collect::<Vec<_>>()).await {
        assert_eq!(effect.expect("no panic"), Effect::Committed(Commit::First));
    }
    let record = stores[1].get(id).await.expect("it is read").expect("it is there");
    assert_eq!(record.job.state(), v1::JobState::Completed);
    let events = stores[0].events(id, 0, 1_000).await.expect("they are read");
    let sequence: Vec<u64> = events.iter().map(|event| event.sequence).collect();
    assert_eq!(sequence, (1..=events.len() as u64).collect::<Vec<_>>());
    assert!(events.len() > SHARDS as usize, "each end is an event: {}", events.len());
}

#[tokio::test]
async fn one_job_that_cannot_be_read_hides_no_other() {
    let world = World::new();
    let store = world.store();
    let mut jobs = Vec::new();
    for _ in 0..5 {
        jobs.push(stored(&store, 1, 1).await.0);
    }
    for bad in [1, 3] {
        let spoil = format!("HSET {{fairlead}}:job:{} r spoiled", jobs[bad]);
        assert_eq!(world.server.command(&spoil).expect("it answers"), ":0\r\n");
    }
    let list = async |before, limit| -> Vec<JobId> {
        let listed = store.list(None, before, limit).await.expect("a page");
        listed.iter().map(|record| record.id().expect("an id")).collect()
    };
    assert_eq!(list(None, 2).await, [jobs[4], jobs[2]], "a page is full all the same");
    assert_eq!(list(Some(jobs[2]), 2).await, [jobs[0]]);
    let error = store.get(jobs[1]).await.expect_err("it cannot be read");
    assert!(matches!(error, StoreError::Corrupt(_)), "{error}");
}

#[tokio::test]
async fn a_redis_that_may_lose_jobs_is_refused_unless_that_is_accepted() {
    let world = World::new();
    let store = world.store();
    store.vet(false).await.expect("it keeps what it is told");
    let set = |setting: &str| {
        let answer = world.server.command(&format!("CONFIG SET {setting}")).expect("it answers");
        assert_eq!(answer, "+OK\r\n");
    };
    for (setting, undo, part) in [
        ("maxmemory-policy allkeys-lru", "maxmemory-policy noeviction", "maxmemory-policy"),
        ("maxmemory-policy volatile-ttl", "maxmemory-policy noeviction", "`volatile-ttl`"),
        ("appendonly no", "appendonly yes", "`appendonly yes`"),
    ] {
        set(setting);
        let refused = store.vet(false).await.expect_err(part).to_string();
        assert!(refused.contains(part) && refused.contains("--redis-may-lose-jobs"), "{refused}");
        store.vet(true).await.expect("it is accepted");
        set(undo);
    }
    // One that may not ask is told to see for himself.
    let user = "ACL SETUSER default -info";
    assert_eq!(world.server.command(user).expect("it answers"), "+OK\r\n");
    store.vet(false).await.expect("it is not known to be unfit");
}

#[tokio::test]
async fn jobs_that_an_earlier_release_ended_are_kept_from_now_on() {
    let world = World::new();
    let store = world.store();
    let (job, _) = stored(&store, 1, 1).await;
    let cancel = Transition::Cancel { reason: String::new() };
    store.apply(job, cancel, 11).await.expect("it cancels");
    world.delete("aged");
    let noted = format!("ZADD {{fairlead}}:ended 1700000000000 {job}");
    assert_eq!(world.server.command(&noted).expect("it answers"), ":1\r\n");
    let age = store.age(Some((0, Duration::from_secs(100)))).await.expect("it has one");
    assert_eq!(age, 100_000);
    assert!(store.ended(age, 10).await.expect("it answers").is_empty());
    assert_eq!(store.ended(age + 1, 10).await.expect("it answers").len(), 1);
}
