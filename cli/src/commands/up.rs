//! `fairlead up`: a cluster on loopback that stays.

use std::{net::SocketAddr, path::PathBuf, process::ExitCode};

use anyhow::{Context, Result};
use clap::Args;
use fairlead_common::{shutdown, tls::Tls};

use super::services::MetricsArgs;
use crate::{
    assets::ModelArgs,
    cluster::{ClusterOptions, LocalArgs, LocalCluster},
    output::say,
};

/// Runs coordinator, worker and energy node in one process, each on its own loopback port.
///
/// Then, in another terminal: `fairlead generate --server http://127.0.0.1:7100 "a cat"`.
#[derive(Args)]
pub(crate) struct UpArgs {
    /// Address of the coordinator, on loopback: this mode speaks no TLS. With `[tenants.NAME]` in --policies,
    /// clients need a key.
    #[arg(long, default_value = "127.0.0.1:7100", env = "FAIRLEAD_LISTEN")]
    listen: SocketAddr,
    /// Folder of jobs, images and safety records; kept between runs.
    #[arg(long, default_value = "fairlead-data", env = "FAIRLEAD_DATA_DIR")]
    data_dir: PathBuf,
    #[command(flatten)]
    local: LocalArgs,
    #[command(flatten)]
    models: ModelArgs,
    #[command(flatten)]
    metrics: MetricsArgs,
}

pub(crate) async fn run(args: UpArgs) -> Result<ExitCode> {
    let stop = shutdown::on_signal()?;
    Tls::default().may_listen(args.listen, false).context(
        "`fairlead up` is for one machine: take an address on loopback, or start the services one by one",
    )?;
    args.metrics.serve().await?;
    let options = ClusterOptions {
        listen: args.listen,
        data_dir: Some(args.data_dir),
        measuring: false,
        ..args.local.cluster(&args.models)
    };
    let mut cluster = LocalCluster::start(options).await?;
    say!("cluster ready at {}", cluster.address());
    tokio::select! {
        () = stop.cancelled() => {}
        failed = cluster.failed() => failed?,
    }
    cluster.stop().await?;
    Ok(ExitCode::SUCCESS)
}
