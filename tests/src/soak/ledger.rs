//! What a soak run has seen, and the table that it ends with.

use std::{
    collections::{BTreeMap, HashSet},
    fmt,
    time::Duration,
};

use fairlead_proto::v1::{ImageStatus, Job, JobState};
use parking_lot::Mutex;

/// Messages kept about each kind of what must not be.
const MESSAGES: u64 = 5;
/// Reasons of failed jobs that are kept.
const REASONS: usize = 5;
/// How failed jobs are counted.
const FAILED: &str = "failed, nothing unchecked released";
/// Width of the table's first column.
const WIDTH: usize = 46;

/// What must not happen even once.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Breach {
    /// An accepted job without an end, or an image of a completed job that cannot be fetched.
    Lost,
    /// Two jobs for one key, or two accepted results for one shard.
    Duplicated,
    /// An image that left without a signed record of a check of its bytes for every pinned concept.
    Unchecked,
    /// An image that is not the one of the calm run.
    Different,
    /// A service that ended by itself, or did not end well when it was told to stop.
    Ended,
}

impl Breach {
    const ALL: [(Self, &'static str); 5] = [
        (Self::Lost, "lost"),
        (Self::Duplicated, "duplicated"),
        (Self::Unchecked, "released unchecked"),
        (Self::Different, "byte differences to the calm run"),
        (Self::Ended, "services that ended badly"),
    ];
}

/// What a soak run has seen.
#[derive(Debug, Clone, Default)]
pub struct Report {
    /// Seed of its faults and requests.
    pub seed: u64,
    /// Images asked for.
    pub wanted: u64,
    /// How long it took after the calm run.
    pub took: Duration,
    /// Distinct requests, and images that the calm run made of them.
    pub calm: (usize, usize),
    /// Jobs by how they ended.
    pub jobs: BTreeMap<&'static str, u64>,
    /// Images by what became of them.
    pub images: BTreeMap<&'static str, u64>,
    /// What clients did beside submitting and watching.
    pub clients: BTreeMap<&'static str, u64>,
    /// Faults of the cluster by kind.
    pub faults: BTreeMap<String, u64>,
    /// Calls that failed and were tried again, by code.
    pub errors: BTreeMap<String, u64>,
    /// Why the first jobs failed that did.
    pub reasons: Vec<String>,
    /// How often what must not be was seen.
    pub breaches: BTreeMap<Breach, u64>,
    /// What was seen then; of many the first.
    pub messages: Vec<String>,
}

impl Report {
    /// Whether nothing was seen that must not be.
    pub fn is_clean(&self) -> bool {
        self.breaches.values().all(|count| *count == 0)
    }

    /// Images that were compared with those of the calm run.
    pub fn compared(&self) -> u64 {
        ["released", "withheld"].iter().filter_map(|status| self.images.get(status)).sum()
    }

    /// Jobs that failed, and all that have ended.
    pub fn failed_jobs(&self) -> (u64, u64) {
        let of = |state| self.jobs.get(state).copied().unwrap_or_default();
        let failed = of(FAILED);
        (failed, failed + of("completed") + of("cancelled"))
    }

