//! A master that dies and a Sentinel that makes its replica the master: what had reached the replica goes on,
//! and what had not is neither done twice nor mixed up.

use std::{
    net::TcpListener,
    path::Path,
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use fairlead_proto::v1;

use super::*;
use crate::{
    lease::{Commit, LeaseError},
    store::contract::{commit, grant, stored},
    transition::{Effect, Refusal},
};

const PATIENCE: Duration = Duration::from_secs(60);
const POLL: Duration = Duration::from_millis(20);

/// One server on a free port; killed when dropped.
struct Server {
    child: Child,
    port: u16,
}

impl Server {
    /// Starts `redis-server` in `dir` with `arguments`, and a configuration file of `settings` where it needs
    /// to write one.
    fn start(dir: &Path, arguments: &[&str], settings: &str) -> Self {
        // Somebody else may take the port in between.
        (0..10).find_map(|_| Self::try_start(dir, arguments, settings)).expect("it starts")
    }

    fn try_start(dir: &Path, arguments: &[&str], settings: &str) -> Option<Self> {
        let port = TcpListener::bind("127.0.0.1:0").ok()?.local_addr().ok()?.port();
        let dir = dir.join(port.to_string());
        std::fs::create_dir(&dir).ok()?;
        std::fs::write(dir.join("redis.conf"), settings).ok()?;
        let child = Command::new("redis-server")
            .current_dir(&dir)
            .args(["redis.conf", "--port", &port.to_string(), "--bind", "127.0.0.1", "--save", ""])
            .args(arguments)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .spawn()
            .expect("redis-server is installed");
        let mut server = Self { child, port };
        let end = Instant::now() + PATIENCE;
        while server.ask::<String>(&["PING"]).is_err() {
            if server.child.try_wait().expect("it is ours").is_some() || Instant::now() > end {
                return None;
            }
            std::thread::sleep(POLL);
        }
        Some(server)
    }

    fn ask<T: ::redis::FromRedisValue>(&self, words: &[&str]) -> ::redis::RedisResult<T> {
        let client = ::redis::Client::open(format!("redis://127.0.0.1:{}", self.port))?;
        let mut command = ::redis::cmd(words[0]);
        for word in &words[1..] {
            command.arg(*word);
        }
        command.query(&mut client.get_connection_with_timeout(Duration::from_secs(2))?)
    }

    fn signal(&self, signal: &str) {
        let id = self.child.id().to_string();
        let sent = Command::new("kill").args(["-s", signal, &id]).status();
        assert!(sent.expect("`kill` is there").success());
    }

    fn kill(&mut self) {
        self.child.kill().expect("it runs");
        self.child.wait().expect("it ends");
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // It may have been killed, or be stopped.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

struct World {
    master: Server,
    replica: Server,
    sentinel: Server,
    // Removed after the servers have ended.
    _dir: tempfile::TempDir,
}

impl World {
    /// A master, its replica, and a Sentinel that knows both and waits for half a second.
    fn new() -> Self {
        let dir = tempfile::tempdir().expect("a directory");
        let master = Server::start(dir.path(), &[], "");
        let port = master.port.to_string();
        let replica = Server::start(dir.path(), &["--replicaof", "127.0.0.1", &port], "");
        let settings = format!(
            "sentinel monitor main 127.0.0.1 {port} 1\n\
             sentinel down-after-milliseconds main 500\n\
             sentinel failover-timeout main 5000\n"
        );
        let sentinel = Server::start(dir.path(), &["--sentinel"], &settings);
        let world = Self { master, replica, sentinel, _dir: dir };
        let knows_replica = || {
            let replicas: Vec<Vec<String>> =
                world.sentinel.ask(&["SENTINEL", "REPLICAS", "main"])?;
            let flags = |replica: &Vec<String>| {
                let at = replica.iter().position(|field| field == "flags")?;
                replica.get(at + 1).cloned()
            };
            ::redis::RedisResult::Ok(replicas.first().and_then(flags).as_deref() == Some("slave"))
        };
        let end = Instant::now() + PATIENCE;
        while !(knows_replica().is_ok_and(|known| known) && world.replicated()) {
            assert!(Instant::now() < end, "the Sentinel does not find the replica");
            std::thread::sleep(POLL);
        }
        world
    }

    fn store(&self) -> RedisStore {
        let url = format!("redis-sentinel://127.0.0.1:{}/main", self.sentinel.port);
        RedisStore::new(&url, "fairlead").expect("an address")
    }

    /// Whether all that was written has reached the replica.
    fn replicated(&self) -> bool {
        // A connection waits for what it has written itself, and for what was written before that.
        let client = ::redis::Client::open(format!("redis://127.0.0.1:{}", self.master.port));
        let wait = client.and_then(|client| {
            let mut connection = client.get_connection_with_timeout(Duration::from_secs(2))?;
            ::redis::cmd("SET").arg("written").arg("last").query::<()>(&mut connection)?;
            ::redis::cmd("WAIT").arg(1).arg(1_000).query::<u32>(&mut connection)
        });
        wait.is_ok_and(|replicas| replicas == 1)
    }
}

/// What `ask` answers once the store is back: calls end with an error if that takes long.
async fn once_back<T>(ask: impl AsyncFn() -> Result<T, StoreError>) -> Result<T, StoreError> {
    let end = Instant::now() + PATIENCE;
    loop {
        match ask().await {
            Err(StoreError::Away { .. }) if Instant::now() < end => {}
            answer => return answer,
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_had_reached_the_replica_goes_on() {
    let mut world = World::new();
    let store = world.store();
    let (id, shards) = stored(&store, 1, 1).await;
    let lease = grant(&store, id, shards[0], 12).await;
    assert!(world.replicated());
    world.master.kill();
    let applied = once_back(async || store.apply(id, commit(lease, 0..1), 13).await).await;
    let Effect::Committed(commit) = applied.expect("its lease is the newest").effect else {
        panic!("it commits")
    };
    // Or an answer was lost, and it was asked again.
    assert!(matches!(commit, Commit::First | Commit::Again));
    let record = store.get(id).await.expect("it is read").expect("it is there");
    assert_eq!(record.job.state(), v1::JobState::Completed);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_grant_that_a_failover_loses_is_made_again_under_a_newer_token() {
    let mut world = World::new();
    let store = world.store();
    let (id, shards) = stored(&store, 1, 1).await;
    assert!(world.replicated());
    // Cut off: what the master had already sent would arrive.
    world.replica.signal("STOP");
    let cut = world.master.ask::<u32>(&["CLIENT", "KILL", "TYPE", "replica"]);
    assert_eq!(cut.expect("it answers"), 1);
    let lost = grant(&store, id, shards[0], 12).await;
    world.master.kill();
    world.replica.signal("CONT");

    let record = once_back(async || store.get(id).await).await.expect("it is read");
    let lease =
        record.expect("it had arrived").shard(shards[0]).expect("it is there").lease.clone();
    assert_eq!((lease.deliveries(), lease.holder()), (0, ""), "the grant is lost");
    let again = grant(&store, id, shards[0], 13).await;
    assert!(again.token > lost.token, "{} after {}", again.token, lost.token);
    let stale = store.apply(id, commit(lost, 0..1), 14).await.expect_err("it is not the newest");
    assert!(
        matches!(stale, StoreError::Refused(Refusal::Lease(LeaseError::Stale { .. }))),
        "{stale}"
    );
    let applied = store.apply(id, commit(again, 0..1), 15).await.expect("it commits");
    assert_eq!(applied.effect, Effect::Committed(Commit::First));
}
