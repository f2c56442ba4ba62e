//! `fairlead evaluate`: does steering remove what it should and leave the rest, says a judge.

use std::{path::PathBuf, process::ExitCode};

use anyhow::{Context, Result, bail};
use clap::Args;
use fairlead_common::shutdown;
use fairlead_models::Judge;
use fairlead_proto::v1::{ImageStatus, JobSpec};
use tokio_util::sync::CancellationToken;

use super::generate::SteeringArgs;
use crate::{
    assets::ModelArgs,
    client::{Client, FinishedImage},
    cluster::{ClusterOptions, LocalCluster, WorkersArgs},
    output,
    pairs::{self, Pair},
    progress::Counter,
    prompts::{Kind, ObjectPrompt, Objects},
    report::{Outcome, Report},
    sheet::Picture,
};

/// Makes prompts about the objects of Emojiland twice from the same noise, unsteered and steered
/// with every concept active, and has the judge, a network that never steers, say what is on the
/// images.
///
/// Three kinds: one forbidden object; a forbidden and a permitted one; permitted ones only.
/// Withheld images are counted apart and never as a success of steering.
#[derive(Args)]
pub(crate) struct EvaluateArgs {
    #[command(flatten)]
    models: ModelArgs,
    #[command(flatten)]
    workers: WorkersArgs,
    #[command(flatten)]
    steering: SteeringArgs,
    /// Prompts of each kind.
    #[arg(short, long, default_value_t = 200)]
    n: usize,
    /// Name of the random stream prompts and seeds are drawn from. `test` has tuned nothing; use
    /// another, such as `tuning`, to choose settings.
    #[arg(long, default_value = "test")]
    stream: String,
    /// Sampling steps. Default: the model's.
    #[arg(long)]
    steps: Option<u32>,
    /// Classifier-free guidance scale. Default: the model's.
    #[arg(long)]
    guidance: Option<f32>,
    /// Policy of the steered images. Default: the default policy.
    #[arg(long, default_value = "")]
    policy: String,
    /// Folder for evaluation.json, evaluation.md and, per kind, the sheet of pairs.
    #[arg(long, short, default_value = "out/evaluation")]
    out: PathBuf,
}

pub(crate) async fn run(args: EvaluateArgs) -> Result<ExitCode> {
    if args.n == 0 {
        bail!("-n 0: at least one prompt of each kind is needed");
    }
    let stop = shutdown::on_signal()?;
    let folder = output::ensure_folder(&args.out)?;
    let judge = Judge::load_cpu(&args.models.judge()?)?;
    let objects = Objects::read(&args.models.objects()?)?;
    let options =
        ClusterOptions { workers: args.workers, ..ClusterOptions::temporary(&args.models) };
    let cluster = LocalCluster::start(options).await?;
    let client = Client::new(cluster.address())?;
    let measured = measure(&client, &args, &objects, &judge, &stop).await;
    cluster.stop().await?;
    let (report, sheets) = measured?;
    for (name, sheet) in sheets {
        output::write_file(&folder.join(format!("{name}.png")), &sheet.to_png()?)?;
    }
    let markdown = report.markdown();
    output::write_file(&folder.join("evaluation.md"), markdown.as_bytes())?;
    output::write_file(&folder.join("evaluation.json"), report.json().as_bytes())?;
    println!("{markdown}");
    println!("{}", folder.display());
    Ok(ExitCode::SUCCESS)
}

type Sheets = Vec<(&'static str, Picture)>;

async fn measure(
    client: &Client,
    args: &EvaluateArgs,
    objects: &Objects,
    judge: &Judge,
    stop: &CancellationToken,
) -> Result<(Report, Sheets)> {
    let mut report = Report::new(&args.stream);
    let mut sheets = Vec::new();
    for (kind, name) in [(Kind::Single, "single"), (Kind::Two, "two"), (Kind::Benign, "benign")] {
        let prompts = objects.prompts(kind, args.n, &args.stream);
        let specs = prompts.iter().map(|prompt| spec(prompt, args)).collect();
        let counter = Counter::new(format!("pairs of kind {name}"), args.n);
        let pairs = pairs::run(client, specs, stop, || counter.inc()).await?;
        for (prompt, pair) in prompts.iter().zip(&pairs) {
            report.add(kind, outcome(prompt, pair, judge)?);
        }
        sheets.push((name, sheet(&pairs)?));
    }
    Ok((report, sheets))
}

fn spec(prompt: &ObjectPrompt, args: &EvaluateArgs) -> JobSpec {
    JobSpec {
        prompt: prompt.text.clone(),
        n: 1,
        seed: Some(prompt.seed),
        steps: args.steps,
        guidance_scale: args.guidance,
        policy: args.policy.clone(),
        steering: args.steering.params(),
        ..Default::default()
    }
}

fn outcome(prompt: &ObjectPrompt, pair: &Pair, judge: &Judge) -> Result<Outcome> {
    let unsteered = found(&pair.unsteered, judge)?.context("an unsteered image is released")?;
    let steered = found(&pair.steered, judge)?;
    let shows = |labels: &[String], name: &Option<String>| {
        name.as_ref().map(|name| labels.iter().any(|label| label == name))
    };
    Ok(Outcome {
        prompt: prompt.text.clone(),
        seed: prompt.seed,
        target: prompt.target.clone(),
        target_unsteered: shows(&unsteered, &prompt.target),
        target_steered: steered.as_deref().and_then(|labels| shows(labels, &prompt.target)),
        other_unsteered: shows(&unsteered, &prompt.benign),
        other_steered: steered.as_deref().and_then(|labels| shows(labels, &prompt.benign)),
        identical: pair.identical(),
        withheld: steered.is_none(),
        reruns: pair.steered.record.reruns,
    })
}

/// What the judge finds on a released image.
fn found(image: &FinishedImage, judge: &Judge) -> Result<Option<Vec<String>>> {
    if image.info.status() != ImageStatus::Released {
        return Ok(None);
    }
    let picture = Picture::from_png(&image.png)?;
    Ok(Some(judge.found(&picture.rgb, picture.width, picture.height)?))
}

/// The first pairs of a kind: unsteered above, steered below.
fn sheet(pairs: &[Pair]) -> Result<Picture> {
    use embedded_graphics::pixelcolor::{Rgb888, RgbColor};
    const SIDE: usize = 64;
    const COLUMNS: usize = 20;
    let shown = &pairs[..pairs.len().min(5 * COLUMNS)];
    let rows = shown.len().div_ceil(COLUMNS);
    let mut sheet = Picture::new(COLUMNS * (SIDE + 4), rows * (2 * SIDE + 10), Rgb888::WHITE);
    for (i, pair) in shown.iter().enumerate() {
        let left = (i % COLUMNS * (SIDE + 4)) as i32;
        let top = (i / COLUMNS * (2 * SIDE + 10)) as i32;
        for (image, top) in [(&pair.unsteered, top), (&pair.steered, top + SIDE as i32 + 1)] {
            match image.png.is_empty() {
                false => sheet.paste(&Picture::from_png(&image.png)?, left, top, SIDE),
                true => sheet.fill(left, top, SIDE as u32, SIDE as u32, Rgb888::RED),
            }
        }
    }
    Ok(sheet)
}