    /// Faults of the cluster, of all kinds.
    pub fn all_faults(&self) -> u64 {
        self.faults.values().sum()
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut row = |name: &str, value: u64| writeln!(f, "  {name:<WIDTH$}{value:>8}");
        row("seed", self.seed)?;
        row("images asked for", self.wanted)?;
        row("seconds", self.took.as_secs())?;
        row("distinct requests", self.calm.0 as u64)?;
        row("images of the calm run", self.calm.1 as u64)?;
        writeln!(f, "jobs")?;
        rows(f, &self.jobs)?;
        writeln!(f, "images")?;
        rows(f, &self.images)?;
        let per_second = self.compared() as f64 / self.took.as_secs_f64().max(f64::EPSILON);
        writeln!(f, "  {:<WIDTH$}{per_second:>8.1}", "compared a second")?;
        writeln!(f, "clients")?;
        rows(f, &self.clients)?;
        writeln!(f, "faults")?;
        rows(f, &self.faults)?;
        if !self.errors.is_empty() {
            writeln!(f, "calls of clients that were made again, by code")?;
            rows(f, &self.errors)?;
        }
        writeln!(f, "must be zero")?;
        for (breach, name) in Breach::ALL {
            let count = self.breaches.get(&breach).copied().unwrap_or_default();
            writeln!(f, "  {name:<WIDTH$}{count:>8}")?;
        }
        for reason in &self.reasons {
            writeln!(f, "a job failed: {reason}")?;
        }
        for message in &self.messages {
            writeln!(f, "WRONG: {message}")?;
        }
        Ok(())
    }
}

fn rows(f: &mut fmt::Formatter<'_>, counts: &BTreeMap<impl fmt::Display, u64>) -> fmt::Result {
    for (name, count) in counts {
        writeln!(f, "  {:<WIDTH$}{count:>8}", name.to_string())?;
    }
    Ok(())
}

/// A report that is being written, and the jobs that were accepted.
#[derive(Debug, Default)]
pub(super) struct Ledger(Mutex<Inner>);

#[derive(Debug, Default)]
struct Inner {
    report: Report,
    accepted: HashSet<String>,
}

impl Ledger {
    /// Counts anew: what was done until now was calm.
    pub(super) fn begin(&self) {
        self.0.lock().report = Report::default();
    }

    /// The report so far.
    pub(super) fn report(&self) -> Report {
        self.0.lock().report.clone()
    }

    /// A job was accepted, or an earlier one returned for the same key.
    pub(super) fn accepted(&self, job_id: &str) {
        let mut inner = self.0.lock();
        if inner.accepted.insert(job_id.to_owned()) {
            *inner.report.jobs.entry("accepted").or_default() += 1;
        }
    }

    /// The jobs that were accepted.
    pub(super) fn all_accepted(&self) -> HashSet<String> {
        self.0.lock().accepted.clone()
    }

    /// A job has ended.
    pub(super) fn ended(&self, job: &Job) {
        let report = &mut self.0.lock().report;
        let state = match job.state() {
            JobState::Completed => "completed",
            JobState::Cancelled => "cancelled",
            _ => FAILED,
        };
        *report.jobs.entry(state).or_default() += 1;
        if job.state() == JobState::Failed && report.reasons.len() < REASONS {
            report.reasons.push(format!("{}: {}", job.job_id, job.reason));
        }
        for image in &job.images {
            let status = match image.status() {
                ImageStatus::Released => "released",
                ImageStatus::Withheld => "withheld",
                ImageStatus::Cancelled => "cancelled",
                _ => "failed",
            };
            *report.images.entry(status).or_default() += 1;
            if image.steered {
                *report.images.entry("steered, of those").or_default() += 1;
            }
        }
    }

    /// A client does something out of the ordinary.
    pub(super) fn client(&self, deed: &'static str) {
        *self.0.lock().report.clients.entry(deed).or_default() += 1;
    }

    /// A fault begins.
    pub(super) fn fault(&self, name: &str) {
        *self.0.lock().report.faults.entry(name.to_owned()).or_default() += 1;
    }

    /// A call has failed and is made again.
    pub(super) fn error(&self, code: tonic::Code) {
        *self.0.lock().report.errors.entry(format!("{code:?}")).or_default() += 1;
    }

    /// Something was seen that must not be.
    pub(super) fn breach(&self, breach: Breach, message: String) {
        let report = &mut self.0.lock().report;
        let count = report.breaches.entry(breach).or_default();
        *count += 1;
        eprintln!("soak: {breach:?}: {message}");
        if *count <= MESSAGES {
            report.messages.push(format!("{breach:?}: {message}"));
        }
    }
}
