//! `fairlead generate`: prompts in, steered images out.

use std::{
    collections::BTreeSet,
    path::{Path, PathBuf},
    process::ExitCode,
};

use anyhow::{Context, Result, bail};
use clap::{Args, ValueEnum};
use fairlead_common::{record, shutdown};
use fairlead_proto::v1::{
    ConceptScore, ImageStatus, JobSpec, JobState, Priority, SafetyRecord, SteeringMode,
    SteeringParams,
};
use tokio_util::sync::CancellationToken;
use tracing::Instrument;

use crate::{
    assets::ModelArgs,
    client::{self, Client, Finished, Interrupted},
    cluster::{ClusterOptions, LocalArgs, LocalCluster},
    credentials::CredentialArgs,
    output::{self, say},
    preflight,
    progress::JobProgress,
    values::{self, Seed},
    waiting::{self, Heard},
};

/// Exit status when every job ended but some image was withheld.
const WITHHELD: u8 = 3;

/// Makes images from prompts and steers each one away from the policy's concepts while it is
/// being sampled.
///
/// Without --server a whole cluster runs on this machine for the length of the command. Each
/// image is written as NAME.png with its safety record NAME.json beside it; a withheld image
/// leaves its record only. Ctrl-C cancels the job, not just this command.
///
/// Exit status: 0 all images released, 3 some withheld, 1 an error, 130 interrupted.
#[derive(Args)]
pub(crate) struct GenerateArgs {
    /// What to draw; several prompts are several jobs.
    #[arg(required = true, value_name = "PROMPT")]
    prompts: Vec<String>,
    /// Folder for images and records.
    #[arg(long, short, value_name = "DIR", default_value = "out")]
    out: PathBuf,
    /// Coordinator to send the jobs to, e.g. http://127.0.0.1:7100.
    #[arg(long, value_name = "URL", env = "FAIRLEAD_SERVER")]
    server: Option<String>,
    /// Generator by name, where the coordinator has several.
    #[arg(long, value_name = "NAME", requires = "server")]
    model_name: Option<String>,
    #[command(flatten)]
    request: RequestArgs,
    #[command(flatten)]
    steering: SteeringArgs,
    #[command(flatten)]
    local: LocalArgs,
    #[command(flatten)]
    models: ModelArgs,
    #[command(flatten)]
    credentials: CredentialArgs,
}

/// What of a job is the client's to choose.
#[derive(Args, Clone)]
#[command(next_help_heading = "Request")]
pub(crate) struct RequestArgs {
    /// What not to draw.
    #[arg(long, default_value = "")]
    negative: String,
    /// Images a prompt, 1 to 64.
    #[arg(short, long, default_value_t = 1)]
    n: u32,
    /// Width and height in pixels, e.g. 512x512 or 512. Default: the model's.
    #[arg(long, value_name = "WxH", value_parser = values::size)]
    size: Option<(u32, u32)>,
    /// Sampling steps. Default: the model's.
    #[arg(long)]
    steps: Option<u32>,
    /// Classifier-free guidance scale; 0 or 1 switches it off. Default: the model's.
    #[arg(long)]
    guidance: Option<f32>,
    /// Seed of the first image; image i takes SEED + i. Default, or -1: drawn by the coordinator.
    #[arg(long, allow_negative_numbers = true)]
    seed: Option<Seed>,
    /// Policy by name. Default: the coordinator's default policy.
    #[arg(long, default_value = "")]
    pub(crate) policy: String,
    /// A concept to steer away from on top of the policy's; repeatable.
    #[arg(long = "concept", value_name = "NAME")]
    extra_concepts: Vec<String>,
    /// Most images a shard; the images do not depend on it.
    #[arg(long, value_name = "N", default_value_t = 0)]
    max_shard_size: u32,
    /// Which waiting jobs for a generator come first.
    #[arg(long, value_enum, default_value_t = JobPriority::Normal)]
    priority: JobPriority,
}

/// Priorities of a job.
#[derive(Clone, Copy, ValueEnum)]
enum JobPriority {
    High,
    Normal,
    Low,
}

impl From<JobPriority> for Priority {
    fn from(priority: JobPriority) -> Self {
        match priority {
            JobPriority::High => Self::High,
            JobPriority::Normal => Self::Normal,
            JobPriority::Low => Self::Low,
        }
    }
}

