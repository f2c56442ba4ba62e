//! What becomes of the file's disk, and of the file.

use std::{
    fs::File,
    io::{self, ErrorKind},
    path::PathBuf,
    sync::atomic::{AtomicBool, Ordering},
};

use ::redb::{Builder, StorageBackend, backends::FileBackend};
use fairlead_common::ids::ShardId;

use super::*;
use crate::store::contract::{self, TTL, commit, grant, stored, take};

/// A disk that may be full.
#[derive(Debug)]
struct Disk {
    file: FileBackend,
    is_full: Arc<AtomicBool>,
}

impl Disk {
    fn room(&self) -> io::Result<()> {
        match self.is_full.load(Ordering::Relaxed) {
            true => Err(ErrorKind::StorageFull.into()),
            false => Ok(()),
        }
    }
}

impl StorageBackend for Disk {
    fn len(&self) -> Result<u64, io::Error> {
        self.file.len()
    }

    fn read(&self, offset: u64, out: &mut [u8]) -> Result<(), io::Error> {
        self.file.read(offset, out)
    }

    fn set_len(&self, len: u64) -> Result<(), io::Error> {
        self.room()?;
        self.file.set_len(len)
    }

    fn sync_data(&self) -> Result<(), io::Error> {
        self.room()?;
        self.file.sync_data()
    }

    fn write(&self, offset: u64, data: &[u8]) -> Result<(), io::Error> {
        self.room()?;
        self.file.write(offset, data)
    }

    fn close(&self) -> Result<(), io::Error> {
        self.file.close()
    }
}

struct World {
    dir: tempfile::TempDir,
    is_full: Arc<AtomicBool>,
}

impl World {
    fn new() -> Self {
        Self { dir: tempfile::tempdir().expect("a directory"), is_full: Arc::default() }
    }

    fn path(&self) -> PathBuf {
        self.dir.path().join("jobs.redb")
    }

    fn store(&self) -> RedbStore {
        let is_full = Arc::clone(&self.is_full);
        let opening: Opening = Arc::new(move |path| {
            let file =
                File::options().read(true).write(true).create(true).truncate(false).open(path)?;
            let disk = Disk { file: FileBackend::new(file)?, is_full: Arc::clone(&is_full) };
            Builder::new().create_with_backend(disk)
        });
        RedbStore::open_with(&self.path(), opening).expect("it opens")
    }

    fn fill(&self, is_full: bool) {
        self.is_full.store(is_full, Ordering::Relaxed);
    }
}

fn is_away<T: std::fmt::Debug>(answer: Result<T, StoreError>, part: &str) {
    let error = answer.expect_err("it is away");
    assert!(matches!(error, StoreError::Away { .. }), "{error:?}");
    assert!(error.to_string().contains(part), "`{part}` is not in: {error}");
}

#[tokio::test]
async fn a_disk_that_was_full_is_used_again_when_it_has_room() {
    let world = World::new();
    let store = world.store();
    store.check().await.expect("it works");
    let (job, shards) = stored(&store, 2, 1).await;
    let lease = grant(&store, job, shards[0], 10).await;
    let before = store.get(job).await.expect("a job");
    // Not on disk yet when it is full.
    let renew = Transition::Renew { leases: vec![lease], ttl_ms: TTL };
    store.apply(job, renew, 500).await.expect("it is current");

    world.fill(true);
    is_away(store.create(contract::new(contract::job(1, 1).1), 11).await, "jobs.redb");
    for _ in 0..3 {
        is_away(store.check().await, "jobs.redb");
        is_away(store.get(job).await, "jobs.redb");
        is_away(store.backlog(12).await, "jobs.redb");
        is_away(store.apply(job, commit(lease, 0..1), 12).await, "jobs.redb");
        is_away(store.roster(None, 12).await, "jobs.redb");
    }

    world.fill(false);
    store.check().await.expect("there is room");
    let after = store.get(job).await.expect("it is open").expect("nothing was lost");
    let Some(before) = before else { panic!("it was stored") };
    assert_eq!((after.job, after.shards.len()), (before.job, before.shards.len()));
    let ended = store.expired(10 + TTL, 10).await.expect("it is open");
    assert!(ended.is_empty(), "a renewal that was lost ends no lease earlier: {ended:?}");
    assert_eq!(take(&store, job, 10, 13).await, [shards[1]]);
    store.apply(job, commit(lease, 0..1), 14).await.expect("its lease is current");
    let (second, _) = stored(&store, 1, 1).await;
    assert!(store.get(second).await.expect("it is open").is_some());
}

#[tokio::test]
async fn a_folder_that_is_deleted_is_noticed_at_once_and_not_made_again() {
    let world = World::new();
    let store = world.store();
    let (job, _) = stored(&store, 1, 1).await;
    let aside = world.dir.path().join("aside");
    std::fs::rename(world.path(), &aside).expect("it is moved");
    let name = world.dir.path().to_str().expect("text");
    is_away(store.create(contract::new(contract::job(1, 1).1), 11).await, name);
    is_away(store.get(job).await, "is gone");
    is_away(store.check().await, name);
    assert!(!world.path().exists());
    std::fs::rename(&aside, world.path()).expect("it is put back");
    store.check().await.expect("it is where it was");
    assert!(store.get(job).await.expect("it is read").is_some());

    std::fs::rename(world.path(), &aside).expect("it is moved");
    std::fs::copy(&aside, world.path()).expect("it is copied");
    is_away(store.check().await, "restart the coordinator");
}

