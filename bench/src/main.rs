//! `make bench`: measurements on clusters, then the frozen layers beside torch, in one run.
//!
//! Every case of the latter runs in two child processes, ours and torch's, which take turns, so that whatever else the
//! machine does meets both. The table shows the medians, their ratio and each process's peak memory.

mod case;
mod child;
mod cluster;
mod fixture;
mod process;
mod report;

use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use clap::Parser;

use case::Case;
use child::Child;
use cluster::{Measurement, Sizes};
use report::Row;

/// With [`fairlead_models::prepare_process`]: activations come and go at every layer.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// Times the frozen layers beside torch.
#[derive(Debug, Parser)]
struct Options {
    /// Runs only the cases whose names contain this, e.g. `vae`, `cluster` or `cluster-waiting`.
    #[arg(default_value = "")]
    filter: String,
    #[command(flatten)]
    sizes: Sizes,
    /// Threads of each side.
    #[arg(long, default_value_t = 2)]
    threads: usize,
    /// Timed runs of each side, after one that is not timed.
    #[arg(long, default_value_t = 5)]
    rounds: usize,
    /// The Python that has torch, diffusers and transformers.
    #[arg(long, env = "FAIRLEAD_PYTHON", default_value = "python3")]
    python: PathBuf,
    /// Serves one case on standard input and output; used by the benchmark itself.
    #[arg(long, hide = true, requires = "models")]
    serve: Option<String>,
    /// Folder of the random models; used by the benchmark itself.
    #[arg(long, hide = true)]
    models: Option<PathBuf>,
}

fn main() -> Result<()> {
    let options = Options::parse();
    if let (Some(name), Some(models)) = (&options.serve, &options.models) {
        return serve(name, models, options.threads);
    }
    let is_meant = |name: &str| name.contains(&options.filter);
    let measurements: Vec<Measurement> =
        Measurement::ALL.into_iter().filter(|m| is_meant(m.name())).collect();
    let cases: Vec<Case> = Case::ALL.into_iter().filter(|c| is_meant(c.name())).collect();
    anyhow::ensure!(
        !cases.is_empty() || !measurements.is_empty(),
        "no case is named like {:?}; there are {}, {}",
        options.filter,
        Measurement::ALL.map(Measurement::name).join(", "),
        Case::names()
    );
    // First: here a missing binary is found out at once.
    measure(&measurements, &options)?;
    if cases.is_empty() {
        return Ok(());
    }
    let models = tempfile::tempdir().context("a folder for the random models")?;
    fixture::write(models.path())?;
    if let Err(why) = peer(&options, "probe", models.path()) {
        eprintln!(
            "torch is skipped, and what needs its models: {why:#}; set FAIRLEAD_PYTHON to a Python with torch, diffusers and transformers"
        );
        let ours: Vec<Case> = cases.into_iter().filter(|case| !case.needs_torch()).collect();
        return run(&ours, &options, models.path(), false);
    }
    run(&cases, &options, models.path(), true)
}

fn measure(measurements: &[Measurement], options: &Options) -> Result<()> {
    let runtime = tokio::runtime::Runtime::new()?;
    for measurement in measurements {
        let measured = runtime.block_on(measurement.run(options.rounds, &options.sizes));
        measured.with_context(|| measurement.name())?;
    }
    Ok(())
}

fn run(cases: &[Case], options: &Options, models: &Path, torch: bool) -> Result<()> {
    report::header(options.threads, options.rounds);
    for case in cases {
        let name = case.name();
        if case.needs_torch() {
            write(&options.python, name, models).with_context(|| format!("case {name}"))?;
        }
        let mut ours = ours(options, name, models).with_context(|| format!("case {name}"))?;
        let mut theirs = torch
            .then(|| peer(options, name, models))
            .transpose()
            .with_context(|| format!("torch on case {name}"))?;
        let (mut our_times, mut their_times) = (Vec::new(), Vec::new());
        for _ in 0..options.rounds {
            our_times.push(ours.run()?);
            if let Some(theirs) = &mut theirs {
                their_times.push(theirs.run()?);
            }
        }
        let memory = (ours.peak_memory()?, theirs.as_ref().map(Child::peak_memory).transpose()?);
        report::row(&Row { name, goal: case.goal(), ours: our_times, theirs: their_times, memory });
    }
    Ok(())
}

/// This program again, serving one case.
fn ours(options: &Options, name: &str, models: &Path) -> Result<Child> {
    let program = std::env::current_exe().context("the path of this program")?;
    let threads = options.threads.to_string();
    Child::spawn(
        &program,
        &[
            "--serve".as_ref(),
            name.as_ref(),
            "--models".as_ref(),
            models.as_ref(),
            "--threads".as_ref(),
            threads.as_ref(),
        ],
    )
}

/// The same case in torch.
fn peer(options: &Options, name: &str, models: &Path) -> Result<Child> {
    let threads = options.threads.to_string();
    let arguments = [name.as_ref(), threads.as_ref(), models.as_ref()];
    Child::spawn(&options.python, &[&[script().as_ref()], &arguments[..]].concat())
}

fn script() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("peer.py")
}

/// Has torch write the random model of a case.
fn write(python: &Path, name: &str, models: &Path) -> Result<()> {
    let status = std::process::Command::new(python)
        .args([script().as_os_str(), "write".as_ref(), name.as_ref(), models.as_ref()])
        .status()
        .with_context(|| format!("cannot start {}", python.display()))?;
    anyhow::ensure!(status.success(), "torch did not write its model: {status}");
    Ok(())
}

/// Builds a case, then answers every line of input with the seconds that one run took.
fn serve(name: &str, models: &Path, threads: usize) -> Result<()> {
    // SAFETY: a child that serves a case has no other thread yet.
    #[allow(unsafe_code)]
    unsafe {
        fairlead_models::prepare_process();
    }
    rayon::ThreadPoolBuilder::new()
        .num_threads(threads)
        .build_global()
        .context("the thread pool")?;
    let case = Case::named(name)
        .with_context(|| format!("no case {name}; there are {}", Case::names()))?;
    let run = case.build(models)?;
    child::serve(run)
}