/// Steering knobs in place of the policy's: any on a cluster of one's own; beside --server those that the
/// policy lets clients strengthen.
#[derive(Args, Clone)]
#[command(
    next_help_heading = "Steering (beside --server: only what the policy allows, and stronger)"
)]
pub(crate) struct SteeringArgs {
    /// How a correction enters the sampler.
    #[arg(long, value_enum)]
    mode: Option<Mode>,
    /// Strength of one correction, relative to the clean estimate.
    #[arg(long)]
    eta: Option<f32>,
    /// Start of the steering window as a fraction of training time (1 is pure noise).
    #[arg(long)]
    window_start: Option<f32>,
    /// End of the steering window.
    #[arg(long)]
    window_end: Option<f32>,
    /// Corrections a step, 1 to 4.
    #[arg(long)]
    inner_iterations: Option<u32>,
    /// Gaussian over the latent gradient, in latent pixels.
    #[arg(long)]
    smoothing: Option<f32>,
    /// Bound on the sum of corrections.
    #[arg(long)]
    cap: Option<f32>,
    /// Crops the energy node makes of each image, 1 to 8.
    #[arg(long)]
    crops: Option<u32>,
    /// Steps between evaluations while all gates are closed, 1 to 4.
    #[arg(long)]
    probe_period: Option<u32>,
    /// Factor on strength and bound of each rerun of an image that was not steered clear, 1 to 4.
    #[arg(long)]
    rerun_factor: Option<f32>,
}

/// The method's modes B, A and C.
#[derive(Clone, Copy, ValueEnum)]
enum Mode {
    HoldNoise,
    HoldState,
    ShiftState,
}

impl SteeringArgs {
    /// The knobs, or `None` if nothing was given.
    pub(crate) fn params(&self) -> Option<SteeringParams> {
        let mode = match self.mode {
            None => SteeringMode::Unspecified,
            Some(Mode::HoldNoise) => SteeringMode::HoldNoise,
            Some(Mode::HoldState) => SteeringMode::HoldState,
            Some(Mode::ShiftState) => SteeringMode::ShiftState,
        };
        let params = SteeringParams {
            mode: mode.into(),
            eta: self.eta,
            window_start: self.window_start,
            window_end: self.window_end,
            inner_iterations: self.inner_iterations,
            smoothing: self.smoothing,
            cap: self.cap,
            crops: self.crops,
            probe_period: self.probe_period,
            rerun_factor: self.rerun_factor,
        };
        (params != SteeringParams::default()).then_some(params)
    }
}

impl RequestArgs {
    /// The job for `prompt`.
    pub(crate) fn spec(&self, prompt: &str) -> JobSpec {
        JobSpec {
            prompt: prompt.to_owned(),
            negative_prompt: self.negative.clone(),
            n: self.n,
            width: self.size.map(|(width, _)| width),
            height: self.size.map(|(_, height)| height),
            steps: self.steps,
            guidance_scale: self.guidance,
            seed: self.seed.and_then(Seed::given),
            policy: self.policy.clone(),
            extra_concepts: self.extra_concepts.clone(),
            max_shard_size: self.max_shard_size,
            priority: Priority::from(self.priority).into(),
            ..Default::default()
        }
    }
}

pub(crate) async fn run(args: GenerateArgs) -> Result<ExitCode> {
    let stop = shutdown::on_signal()?;
    if args.server.is_some() {
        let mut local = args.local.given().to_vec();
        local.push(("--calibrations", args.models.calibrations.is_some()));
        args.models.refuse_beside_server(&local)?;
    }
    let folder = output::ensure_folder(&args.out)?;
    let (client, cluster) = match &args.server {
        Some(server) => (Client::new(server, args.credentials.load()?)?, None),
        None => {
            // Policies that withhold nothing are not added to those of an operator.
            let measuring = args.local.policies.is_none();
            let knobs = args.steering.params();
            let options = ClusterOptions { measuring, knobs, ..args.local.cluster(&args.models) };
            preflight::check(&options, &args.request.spec(""))?;
            let start = LocalCluster::start(options);
            let cluster = tokio::select! {
                cluster = start => cluster?,
                () = stop.cancelled() => return Err(Interrupted.into()),
            };
            (cluster.client()?, Some(cluster))
        }
    };
    let generate = generate_all(&client, &args, &folder, &stop);
    let outcome = generate.instrument(tracing::info_span!("generate")).await;
    if let Some(cluster) = cluster {
        cluster.stop().await?;
    }
    outcome
}