#[tokio::test]
async fn a_file_that_was_spoiled_is_named_and_left_as_it_is() {
    let world = World::new();
    let store = world.store();
    for _ in 0..20 {
        stored(&store, 4, 1).await;
    }
    drop(store);
    let whole = std::fs::read(world.path()).expect("it is there");
    let mut zeros = whole.clone();
    zeros[whole.len() / 4..].fill(0);
    let spoiled = [
        (Vec::new(), "it is empty"),
        (whole[..whole.len() / 3].to_vec(), "is damaged"),
        (whole[..100].to_vec(), "is damaged"),
        (b"a text".repeat(2_000), "is damaged"),
        (zeros, "is damaged"),
    ];
    for (bytes, part) in spoiled {
        std::fs::write(world.path(), &bytes).expect("it is written");
        let error = RedbStore::open(&world.path()).expect_err(part).to_string();
        let name = world.path().display().to_string();
        for part in [part, &name, "restore it from a backup", "move it away"] {
            assert!(error.contains(part), "{} bytes, `{part}`: {error}", bytes.len());
        }
        let left = std::fs::read(world.path()).expect("it is there");
        assert!(left.len() >= bytes.len().min(100), "it is not replaced");
    }
    std::fs::write(world.path(), &whole).expect("it is written");
    RedbStore::open(&world.path()).expect("the backup is good");
}

#[tokio::test]
async fn one_job_that_cannot_be_read_hides_no_other() {
    let world = World::new();
    let store = world.store();
    let mut jobs = Vec::new();
    for _ in 0..3 {
        jobs.push(stored(&store, 1, 1).await);
    }
    let bad = jobs[1].0;
    let spoil = store.write(true, move |txn| {
        let mut jobs = txn.open_table(JOBS).map_err(backend("jobs"))?;
        let id = bad.to_string();
        jobs.insert(id.as_str(), &b"\xff\xff"[..]).map_err(backend("jobs"))?;
        Ok(((), Change::Other))
    });
    spoil.await.expect("it is written");
    others_go_on(&store, &jobs).await;
    drop(store);
    others_go_on(&world.store(), &jobs[..1]).await;
}

/// All but the second of `jobs` are listed and can be made.
async fn others_go_on(store: &RedbStore, jobs: &[(JobId, Vec<ShardId>)]) {
    let listed = store.list(None, None, 2).await.expect("a page");
    let ids: Vec<_> = listed.iter().map(|record| record.id().expect("an id")).collect();
    assert_eq!(ids.len(), 2);
    for (number, (job, shards)) in jobs.iter().enumerate() {
        if number == 1 {
            let error = store.get(*job).await.expect_err("it cannot be read");
            assert!(matches!(error, StoreError::Corrupt(_)), "{error}");
            continue;
        }
        assert!(ids.contains(job));
        let Some(record) = store.get(*job).await.expect("it is read") else { panic!("{job}") };
        if !record.is_terminal() && number > 0 {
            let lease = grant(store, *job, shards[0], 10).await;
            store.apply(*job, commit(lease, 0..1), 11).await.expect("its lease is current");
        }
    }
    assert!(store.ended(u64::MAX, 10).await.expect("they are read").len() <= 1);
}

/// `mount -t tmpfs -o size=6m none DIR`, then `SMALL_DISK=DIR` and `--ignored`.
#[tokio::test]
#[ignore = "needs a file system of a few megabytes: SMALL_DISK says where"]
async fn a_real_disk_that_is_full_is_used_again_when_it_has_room() {
    let dir = PathBuf::from(std::env::var_os("SMALL_DISK").expect("SMALL_DISK says where"));
    let ballast = dir.join("ballast");
    std::fs::write(&ballast, vec![1; 2 << 20]).expect("there is room for it");
    let store = RedbStore::open(&dir.join("jobs.redb")).expect("it opens");
    let mut jobs = Vec::new();
    let error = loop {
        let (id, record) = contract::job(64, 1);
        match store.create(NewJob { max_queued: usize::MAX, ..contract::new(record) }, 11).await {
            Ok(_) => jobs.push(id),
            Err(error) => break error,
        }
    };
    println!("{} jobs, then: {error}", jobs.len());
    assert!(matches!(error, StoreError::Away { .. }), "{error:?}");
    is_away(store.check().await, "jobs.redb");
    std::fs::remove_file(&ballast).expect("it is there");
    store.check().await.expect("there is room");
    stored(&store, 64, 1).await;
    for job in jobs {
        assert!(store.get(job).await.expect("it is read").is_some(), "{job} was accepted");
    }
}
