//! A soak run: random faults on a real cluster while it makes images. First every distinct request is made
//! in calm; then the same requests repeat under faults, and every job must end, every image be the one of
//! the calm run, and every release be vouched for. The same seed gives the same faults and requests in the
//! same order; when exactly they meet differs from run to run.
//!
//! Redis is never flushed here: a flush takes jobs away, and with them what was promised
//! (`tests/sharing.rs` shows what is left then).

mod client;
mod cluster;
mod faults;
mod judge;
mod ledger;
mod requests;

use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use anyhow::{Context, Result, bail, ensure};
use fairlead_proto::v1::{JobSpec, JobState};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use tokio::{
    task::JoinSet,
    time::{Instant, interval},
};
use tokio_util::sync::CancellationToken;

pub use ledger::{Breach, Report};
use {client::Client, cluster::Cluster, judge::Judge, ledger::Ledger};

/// Jobs under way at any time.
const AT_ONCE: usize = 8;
/// Most distinct requests.
const DISTINCT: usize = 24;
/// How often a job is submitted twice at once, and cancelled.
const TWICE: f64 = 0.25;
const CANCELLED: f64 = 0.08;
/// Longest time before a cancellation, in milliseconds.
const REGRET: u64 = 2_000;
/// Between two lines about how far it is.
const TOLD: Duration = Duration::from_secs(10);

/// How much is to be done.
#[derive(Debug, Clone, Copy)]
pub struct Options {
    /// Images, of jobs under faults, to compare with those of the calm run.
    pub images: u64,
    /// Faults that there must be at least.
    pub faults: u64,
    /// Seed of faults and requests.
    pub seed: u64,
}

/// What all jobs share.
struct Soak {
    options: Options,
    requests: Vec<JobSpec>,
    /// Two, so that a key can be submitted to two coordinators at once.
    clients: [Client; 2],
    judge: Judge,
    ledger: Arc<Ledger>,
    next: AtomicU64,
}

/// Runs it to its end. An error is a cluster that could not be set up; what went wrong later is in the
/// report.
pub async fn run(options: Options) -> Result<Report> {
    let Options { images, seed, .. } = options;
    eprintln!("soak: seed {seed}; again: make soak N={images} SEED={seed}");
    let cluster = Arc::new(Cluster::start().await?);
    let ledger = Arc::new(Ledger::default());
    let soak = Arc::new(Soak::calm(options, &cluster, &ledger).await?);
    let begun = Instant::now();
    let stop = CancellationToken::new();
    let faults = faults::run(Arc::clone(&cluster), Arc::clone(&ledger), seed, stop.clone());
    let faults = tokio::spawn(faults);
    let worked = soak.work(begun).await;
    stop.cancel();
    faults.await.context("the faults")?;
    worked?;
    let took = begun.elapsed();
    soak.settle(&cluster).await?;
    let report = Report { seed, wanted: images, took, calm: soak.size(), ..ledger.report() };
    drop(soak);
    if !report.is_clean() {
        let cluster = Arc::into_inner(cluster).context("nobody else has the cluster now")?;
        eprintln!("soak: data and logs are in {}", cluster.keep().display());
    }
    Ok(report)
}

impl Soak {
    /// Makes every request once, undisturbed.
    async fn calm(options: Options, cluster: &Cluster, ledger: &Arc<Ledger>) -> Result<Self> {
        let distinct = (options.images / 8).clamp(6, DISTINCT as u64) as usize;
        let requests = requests::distinct(distinct)?;
        let client = || Client::new(&cluster.addresses(), Arc::clone(ledger));
        let clients = [client()?, client()?];
        let mut judge = Judge::new(client()?, Arc::clone(ledger), &cluster.data())?;
        let mut steered = 0;
        // All at once, so that the cluster is busy.
        let mut jobs = Vec::new();
        for (number, spec) in requests.iter().enumerate() {
            jobs.push(clients[0].submit(spec, &format!("calm-{number}")).await?);
        }
        for job in &jobs {
            let job = clients[0].follow(job).await.context("a calm job was lost")?;
            ensure!(job.state() == JobState::Completed, "calm, but {}", job.reason);
            steered += job.images.iter().filter(|image| image.steered).count();
            judge.remember(&job).await?;
        }
        let images: u32 = requests.iter().map(|spec| spec.n).sum();
        eprintln!("soak: calm run of {distinct} requests: {images} images, {steered} steered");
        ensure!(steered > 0, "no request hits a concept: this would show little");
        let next = AtomicU64::new(0);
        ledger.begin();
        Ok(Self { options, requests, clients, judge, ledger: Arc::clone(ledger), next })
    }

    /// Distinct requests and their images.
    fn size(&self) -> (usize, usize) {
        (self.requests.len(), self.requests.iter().map(|spec| spec.n as usize).sum())
    }

