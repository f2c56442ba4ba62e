//! Measurements on clusters of real processes. The `fairlead` binary beside this one runs the services; each
//! quantity is measured in turns with the one it is compared with.

mod calls;
mod crowd;
mod dispatch;
mod jobs;
mod memory;
mod service;
mod simulated;
mod steering;
mod waiting;

use anyhow::Result;
use clap::Args;

/// How large the simulated clusters are.
#[derive(Debug, Args)]
pub(crate) struct Sizes {
    /// Shards of `cluster-dispatch`.
    #[arg(long, default_value_t = 20_000)]
    shards: usize,
    /// Attached workers of `cluster-crowd`.
    #[arg(long, default_value_t = 1_000)]
    workers: usize,
    /// Queued jobs of `cluster-crowd`.
    #[arg(long, default_value_t = 100_000)]
    jobs: usize,
    /// Jobs of `cluster-memory`, each made and watched to its end.
    #[arg(long, default_value_t = 10_000)]
    made: usize,
}

/// One measurement.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Measurement {
    /// Images without an energy, with closed gates and with an open one.
    Steering,
    /// How much of the time lost to waiting for an energy node a second micro-batch gives back.
    Waiting,
    /// Single calls to an energy node.
    Calls,
    /// Shards a second of a coordinator on Redis.
    Dispatch,
    /// A coordinator with many workers and a long queue.
    Crowd,
    /// The memory of a coordinator over many jobs.
    Memory,
}

impl Measurement {
    /// All of them, in the order in which they run.
    pub(crate) const ALL: [Self; 6] =
        [Self::Steering, Self::Waiting, Self::Calls, Self::Dispatch, Self::Crowd, Self::Memory];

    /// Its name.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Steering => "cluster-steering",
            Self::Waiting => "cluster-waiting",
            Self::Calls => "cluster-calls",
            Self::Dispatch => "cluster-dispatch",
            Self::Crowd => "cluster-crowd",
            Self::Memory => "cluster-memory",
        }
    }

    /// Measures and prints a table.
    pub(crate) async fn run(self, rounds: usize, sizes: &Sizes) -> Result<()> {
        match self {
            Self::Steering => steering::run(rounds).await,
            Self::Waiting => waiting::run(rounds).await,
            Self::Calls => calls::run(rounds).await,
            Self::Dispatch => dispatch::run(sizes.shards).await,
            Self::Crowd => crowd::run(sizes.workers, sizes.jobs).await,
            Self::Memory => memory::run(sizes.made).await,
        }
    }
}
