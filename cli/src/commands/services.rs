//! One service a process: bind, run, drain on the first signal, exit on the second.

use std::process::ExitCode;

use anyhow::{Context, Result};
use fairlead_common::shutdown;
use fairlead_coordinator::CoordinatorArgs;
use fairlead_energy::{EnergyArgs, EnergyOptions};
use fairlead_worker::WorkerArgs;
use tokio::net::TcpListener;

pub(crate) async fn coordinator(args: CoordinatorArgs) -> Result<ExitCode> {
    let stop = shutdown::on_signal()?;
    let options = args.options()?;
    let listener = bind(args.listen).await?;
    fairlead_coordinator::run(listener, options, stop).await?;
    Ok(ExitCode::SUCCESS)
}

pub(crate) async fn worker(args: WorkerArgs) -> Result<ExitCode> {
    let stop = shutdown::on_signal()?;
    fairlead_worker::run(args, stop).await?;
    Ok(ExitCode::SUCCESS)
}

pub(crate) async fn energy(args: EnergyArgs) -> Result<ExitCode> {
    let stop = shutdown::on_signal()?;
    let listener = bind(args.listen).await?;
    fairlead_energy::run(listener, EnergyOptions::from(args), stop).await?;
    Ok(ExitCode::SUCCESS)
}

/// Binds and says where: with port 0 nobody could know otherwise.
async fn bind(address: std::net::SocketAddr) -> Result<TcpListener> {
    let listener = TcpListener::bind(address).await.with_context(|| {
        format!("cannot listen on {address}; choose another address with --listen")
    })?;
    println!("listening on http://{}", listener.local_addr()?);
    Ok(listener)
}
