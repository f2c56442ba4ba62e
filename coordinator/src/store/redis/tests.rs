//! What several processes on one Redis see of each other, and what is left when it loses something.

use std::time::Duration;

use fairlead_common::testing::RedisServer;

use super::*;
use crate::store::contract::{self, commit, grant, queue_of, stored, take};

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
    let (wanted, unwanted) = (JobId::generate(), JobId::generate());
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
    assert_eq!(store.mend(11).await.expect("it looks"), 0, "nothing is missing");
    let stream = format!("queue:{}:2|", queue_key(&queue_of(id)));
    let losses: [&[&str]; 4] = [&[&stream], &["places"], &["shards"], &["leases"]];
    for keys in losses {
        keys.iter().for_each(|key| world.delete(key));
        assert!(store.mend(12).await.expect("it mends") > 0, "{keys:?}");
        assert_eq!(store.mend(12).await.expect("it looks"), 0, "{keys:?}");
    }
    // A lease of what nobody knows stands in no one's way.
    let orphan = "ZADD {fairlead}:leases 1 orphan";
    assert_eq!(world.server.command(orphan).expect("it answers"), ":1\r\n");
    assert_eq!(store.expired(12, 1).await.expect("index"), []);
    // The mended ones are like new; what was leased still is.
    let taken = take(&store, id, 5, 13).await;
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

#[test]
fn a_grant_that_took_place_is_known_by_its_end() {
    let (_, mut record) = contract::job(1, 1);
    let shard = record.shards[0].id.parse().expect("an id");
    let grant = |worker: &str| Transition::Grant { shard, worker: worker.into(), ttl_ms: 100 };
    let (effect, _) = transition::apply(&mut record, &grant("w"), 5).expect("it is queued");
    assert_eq!(was_granted(&record, &grant("w"), 5), Some(effect));
    assert_eq!(was_granted(&record, &grant("w"), 6), None);
    assert_eq!(was_granted(&record, &grant("v"), 5), None);
    assert_eq!(was_granted(&record, &Transition::Cancel { reason: String::new() }, 5), None);
}
