//! One service as a process of its own.

use std::{
    process::{ExitStatus, Stdio},
    time::Duration,
};

use anyhow::{Context, Result, ensure};
use fairlead_common::testing::{Announced, announced};
use tokio::{
    process::{Child, Command},
    time::timeout,
};

use crate::PATIENCE;

/// What a service says before the address that it serves.
pub const LISTENING: &str = "listening on ";

/// A running process; it is killed when this is dropped.
#[derive(Debug)]
pub struct Process {
    name: String,
    child: Child,
}

impl Process {
    /// Starts `command`; nothing of what it says is read.
    pub fn start(name: &str, mut command: Command) -> Result<Self> {
        let child = command.stdout(Stdio::null()).spawn();
        let child = child.with_context(|| format!("`{name}` did not start"))?;
        Ok(Self { name: name.to_owned(), child })
    }

    /// Starts `command` and waits for a line that begins with `words`.
    pub async fn start_saying(
        name: &str,
        mut command: Command,
        words: &str,
    ) -> Result<(Self, Announced)> {
        let child = command.stdout(Stdio::piped()).spawn();
        let mut child = child.with_context(|| format!("`{name}` did not start"))?;
        let announced = timeout(PATIENCE, announced(&mut child, words))
            .await
            .with_context(|| format!("`{name}` said nothing"))?
            .with_context(|| format!("`{name}`"))?;
        Ok((Self { name: name.to_owned(), child }, announced))
    }

    /// Its name.
    pub fn name(&self) -> &str {
        &self.name
    }

    fn id(&self) -> Result<u32> {
        self.child.id().with_context(|| format!("`{}` has ended", self.name))
    }

    /// Sends it a signal: STOP, CONT, TERM.
    pub async fn signal(&self, signal: &str) -> Result<()> {
        let id = self.id()?;
        let kill = Command::new("kill").args(["-s", signal, &id.to_string()]).status().await?;
        ensure!(kill.success(), "kill -s {signal} {id}: {kill}");
        Ok(())
    }

    /// Names of its threads, as Linux tells them.
    pub fn threads(&self) -> Result<Vec<String>> {
        let tasks = std::fs::read_dir(format!("/proc/{}/task", self.id()?))?;
        // A thread may end while this looks.
        let names = tasks
            .flatten()
            .filter_map(|task| std::fs::read_to_string(task.path().join("comm")).ok());
        Ok(names.map(|name| name.trim_end().to_owned()).collect())
    }

    /// Kills it with SIGKILL and waits for its end.
    pub async fn kill(mut self) -> Result<()> {
        Ok(self.child.kill().await?)
    }

    /// Waits for it to end by itself.
    pub async fn ended(&mut self, patience: Duration) -> Result<ExitStatus> {
        let ended = timeout(patience, self.child.wait()).await;
        Ok(ended.with_context(|| format!("`{}` did not end", self.name))??)
    }

    /// How it ended, if it did.
    pub fn has_ended(&mut self) -> Result<Option<ExitStatus>> {
        Ok(self.child.try_wait()?)
    }
}
