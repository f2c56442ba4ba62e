//! One service a process: bind, run, drain on the first signal, exit on the second.

use std::{net::SocketAddr, process::ExitCode};

use anyhow::{Context, Result, bail};
use clap::Args;
use fairlead_common::{
    identity::Role,
    metrics, shutdown,
    tls::{Tls, TlsArgs},
};
use fairlead_coordinator::{CoordinatorArgs, CoordinatorOptions};
use fairlead_energy::EnergyArgs;
use fairlead_worker::WorkerArgs;
use tokio::net::TcpListener;

use crate::output::say;

/// A service's own options and what every service has.
#[derive(Args)]
pub(crate) struct ServiceArgs<T: Args> {
    #[command(flatten)]
    service: T,
    #[command(flatten)]
    tls: TlsArgs,
    #[command(flatten)]
    metrics: MetricsArgs,
}

/// Where metrics are shown.
#[derive(Args, Clone, Copy)]
pub(crate) struct MetricsArgs {
    /// Serve Prometheus metrics at http://ADDR/metrics; port 0 takes a free one. Default: not at
    /// all. There is no authentication: keep it inside.
    #[arg(long, value_name = "ADDR", env = "FAIRLEAD_METRICS_LISTEN", help_heading = "Metrics")]
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
    let (tls, args) = (certified(&args.tls, Role::Coordinator)?, args.service);
    tls.may_listen(args.listen, args.insecure)?;
    let options = CoordinatorOptions { tls: tls.clone(), ..args.options()? };
    if options.policies.tenants().is_empty() && !args.insecure && !args.listen.ip().is_loopback() {
        bail!(
            "will not let anybody in on {}, where other machines can connect: name [tenants.NAME] in \
             --policies (`fairlead keys client` makes their keys), or say --insecure",
            args.listen
        );
    }
    if tls.is_on() {
        options.policies.check_known()?;
    }
    let listener = bind(args.listen, &tls).await?;
    fairlead_coordinator::run(listener, options, stop).await?;
    Ok(ExitCode::SUCCESS)
}

pub(crate) async fn worker(args: ServiceArgs<WorkerArgs>) -> Result<ExitCode> {
    let stop = shutdown::on_signal()?;
    args.metrics.serve().await?;
    let options = WorkerArgs { tls: certified(&args.tls, Role::Worker)?, ..args.service };
    fairlead_worker::run(options, stop).await?;
    Ok(ExitCode::SUCCESS)
}

pub(crate) async fn energy(args: ServiceArgs<EnergyArgs>) -> Result<ExitCode> {
    let stop = shutdown::on_signal()?;
    args.metrics.serve().await?;
    let (tls, args) = (certified(&args.tls, Role::Energy)?, args.service);
    tls.may_listen(args.listen, args.insecure)?;
    let listener = bind(args.listen, &tls).await?;
    fairlead_energy::run(listener, args.options(tls), stop).await?;
    Ok(ExitCode::SUCCESS)
}

/// The certificates of a service, which are read again when they change, until the process ends.
fn certified(args: &TlsArgs, role: Role) -> Result<Tls> {
    let tls = args.load_for(role)?;
    tokio::spawn(tls.clone().follow());
    Ok(tls)
}

/// Binds and says where: with port 0 nobody could know otherwise.
async fn bind(address: SocketAddr, tls: &Tls) -> Result<TcpListener> {
    let listener = TcpListener::bind(address).await.with_context(|| {
        format!("cannot listen on {address}; choose another address with --listen")
    })?;
    say!("listening on {}://{}", tls.scheme(), listener.local_addr()?);
    Ok(listener)
}
