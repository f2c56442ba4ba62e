//! Shards a second of one coordinator on Redis: workers commit as soon as they are given something, so that
//! nothing but the coordinator and its store is measured. A shard is one image; the policy asks no energy.

use std::{path::Path, time::Instant};

use anyhow::{Context, Result};
use fairlead_common::testing::RedisServer;
use futures::stream::{self, StreamExt, TryStreamExt};
use tempfile::TempDir;
use tokio::{sync::watch, task::JoinSet};

use super::jobs::{client, ready, spec, submit};
use super::service::{LISTENING, PATIENCE, Service, fairlead, policies};
use super::simulated::Worker;
use crate::process::{Usage, usage};
use crate::report;

const WORKERS: u32 = 32;
/// Shards that a worker holds.
const CAPACITY: u32 = 8;
/// Images, and so shards, of a job: a job's record is replaced as a whole at every transition. 64 is the
/// most there may be.
const IMAGES: [u32; 3] = [1, 8, 64];
/// Clients that submit at once.
pub(super) const CLIENTS: usize = 8;
pub(super) const MODEL: &str = "simulated";

/// A folder in memory, where there is one: images and records lie in an object store elsewhere, and creating
/// files on a disk would be most of what is measured.
pub(super) fn folder() -> std::io::Result<TempDir> {
    let memory = Path::new("/dev/shm");
    if memory.is_dir() { tempfile::tempdir_in(memory) } else { tempfile::tempdir() }
}

/// A coordinator and its Redis.
pub(super) struct Shared {
    pub(super) coordinator: Service,
    redis: RedisServer,
    _folder: TempDir,
}

impl Shared {
    /// Starts both. Leases are long: workers here do not renew.
    pub(super) async fn start() -> Result<Self> {
        let folder = folder()?;
        let redis_dir = folder.path().join("redis");
        std::fs::create_dir(&redis_dir)?;
        // As deploy/README.md has it.
        let redis = RedisServer::start_with(&redis_dir, "everysec");
        let mut command = fairlead(None)?;
        command.args(["coordinator", "--listen", "127.0.0.1:0", "--redis", &redis.url()]);
        command.args(["--lease-ttl", "1h", "--max-queued", "10000000", "--data-dir"]);
        command.arg(folder.path().join("data"));
        command.arg("--policies").arg(policies(folder.path())?);
        let coordinator = Service::start(command, LISTENING).await?;
        Ok(Self { coordinator, redis, _folder: folder })
    }

    /// What the coordinator, Redis and this process have cost so far.
    pub(super) fn usage(&self) -> Result<[Usage; 3]> {
        let redis = self.redis.id().context("Redis has ended")?;
        Ok([self.coordinator.usage()?, usage(redis)?, usage(std::process::id())?])
    }
}

/// Measures jobs of each size.
pub(super) async fn run(shards: usize) -> Result<()> {
    let mut rows = Vec::new();
    for images in IMAGES {
        rows.push(measure(shards, images).await?);
    }
    println!(
        "\n{shards} shards of one image, {WORKERS} workers that hold {CAPACITY} each and commit at once, one \
         coordinator on Redis (goal: 3000 shards a second on two cores); us of CPU a shard"
    );
    report::table(
        &[
            "shards a job",
            "queued a second",
            "done a second",
            "coordinator us",
            "Redis us",
            "workers us",
        ],
        &rows,
    );
    Ok(())
}

/// Queues the shards in jobs of so many images, then lets the workers go.
async fn measure(shards: usize, images: u32) -> Result<Vec<String>> {
    let shared = Shared::start().await?;
    let client = client(shared.coordinator.channel()?);
    let (go, may_go) = watch::channel(false);
    let (committed, mut count) = watch::channel(0);
    let mut workers = JoinSet::new();
    for number in 0..WORKERS {
        let channel = shared.coordinator.channel()?;
        let worker = Worker::attach(channel, format!("worker-{number}"), MODEL, CAPACITY).await?;
        workers.spawn(worker.complete_all(may_go.clone(), committed.clone()));
    }
    ready(&shared.coordinator.channel()?, WORKERS, false).await?;

    let jobs = shards.div_ceil(images as usize);
    let shards = jobs * images as usize;
    let begun = Instant::now();
    stream::iter((0..jobs).map(|_| submit(&client, spec("plain", "a cat", images, 1))))
        .buffer_unordered(CLIENTS)
        .try_for_each(|_| async { Ok(()) })
        .await?;
    let queued = shards as f64 / begun.elapsed().as_secs_f64();

    let before = shared.usage()?;
    let begun = Instant::now();
    go.send(true)?;
    let all = count.wait_for(|count| *count >= shards);
    tokio::select! {
        done = tokio::time::timeout(PATIENCE, all) => drop(done.context("not all were committed")??),
        Some(ended) = workers.join_next() => ended??,
    }
    let done = shards as f64 / begun.elapsed().as_secs_f64();
    let after = shared.usage()?;
    let each = after
        .iter()
        .zip(before)
        .map(|(after, before)| format!("{:.0}", 1e6 * (after.cpu - before.cpu) / shards as f64));
    let rates = [queued, done].map(|rate| format!("{rate:.0}"));
    Ok([images.to_string()].into_iter().chain(rates).chain(each).collect())
}