async fn generate_all(
    client: &Client,
    args: &GenerateArgs,
    folder: &Path,
    stop: &CancellationToken,
) -> Result<ExitCode> {
    let mut withheld = 0;
    let mut names = BTreeSet::new();
    for prompt in &args.prompts {
        let mut spec = args.request.spec(prompt);
        // A cluster of one's own has the knobs in its policies.
        spec.steering = args.server.as_ref().and_then(|_| args.steering.params());
        spec.model = args.model_name.clone().unwrap_or_default();
        let job = client.submit(spec).await?;
        let (progress, heard) = (JobProgress::new(job.images.len()), Heard::default());
        let follow = client.follow(&job, stop, |step| {
            heard.step();
            progress.step(step);
        });
        let ended = tokio::select! {
            ended = follow => ended,
            never = waiting::tell_why(client, &job, &heard, &progress) => match never {},
        };
        progress.finish();
        let job = ended?;
        match job.state() {
            JobState::Completed => {}
            JobState::Cancelled if stop.is_cancelled() => {
                return Err(Interrupted)
                    .with_context(|| format!("job {} was cancelled", job.job_id));
            }
            JobState::Cancelled => bail!("job {} was cancelled", job.job_id),
            _ => bail!("job {} failed: {}", job.job_id, job.reason),
        }
        withheld += report(&client.collect(job).await?, prompt, folder, &mut names)?;
    }
    Ok(if withheld > 0 { ExitCode::from(WITHHELD) } else { ExitCode::SUCCESS })
}

/// Saves and prints what a job left; returns how many images were withheld. `names` are those taken
/// by earlier jobs of this command.
fn report(
    finished: &Finished,
    prompt: &str,
    folder: &Path,
    names: &mut BTreeSet<String>,
) -> Result<usize> {
    for notice in &finished.job.notices {
        say!("note: {notice}");
    }
    let mut withheld = 0;
    for image in &finished.images {
        let name = output::unused(&format!("{}-{}", output::slug(prompt), image.info.seed), names);
        client::save(image, folder, &name)?;
        let top = output::top_score(&image.info.final_scores).map(closest).unwrap_or_default();
        let steered = steered(&image.record);
        match image.info.status() {
            ImageStatus::Released => {
                let picture = folder.join(format!("{name}.png"));
                say!("{}  {steered}  {top}", picture.display());
            }
            ImageStatus::Withheld => {
                withheld += 1;
                say!("withheld: image {} of \"{prompt}\": {top}", image.info.index);
            }
            other => {
                return Err(anyhow::anyhow!(
                    "image {} is {}",
                    image.info.index,
                    other.as_str_name()
                ))
                .context("a completed job has released or withheld images only");
            }
        }
    }
    Ok(withheld)
}

/// How near the image came to a gate; only what was found where the tenant may not see scores.
fn closest(ConceptScore { concept, z, gate, open, .. }: &ConceptScore) -> String {
    match *open && *z == 0.0 && *gate == 0.0 {
        true => format!("found: {concept}"),
        false => format!("closest now: {concept} z {z:.1}, gate {gate:.1}"),
    }
}

/// "steered away from kitchen-knife", or "untouched".
fn steered(record: &SafetyRecord) -> String {
    let report = record::reported(record);
    if !report.steered {
        return "untouched".to_owned();
    }
    let probes = record::steered_away(&report.trajectory);
    let concepts: BTreeSet<&str> = probes.iter().map(|probe| probe.concept.as_str()).collect();
    format!("steered away from {}", concepts.into_iter().collect::<Vec<_>>().join(", "))
}

#[cfg(test)]
mod tests {
    use super::*;
    use fairlead_proto::v1::{StepRecord, WorkerReport};

    #[test]
    fn who_was_steered_is_told_from_what() {
        let score = |concept: &str, open| ConceptScore {
            concept: concept.into(),
            open,
            ..Default::default()
        };
        let step = |correction, scores| StepRecord { correction, scores, ..Default::default() };
        let mut report = WorkerReport {
            steered: true,
            trajectory: vec![
                step(0.2, vec![score("bomb", false), score("axe", true)]),
                step(0.1, vec![score("bomb", true), score("axe", true), score("pill", false)]),
                // Open, but nothing was left to correct with.
                step(0.0, vec![score("pill", true)]),
            ],
            ..Default::default()
        };
        let record = |report: &WorkerReport| SafetyRecord {
            reported_by_worker: Some(report.clone()),
            ..Default::default()
        };
        assert_eq!(steered(&record(&report)), "steered away from axe, bomb");
        report.steered = false;
        assert_eq!(steered(&record(&report)), "untouched");
    }

    #[test]
    fn without_scores_it_is_told_what_was_found() {
        let found = ConceptScore { concept: "axe".into(), open: true, ..Default::default() };
        assert_eq!(closest(&found), "found: axe");
        let scored = ConceptScore { z: 4.25, gate: 3.0, ..found };
        assert_eq!(closest(&scored), "closest now: axe z 4.2, gate 3.0");
    }
}
