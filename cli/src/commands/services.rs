//! One service a process: bind, run, drain on the first signal, exit on the second.

use std::{net::SocketAddr, process::ExitCode};

use anyhow::{Context, Result};
use clap::Args;
use fairlead_common::{metrics, shutdown};
use fairlead_coordinator::CoordinatorArgs;
use fairlead_energy::{EnergyArgs, EnergyOptions};
use fairlead_worker::WorkerArgs;
use tokio::net::TcpListener;

use crate::output::say;

/// A service's own options and what every service has.
#[derive(Args)]
pub(crate) struct ServiceArgs<T: Args> {
    #[command(flatten)]
    service: T,
    #[command(flatten)]
    metrics: MetricsArgs,
}

/// Where metrics are shown.
#[derive(Args, Clone, Copy)]
pub(crate) struct MetricsArgs {
    /// Serve Prometheus metrics at http://ADDR/metrics; port 0 takes a free one. Default: not at
    /// all. There is no authentication: keep it inside.
    #[arg(long, value_name = "ADDR", env = "FAIRLEAD_METRICS_LISTEN")]
    metrics_listen: Option<SocketAddr>,
}

impl MetricsArgs {
    /// Starts recording and serving, if asked to, until the process ends: what happens while a service
    /// drains counts too.
    pub(crate) async fn serve(self) -> Result<()> {
        let Some(address) = self.metrics_listen else { return Ok(()) };
        let listener = TcpListener::bind(address).await.with_context(|| {
            format!("cannot listen on {address}; choose another address with --metrics-listen")
        })?;
        say!("metrics at http://{}/metrics", listener.local_addr()?);
        let served = metrics::serve(listener);
        tokio::spawn(async move {
            if let Err(error) = served.await {
                tracing::error!(%error, "the page of metrics is gone");
            }
        });
        Ok(())
    }
}

pub(crate) async fn coordinator(args: ServiceArgs<CoordinatorArgs>) -> Result<ExitCode> {
    let stop = shutdown::on_signal()?;
    args.metrics.serve().await?;
    let args = args.service;
    let options = args.options()?;
    let listener = bind(args.listen).await?;
    fairlead_coordinator::run(listener, options, stop).await?;
    Ok(ExitCode::SUCCESS)
}

pub(crate) async fn worker(args: ServiceArgs<WorkerArgs>) -> Result<ExitCode> {
    let stop = shutdown::on_signal()?;
    args.metrics.serve().await?;
    fairlead_worker::run(args.service, stop).await?;
    Ok(ExitCode::SUCCESS)
}

pub(crate) async fn energy(args: ServiceArgs<EnergyArgs>) -> Result<ExitCode> {
    let stop = shutdown::on_signal()?;
    args.metrics.serve().await?;
    let listener = bind(args.service.listen).await?;
    fairlead_energy::run(listener, EnergyOptions::from(args.service), stop).await?;
    Ok(ExitCode::SUCCESS)
}

/// Binds and says where: with port 0 nobody could know otherwise.
async fn bind(address: SocketAddr) -> Result<TcpListener> {
    let listener = TcpListener::bind(address).await.with_context(|| {
        format!("cannot listen on {address}; choose another address with --listen")
    })?;
    say!("listening on http://{}", listener.local_addr()?);
    Ok(listener)
}
