//! A process that holds one case and runs it when told: it prints `ready`, then the seconds of one run for
//! every line that it reads.

use std::ffi::OsStr;
use std::io::{BufRead, BufReader, Lines, Write};
use std::path::Path;
use std::process::{ChildStdin, ChildStdout, Command, Stdio};
use std::time::Instant;

use anyhow::{Context, Result, bail};

use crate::process::bytes_of;

/// A running child; it ends when this is dropped.
pub(crate) struct Child {
    process: std::process::Child,
    input: ChildStdin,
    output: Lines<BufReader<ChildStdout>>,
}

impl Child {
    /// Starts a child and waits until it is ready.
    pub(crate) fn spawn(program: &Path, arguments: &[&OsStr]) -> Result<Self> {
        let mut process = Command::new(program)
            .args(arguments)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .with_context(|| format!("cannot start {}", program.display()))?;
        let input = process.stdin.take().context("the child's standard input")?;
        let output = process.stdout.take().context("the child's standard output")?;
        let mut child = Self { process, input, output: BufReader::new(output).lines() };
        match child.line()?.as_str() {
            "ready" => Ok(child),
            said => bail!("{} said {said:?} instead of ready", program.display()),
        }
    }

    /// Has the child run its case once; seconds.
    pub(crate) fn run(&mut self) -> Result<f64> {
        writeln!(self.input, "run").context("the child is gone")?;
        let line = self.line()?;
        line.parse().with_context(|| format!("the child said {line:?} instead of a number"))
    }

    /// The most memory that the child has had, in bytes, where the system tells (`VmHWM` of `/proc`).
    pub(crate) fn peak_memory(&self) -> Result<Option<u64>> {
        let path = format!("/proc/{}/status", self.process.id());
        let Ok(status) = std::fs::read_to_string(&path) else { return Ok(None) };
        bytes_of(&status, "VmHWM:").context("no VmHWM in /proc").map(Some)
    }

    fn line(&mut self) -> Result<String> {
        match self.output.next() {
            Some(line) => line.context("reading from the child"),
            None => {
                let status = self.process.wait().context("waiting for the child")?;
                bail!("the child ended with {status}; what it wrote is above")
            }
        }
    }
}

impl Drop for Child {
    fn drop(&mut self) {
        // It may have ended by itself, which is as good.
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// The child's side: one untimed run, then one for each line.
pub(crate) fn serve(mut run: impl FnMut() -> Result<()>) -> Result<()> {
    run()?;
    println!("ready");
    for line in std::io::stdin().lines() {
        line.context("reading from the parent")?;
        let start = Instant::now();
        run()?;
        println!("{}", start.elapsed().as_secs_f64());
    }
    Ok(())
}
