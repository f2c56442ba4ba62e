//! How much of the time lost to waiting for an energy node a second micro-batch gives back.
//!
//! The worker has one core and the energy node another. With one micro-batch the worker's core is idle
//! while it waits for an answer. What a steered job then takes beyond the worker's own processor time is
//! *lost*; how much sooner the same job ends with two micro-batches is *recovered*:
//!
//! ```text
//! lost = wall(1) - cpu(1),    recovered = (wall(1) - wall(2)) / lost
//! ```

use std::time::Instant;

use anyhow::Result;
use fairlead_proto::v1::JobSpec;

use super::jobs::{Generation, TARGET, client, finished, ready, spec};
use super::service::{LISTENING, Service, asset, fairlead, policies};
use crate::report::{self, median};

/// Images of one job, and of one shard. The last shard's waits have nobody to fill them: the longer the
/// job, the less that counts, and the nearer the result to that of a worker which never runs out of shards.
const IMAGES: u32 = 64;
const SHARD: u32 = 2;

/// Times of one kind of job, seconds.
#[derive(Default)]
struct Times {
    wall: Vec<f64>,
    /// On the worker's core.
    cpu: Vec<f64>,
}

/// Steered and unsteered jobs with one micro-batch, and steered ones with two.
pub(super) async fn run(rounds: usize) -> Result<()> {
    let cores = std::thread::available_parallelism()?.get();
    let core = |number: usize| (cores >= 2).then_some(number);
    if cores < 2 {
        println!(
            "\nthis machine has one core: worker and energy node share it, nothing is recovered"
        );
    }
    let folder = tempfile::tempdir()?;
    let mut command = fairlead(None)?;
    command.args(["coordinator", "--listen", "127.0.0.1:0", "--data-dir"]);
    command.arg(folder.path().join("data"));
    command.arg("--policies").arg(policies(folder.path())?);
    let coordinator = Service::start(command, LISTENING).await?;
    let mut command = fairlead(core(1))?;
    command.args(["energy", "--listen", "127.0.0.1:0", "--coordinator", &coordinator.address]);
    command.arg("--model").arg(asset("emojiland-clip"));
    command.arg("--concepts").arg(asset("concepts"));
    command.arg("--calibrations").arg(asset("calibrations"));
    let _energy = Service::start(command, LISTENING).await?;

    let channel = coordinator.channel()?;
    let client = client(channel.clone());
    let [mut plain, mut one, mut two] = [Times::default(), Times::default(), Times::default()];
    for _ in 0..rounds {
        for micro_batches in ["1", "2"] {
            ready(&channel, 0, true).await?;
            let mut command = fairlead(core(0))?;
            command.args(["worker", "--coordinator", &coordinator.address, "--threads", "1"]);
            // One more than it makes at once: the coordinator still checks the last one.
            command.args(["--micro-batches", micro_batches, "--capacity", "3"]);
            command.arg("--model").arg(asset("emojiland-sd"));
            let worker = Service::start_silent(command).await?;
            ready(&channel, 1, true).await?;
            // Not timed: the first shard of each worker.
            finished(&client, spec("", TARGET, SHARD, SHARD)).await?;
            let steered = spec("", TARGET, IMAGES, SHARD);
            if micro_batches == "1" {
                let unsteered = spec("plain", TARGET, IMAGES, SHARD);
                time(&client, &worker, unsteered, &mut plain).await?;
                time(&client, &worker, steered, &mut one).await?;
            } else {
                time(&client, &worker, steered, &mut two).await?;
            }
            worker.kill().await?;
        }
    }
    print(rounds, [&plain, &one, &two]);
    Ok(())
}

async fn time(
    client: &Generation,
    worker: &Service,
    spec: JobSpec,
    times: &mut Times,
) -> Result<()> {
    let (begun, before) = (Instant::now(), worker.usage()?.cpu);
    finished(client, spec).await?;
    times.wall.push(begun.elapsed().as_secs_f64());
    times.cpu.push(worker.usage()?.cpu - before);
    Ok(())
}

fn print(rounds: usize, times: [&Times; 3]) {
    let median = |values: &[f64]| median(values).unwrap_or(f64::NAN);
    let names = ["unsteered", "steered, 1 micro-batch", "steered, 2 micro-batches"];
    let row = |(name, times): (&str, &Times)| {
        let (wall, cpu) = (median(&times.wall), median(&times.cpu));
        let each = |seconds: f64| format!("{:.0}", 1e3 * seconds / f64::from(IMAGES));
        vec![name.to_owned(), format!("{:.2}", f64::from(IMAGES) / wall), each(wall), each(cpu)]
    };
    let rows: Vec<_> = names.into_iter().zip(times).map(row).collect();
    println!("\n{IMAGES} images in shards of {SHARD}, a gate open, {rounds} jobs of each; medians");
    report::table(&["", "images a second", "ms an image", "worker's ms on its core"], &rows);
    let [_, one, two] = times;
    let lost = median(&one.wall) - median(&one.cpu);
    let recovered = (median(&one.wall) - median(&two.wall)) / lost;
    println!(
        "lost to waiting with 1: {:.0} ms an image, recovered by 2: {:.0} % (goal: 80 %)",
        1e3 * lost / f64::from(IMAGES),
        1e2 * recovered
    );
}