    /// Keeps jobs under way until there are enough images and faults.
    async fn work(self: &Arc<Self>, begun: Instant) -> Result<()> {
        let mut jobs = JoinSet::new();
        for _ in 0..AT_ONCE {
            let soak = Arc::clone(self);
            jobs.spawn(async move {
                while !soak.has_enough() {
                    soak.job(soak.next.fetch_add(1, Ordering::Relaxed)).await?;
                }
                anyhow::Ok(())
            });
        }
        let mut told = interval(TOLD);
        loop {
            tokio::select! {
                ended = jobs.join_next() => match ended {
                    Some(ended) => ended??,
                    None => return Ok(()),
                },
                _ = told.tick() => self.tell(begun),
            }
        }
    }

    fn has_enough(&self) -> bool {
        let report = self.ledger.report();
        // What is lost, or fails, would be waited for again and again.
        let lost = report.breaches.get(&Breach::Lost).is_some_and(|lost| *lost >= AT_ONCE as u64);
        let (failed, jobs) = report.failed_jobs();
        let broken = lost || is_too_many(failed, jobs);
        let enough = report.compared() >= self.options.images;
        broken || enough && report.all_faults() >= self.options.faults
    }

    fn tell(&self, begun: Instant) {
        let report = self.ledger.report();
        let (images, seconds) = (report.compared(), begun.elapsed().as_secs_f64());
        eprintln!(
            "soak: {images} of {} images, {} faults, {seconds:.0} s, {:.1} images/s",
            self.options.images,
            report.all_faults(),
            images as f64 / seconds.max(1.0)
        );
    }

    /// One job from its submission to the verdict about it.
    async fn job(&self, number: u64) -> Result<()> {
        let mut rng = ChaCha8Rng::seed_from_u64(self.options.seed);
        rng.set_stream(number + 1);
        let request = rng.random_range(0..self.requests.len());
        // How a job is split changes no image.
        let max_shard_size = rng.random_range(0..=2);
        let spec = JobSpec { max_shard_size, ..self.requests[request].clone() };
        let key = format!("soak-{}-{number}", self.options.seed);
        let twice = rng.random_bool(TWICE);
        let regret = Duration::from_millis(rng.random_range(0..REGRET));
        let is_cancelled = rng.random_bool(CANCELLED);

        let [one, other] = &self.clients;
        let job = one.submit(&spec, &key);
        let job = if twice {
            self.ledger.client("submitted a key twice at once");
            let (job, again) = tokio::join!(job, other.submit(&spec, &key));
            let (job, again) = (job?, again?);
            if job.job_id != again.job_id {
                let message = format!("key {key}: jobs {} and {}", job.job_id, again.job_id);
                self.ledger.breach(Breach::Duplicated, message);
            }
            job
        } else {
            job.await?
        };
        let cancelled = async {
            if is_cancelled {
                tokio::time::sleep(regret).await;
                self.ledger.client("cancelled a job");
                other.cancel(&job.job_id).await?;
            }
            anyhow::Ok(())
        };
        let (ended, cancelled) = tokio::join!(one.follow(&job), cancelled);
        cancelled.with_context(|| format!("cancelling job {}", job.job_id))?;
        let Some(ended) = ended else { return Ok(()) };
        if ended.state() == JobState::Cancelled && !is_cancelled {
            bail!("job {} was cancelled by nobody", job.job_id);
        }
        self.judge.judge(request, &ended).await;
        Ok(())
    }

    /// After the last fault: there are the jobs that were accepted and no others, all services stop as they
    /// should, and no shard has two results.
    async fn settle(&self, cluster: &Cluster) -> Result<()> {
        let there = self.clients[0].jobs().await.context("listing the jobs")?;
        let accepted = self.ledger.all_accepted();
        for job in accepted.difference(&there) {
            self.ledger.breach(Breach::Lost, format!("job {job} is not there"));
        }
        for job in there.difference(&accepted) {
            self.ledger.breach(Breach::Duplicated, format!("job {job} was accepted for nobody"));
        }
        for service in cluster.workers.iter().chain(&cluster.nodes).chain(&cluster.coordinators) {
            if let Err(error) = service.drain().await {
                self.ledger.breach(Breach::Ended, format!("{error:#}"));
            }
        }
        for panic in cluster.panics()? {
            self.ledger.breach(Breach::Ended, panic);
        }
        let (failed, jobs) = self.ledger.report().failed_jobs();
        if is_too_many(failed, jobs) {
            // What may be in between: a shard whose every delivery met a fault.
            self.ledger.breach(Breach::Lost, format!("{failed} of {jobs} jobs failed"));
        }
        for (shard, tokens) in cluster.results()?.iter().filter(|(_, tokens)| tokens.len() > 1) {
            let message = format!("shard {shard} was done by the deliveries {tokens:?}");
            self.ledger.breach(Breach::Duplicated, message);
        }
        Ok(())
    }
}

/// Whether more jobs failed than faults can be blamed for: one in twenty, and some at first.
fn is_too_many(failed: u64, jobs: u64) -> bool {
    failed > AT_ONCE as u64 && failed * 20 > jobs
}
