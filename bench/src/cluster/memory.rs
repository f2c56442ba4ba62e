//! The memory of a coordinator while jobs come, are watched to their end, and are looked up: it must not grow
//! with their number. On its own file, and on Redis.

use anyhow::{Context, Result};
use futures::stream::{self, StreamExt, TryStreamExt};
use tokio::{sync::watch, task::JoinSet};

use super::dispatch::{CLIENTS, MODEL, Shared, folder};
use super::jobs::{client, finished, ready, spec};
use super::service::{LISTENING, Service, fairlead, policies};
use super::simulated::Worker;
use crate::report;

const WORKERS: u32 = 4;
/// Shards that a worker holds.
const CAPACITY: u32 = 8;
/// Jobs between two looks.
const STEP: usize = 1_000;
/// Images of a job, each a shard.
const IMAGES: u32 = 2;

/// Makes `jobs` jobs on each store.
pub(super) async fn run(jobs: usize) -> Result<()> {
    let alone = {
        let folder = folder()?;
        let mut command = fairlead(None)?;
        command.args(["coordinator", "--listen", "127.0.0.1:0", "--lease-ttl", "1h", "--data-dir"]);
        command.arg(folder.path().join("data"));
        command.arg("--policies").arg(policies(folder.path())?);
        let coordinator = Service::start(command, LISTENING).await?;
        measure(&coordinator, jobs).await?
    };
    let shared = {
        let shared = Shared::start().await?;
        measure(&shared.coordinator, jobs).await?
    };
    let rows: Vec<Vec<String>> = (0..=jobs / STEP)
        .map(|step| {
            let megabytes = |sizes: &[u64]| format!("{:.1}", sizes[step] as f64 / 1e6);
            vec![(step * STEP).to_string(), megabytes(&alone), megabytes(&shared)]
        })
        .collect();
    println!("\nResident megabytes of a coordinator after so many jobs of {IMAGES} images");
    report::table(&["jobs", "own file", "Redis"], &rows);
    Ok(())
}

/// Resident bytes before the first job and after every thousand.
async fn measure(coordinator: &Service, jobs: usize) -> Result<Vec<u64>> {
    let (_go, may_go) = watch::channel(true);
    let (committed, _count) = watch::channel(0);
    let mut workers = JoinSet::new();
    for number in 0..WORKERS {
        let channel = coordinator.channel()?;
        let worker = Worker::attach(channel, format!("worker-{number}"), MODEL, CAPACITY).await?;
        workers.spawn(worker.complete_all(may_go.clone(), committed.clone()));
    }
    ready(&coordinator.channel()?, WORKERS, false).await?;
    let client = client(coordinator.channel()?);
    let mut resident = vec![coordinator.usage()?.resident];
    for _ in 0..jobs / STEP {
        let made =
            stream::iter((0..STEP).map(|_| finished(&client, spec("plain", "a cat", IMAGES, 1))))
                .buffer_unordered(CLIENTS)
                .try_for_each(|_| async { Ok(()) });
        tokio::select! {
            made = made => made?,
            Some(ended) = workers.join_next() => ended?.context("a worker ended")?,
        }
        resident.push(coordinator.usage()?.resident);
    }
    Ok(resident)
}
