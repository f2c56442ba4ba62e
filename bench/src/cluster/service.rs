//! The services of the `fairlead` binary beside this one, and what they cost the machine.

use std::{
    path::{Path, PathBuf},
    process::Stdio,
    time::Duration,
};

use anyhow::{Context, Result, ensure};
use fairlead_common::{
    grpc,
    testing::{METRICS, announced},
    tls::Tls,
};
use tokio::process::{Child, Command};
use tonic::transport::Channel;

use crate::process::{Usage, usage};

/// Longest wait for anything.
pub(crate) const PATIENCE: Duration = Duration::from_secs(300);
/// What a service that serves calls says before its address.
pub(crate) const LISTENING: &str = "listening on ";

/// A policy that asks no energy.
pub(crate) const PLAIN: &str = "\n[policies.plain]\nconcepts = []\nallow_unchecked = true\n";

/// A running service; it ends when dropped.
pub(crate) struct Service {
    /// Where it listens.
    pub(crate) address: String,
    metrics: String,
    process: Child,
}

impl Service {
    /// Starts a service and waits until it says `words` and its address.
    pub(crate) async fn start(mut command: Command, words: &str) -> Result<Self> {
        command.args(["--metrics-listen", "127.0.0.1:0"]).env("FAIRLEAD_ASSETS", asset(""));
        let mut process = command
            .env("FAIRLEAD_LOG", "error")
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .kill_on_drop(true)
            .spawn()
            .context("cannot start the fairlead binary")?;
        let said = tokio::time::timeout(PATIENCE, announced(&mut process, words)).await;
        let said = said.context("the service said nothing")?.context("what it wrote is above")?;
        Ok(Self { address: said.address, metrics: said.metrics, process })
    }

    /// Starts a service that does not listen: a worker.
    pub(crate) async fn start_silent(command: Command) -> Result<Self> {
        Self::start(command, METRICS).await
    }

    /// A channel to it.
    pub(crate) fn channel(&self) -> Result<Channel> {
        Ok(grpc::channel(&self.address, PATIENCE, &Tls::default())?)
    }

    /// What it has cost so far.
    pub(crate) fn usage(&self) -> Result<Usage> {
        usage(self.process.id().context("the service has ended")?)
    }

    /// Sum and count of a histogram.
    pub(crate) async fn histogram(&self, name: &str) -> Result<[f64; 2]> {
        let address = self.metrics.trim_start_matches("http://").trim_end_matches("/metrics");
        let request =
            format!("GET /metrics HTTP/1.1\r\nHost: {address}\r\nConnection: close\r\n\r\n");
        let mut stream = tokio::net::TcpStream::connect(address).await?;
        tokio::io::AsyncWriteExt::write_all(&mut stream, request.as_bytes()).await?;
        let mut page = String::new();
        tokio::io::AsyncReadExt::read_to_string(&mut stream, &mut page).await?;
        let value = |suffix: &str| -> Result<f64> {
            let key = format!("{name}_{suffix} ");
            let line = page.lines().find_map(|line| line.strip_prefix(&key));
            Ok(line.with_context(|| format!("no {key}"))?.trim().parse()?)
        };
        Ok([value("sum")?, value("count")?])
    }

    /// Ends it.
    pub(crate) async fn kill(mut self) -> Result<()> {
        Ok(self.process.kill().await?)
    }
}

/// A path inside `assets/`.
pub(crate) fn asset(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../assets").join(name)
}

/// The binary, on one core of the machine if `core` says so.
pub(crate) fn fairlead(core: Option<usize>) -> Result<Command> {
    let binary = std::env::current_exe()?.with_file_name("fairlead");
    ensure!(
        binary.exists(),
        "{} is missing; build it with `cargo build --release --package fairlead`",
        binary.display()
    );
    let Some(core) = core else { return Ok(Command::new(binary)) };
    // It replaces itself by what it starts.
    let mut command = Command::new("taskset");
    command.args(["--cpu-list", &core.to_string()]).arg(binary);
    Ok(command)
}

/// Writes the embedded policies and [`PLAIN`] into `folder`.
pub(crate) fn policies(folder: &Path) -> Result<PathBuf> {
    let path = folder.join("policies.toml");
    let embedded = std::fs::read_to_string(asset("policies.toml")).context("policies.toml")?;
    std::fs::write(&path, embedded + PLAIN)?;
    Ok(path)
}
