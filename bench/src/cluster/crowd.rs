//! A coordinator on Redis with many attached workers, all busy, and a long queue: memory, and how long calls
//! take.

use std::time::Instant;

use anyhow::{Context, Result, ensure};
use fairlead_proto::v1::GetJobRequest;
use futures::stream::{self, StreamExt, TryStreamExt};
use tokio::task::JoinSet;

use super::dispatch::{CLIENTS, MODEL, Shared};
use super::jobs::{Generation, client, ready, spec, submit};
use super::simulated::Worker;
use crate::report::{self, percentile};

/// Workers that share a connection; a server allows a few hundred streams on one.
const STREAMS: usize = 100;
/// Jobs for the idle worker, and jobs that are looked up, one after the other.
const ASKED: usize = 200;
/// The generator of the idle worker.
const IDLE: &str = "idle";

/// Attaches `workers`, queues `jobs` of one shard, then asks.
pub(super) async fn run(workers: usize, jobs: usize) -> Result<()> {
    let shared = Shared::start().await?;
    let client = client(shared.coordinator.channel()?);
    let empty = shared.usage()?;
    let mut held = JoinSet::new();
    let begun = Instant::now();
    for first in (0..workers).step_by(STREAMS) {
        let channel = shared.coordinator.channel()?;
        for number in first..workers.min(first + STREAMS) {
            let worker =
                Worker::attach(channel.clone(), format!("worker-{number}"), MODEL, 1).await?;
            held.spawn(worker.hold());
        }
    }
    let attached = begun.elapsed().as_secs_f64();
    // One more, with a generator of its own: what is queued for the others does not come to it.
    let mut idle = Worker::attach(shared.coordinator.channel()?, IDLE.into(), IDLE, 1).await?;
    ready(&shared.coordinator.channel()?, workers as u32 + 1, false).await?;
    let crowded = shared.usage()?;

    let begun = Instant::now();
    // The busy workers take a shard each; the others wait.
    let submitted: Vec<(String, f64)> =
        stream::iter((0..workers + jobs).map(|_| timed(&client, MODEL)))
            .buffer_unordered(CLIENTS)
            .try_collect()
            .await?;
    let rate = submitted.len() as f64 / begun.elapsed().as_secs_f64();
    let queued = shared.usage()?;
    let submits: Vec<f64> = submitted.iter().map(|(_, took)| *took).collect();

    let mut assigned = Vec::new();
    for _ in 0..ASKED {
        let begun = Instant::now();
        let (job_id, _) = timed(&client, IDLE).await?;
        let assignment = idle.assignment().await?;
        assigned.push(begun.elapsed().as_secs_f64());
        ensure!(assignment.job_id == job_id, "the idle worker was given another's job");
        idle.complete(&assignment).await?;
    }
    let mut looked_up = Vec::new();
    for (job_id, _) in submitted.iter().step_by(submitted.len().div_ceil(ASKED)) {
        let begun = Instant::now();
        let request = GetJobRequest { job_id: job_id.clone() };
        client.clone().get_job(request).await?.into_inner().job.context("no job")?;
        looked_up.push(begun.elapsed().as_secs_f64());
    }
    if let Some(ended) = held.try_join_next() {
        ended?.context("a worker lost its stream")?;
    }

    println!(
        "\none coordinator on Redis, {workers} workers with a shard each, attached in {attached:.1} s, and \
         {jobs} queued jobs of one shard, submitted by {CLIENTS} clients at {rate:.0} a second"
    );
    let megabytes = |i: usize| format!("{:.0}", queued[i].resident as f64 / 1e6);
    let before = |i: usize| format!("{:.0}", empty[i].resident as f64 / 1e6);
    let between = |i: usize| format!("{:.0}", crowded[i].resident as f64 / 1e6);
    report::table(
        &["resident MB", "empty", "workers attached", "jobs queued"],
        &[
            vec!["coordinator".into(), before(0), between(0), megabytes(0)],
            vec!["Redis".into(), before(1), between(1), megabytes(1)],
        ],
    );
    let row = |name: &str, times: &[f64]| {
        let ms = |q| format!("{:.1}", 1e3 * percentile(times, q).unwrap_or(f64::NAN));
        vec![name.to_owned(), ms(0.5), ms(0.99), ms(1.0)]
    };
    report::table(
        &["ms", "p50", "p99", "most"],
        &[
            row("SubmitJob", &submits),
            row("submit to assignment, idle worker", &assigned),
            row("GetJob", &looked_up),
        ],
    );
    Ok(())
}

/// Submits a job of one image for `model`; its id and the seconds that it took.
async fn timed(client: &Generation, model: &str) -> Result<(String, f64)> {
    let begun = Instant::now();
    let spec =
        fairlead_proto::v1::JobSpec { model: model.to_owned(), ..spec("plain", "a cat", 1, 1) };
    let job = submit(client, spec).await?;
    Ok((job.job_id, begun.elapsed().as_secs_f64()))
}
