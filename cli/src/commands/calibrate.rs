//! `fairlead calibrate`: benign images of one generator, scored, set the gate.

use std::{
    collections::{BTreeMap, BTreeSet},
    path::{Path, PathBuf},
    process::ExitCode,
};

use anyhow::{Context, Result, bail, ensure};
use clap::Args;
use fairlead_common::{grpc, probe::Probe, shutdown};
use fairlead_energy::calibration::maker::{self, RecordedImage, RecordedStep, Recording};
use fairlead_proto::v1::{
    ConceptRef, ConceptScore, DescribeRequest, JobSpec, ModelInfo, NodeInfo, SafetyRecord,
    SteeringParams, energy_service_client::EnergyServiceClient,
};
use futures::{StreamExt, TryStreamExt, stream};
use tokio_util::sync::CancellationToken;

use crate::{
    assets::ModelArgs,
    client::Client,
    cluster::{ClusterOptions, LocalCluster, WorkersArgs},
    output,
    pairs::JOBS_IN_FLIGHT,
    progress::Counter,
    prompts::{Kind, Objects},
};

/// Policy that records scores at every step of the window and corrects nothing; it ships in
/// `assets/policies-measuring.toml`.
const CALIBRATION: &str = "calibration";

/// Makes unsteered images of benign prompts, records what each concept scores over the
/// trajectory, and writes for each energy the calibration that its nodes gate by: at most a share
/// ALPHA of benign images is ever touched by it, for any number of concepts.
///
/// A calibration belongs to one generator, sampler, step count, number of crops, energy model and
/// set of concepts; anything else asks for another. Running energy nodes notice a new file in their folder within seconds.
#[derive(Args)]
pub(crate) struct CalibrateArgs {
    #[command(flatten)]
    models: ModelArgs,
    #[command(flatten)]
    workers: WorkersArgs,
    /// Calibrate on this coordinator's cluster instead of a local one. It needs a policy named
    /// `calibration`, as in assets/policies-measuring.toml.
    #[arg(long, env = "FAIRLEAD_SERVER")]
    server: Option<String>,
    /// Generator by name, where the coordinator has several.
    #[arg(long, value_name = "NAME", default_value = "")]
    model_name: String,
    /// Sampling steps; several separated by commas. Default: the model's.
    #[arg(long, value_delimiter = ',')]
    steps: Vec<u32>,
    /// Benign images; half give each concept's mean and deviation, half the gate.
    #[arg(long, default_value_t = 1000)]
    images: usize,
    /// Largest share of benign images to be touched.
    #[arg(long, default_value_t = 0.01)]
    alpha: f32,
    /// Crops per image, 1 to 8; the same as in the policies that will steer.
    #[arg(long, default_value_t = 4)]
    crops: u32,
    /// Start and end of the steering window as fractions of training time.
    #[arg(long, default_value_t = 1.0)]
    window_start: f32,
    /// End of the window; policies may steer in a part of it.
    #[arg(long, default_value_t = 0.02)]
    window_end: f32,
    /// Benign prompts, one a line and each used once; the more different ones, the better the bound
    /// holds. Default: prompts about Emojiland's permitted objects.
    #[arg(long, value_name = "FILE")]
    prompts: Option<PathBuf>,
    /// Folder to write to. Default: the folder of calibrations.
    #[arg(long, short, value_name = "DIR")]
    out: Option<PathBuf>,
}

pub(crate) async fn run(args: CalibrateArgs) -> Result<ExitCode> {
    let stop = shutdown::on_signal()?;
    let needed = maker::minimum_images(args.alpha).context("--alpha")?;
    if args.server.is_some() {
        args.models.refuse_beside_server(&[])?;
    }
    ensure!(
        args.images >= needed,
        "--images {}: alpha {} needs at least {needed} images",
        args.images,
        args.alpha
    );
    let prompts = prompts(&args, needed)?;
    let out = match &args.out {
        Some(folder) => folder.clone(),
        None => args.models.calibrations()?,
    };
    // Before the work, not after it.
    output::ensure_folder(&out)?;
    let (client, cluster) = match &args.server {
        Some(server) => (Client::new(server)?, None),
        None => {
            let options =
                ClusterOptions { workers: args.workers, ..ClusterOptions::temporary(&args.models) };
            let cluster = LocalCluster::start(options).await?;
            (Client::new(cluster.address())?, Some(cluster))
        }
    };
    let outcome = calibrate(&client, &args, &prompts, &out, &stop).await;
    if let Some(cluster) = cluster {
        cluster.stop().await?;
    }
    outcome.map(|()| ExitCode::SUCCESS)
}

async fn calibrate(
    client: &Client,
    args: &CalibrateArgs,
    prompts: &[(String, u64)],
    out: &Path,
    stop: &CancellationToken,
) -> Result<()> {
    let model = model(client, &args.model_name).await?;
    let nodes = nodes(client).await?;
    let steps = match args.steps.as_slice() {
        [] => vec![model.default_steps],
        steps => steps.to_vec(),
    };
    for steps in steps {
        let records = records(client, args, &model, steps, prompts, stop).await?;
        for node in &nodes {
            let recording = recording(args, &model, node, steps, &records)?;
            let calibration = maker::make(&recording, args.alpha)?;
            let path = calibration.save(out)?;
            println!(
                "{}: {}, gate {:.2} at alpha {} from {} images",
                path.display(),
                node.model_name,
                calibration.gate,
                args.alpha,
                records.len()
            );
        }
    }
    Ok(())
}

/// The prompts with the seed of each image, of which `needed` is the least number.
fn prompts(args: &CalibrateArgs, needed: usize) -> Result<Vec<(String, u64)>> {
    let Some(path) = &args.prompts else {
        let objects = Objects::read(&args.models.objects()?)?;
        let prompts = objects.prompts(Kind::Benign, args.images, "calibration");
        return Ok(prompts.into_iter().map(|prompt| (prompt.text, prompt.seed)).collect());
    };
    let text = std::fs::read_to_string(path)
        .with_context(|| format!("cannot read the prompts file {}", path.display()))?;
    let lines: Vec<&str> = text.lines().map(str::trim).filter(|line| !line.is_empty()).collect();
    let distinct: BTreeSet<&str> = lines.iter().copied().collect();
    // A prompt in both halves would be measured against itself, and the bound would not hold.
    ensure!(
        distinct.len() >= args.images,
        "{}: {} different prompts for --images {}; give at least as many, one a line, or ask for \
         fewer images (alpha {} needs {needed})",
        path.display(),
        distinct.len(),
        args.images,
        args.alpha
    );
    let seeded = distinct.into_iter().zip(1..);
    Ok(seeded.take(args.images).map(|(line, seed)| (line.to_owned(), seed)).collect())
}

async fn model(client: &Client, name: &str) -> Result<ModelInfo> {
    let models = client.models().await?;
    let names: Vec<String> = models.iter().map(|model| model.name.clone()).collect();
    let mut matching = models.into_iter().filter(|model| name.is_empty() || model.name == name);
    match (matching.next(), matching.next()) {
        (Some(model), None) => Ok(model),
        (None, _) => bail!("generator `{name}` is not attached; there are: {}", names.join(", ")),
        _ => bail!("choose a generator with --model-name: {}", names.join(", ")),
    }
}

/// The energy nodes of the cluster as they describe themselves, one of those that serve the same
/// concepts with the same energy model.
async fn nodes(client: &Client) -> Result<Vec<NodeInfo>> {
    let concepts = client.concepts().await?;
    let addresses: BTreeSet<&String> =
        concepts.iter().flat_map(|served| &served.nodes).map(|node| &node.address).collect();
    ensure!(
        !addresses.is_empty(),
        "no energy node is registered; start one with `fairlead energy`"
    );
    let mut nodes: BTreeMap<Vec<(String, String)>, NodeInfo> = BTreeMap::new();
    for address in addresses {
        let channel = grpc::channel(address, grpc::REQUEST_TIMEOUT)?;
        let reply = EnergyServiceClient::new(channel).describe(DescribeRequest {}).await;
        let reply = reply.with_context(|| format!("the energy node at {address}"))?;
        let node = reply.into_inner().node.context("an answer without a description")?;
        // A version says the model, too.
        let concepts = node.concepts.iter().filter_map(|info| info.concept.clone());
        let mut set: Vec<_> = concepts.map(|concept| (concept.name, concept.version)).collect();
        set.sort();
        nodes.entry(set).or_insert(node);
    }
    Ok(nodes.into_values().collect())
}

async fn records(
    client: &Client,
    args: &CalibrateArgs,
    model: &ModelInfo,
    steps: u32,
    prompts: &[(String, u64)],
    stop: &CancellationToken,
) -> Result<Vec<SafetyRecord>> {
    let counter = Counter::new(format!("benign images of {steps} steps"), prompts.len());
    let jobs = prompts.iter().map(|(prompt, seed)| {
        let spec = JobSpec {
            model: model.name.clone(),
            prompt: prompt.clone(),
            n: 1,
            seed: Some(*seed),
            steps: Some(steps),
            policy: CALIBRATION.to_owned(),
            steering: Some(SteeringParams {
                crops: Some(args.crops),
                window_start: Some(args.window_start),
                window_end: Some(args.window_end),
                ..Default::default()
            }),
            ..Default::default()
        };
        let counter = &counter;
        async move {
            let mut finished = client.complete(spec, stop, |_| {}).await?;
            counter.inc();
            anyhow::Ok(finished.images.remove(0).record)
        }
    });
    stream::iter(jobs).buffered(JOBS_IN_FLIGHT).try_collect().await
}

fn recording(
    args: &CalibrateArgs,
    model: &ModelInfo,
    node: &NodeInfo,
    steps: u32,
    records: &[SafetyRecord],
) -> Result<Recording> {
    let refs: Vec<ConceptRef> =
        node.concepts.iter().filter_map(|info| info.concept.clone()).collect();
    let images = records.iter().map(|record| recorded(record, &refs)).collect::<Result<_>>()?;
    Ok(Recording {
        generator: model.hash.clone(),
        generator_name: model.name.clone(),
        sampler: model.sampler.clone(),
        steps,
        energy_model: node.model_hash.clone(),
        preprocessing_version: node.preprocessing_version,
        crops: args.crops,
        concepts: refs.into_iter().map(|concept| (concept.name, concept.version)).collect(),
        window: (args.window_start, args.window_end),
        images,
    })
}

/// A record's raw scores in the order of `concepts`.
fn recorded(record: &SafetyRecord, concepts: &[ConceptRef]) -> Result<RecordedImage> {
    let ordered = |scores: &[ConceptScore]| -> Result<Vec<f32>> {
        let score = |concept: &ConceptRef| {
            let probe = Probe::from(concept);
            let found = scores.iter().find(|score| Probe::from(*score) == probe);
            let score = found.with_context(|| format!("a record lacks a score of {probe}"))?;
            Ok(score.score)
        };
        concepts.iter().map(score).collect()
    };
    let steps = record.trajectory.iter().filter(|step| !step.scores.is_empty());
    let steps = steps
        .map(|step| Ok(RecordedStep { time: step.time, scores: ordered(&step.scores)? }))
        .collect::<Result<_>>()?;
    Ok(RecordedImage { steps, finished: ordered(&record.final_scores)? })
}

#[cfg(test)]
mod tests {
    use super::*;
    use fairlead_proto::v1::StepRecord;

    #[test]
    fn scores_are_put_in_the_nodes_order_and_a_gap_is_an_error() {
        let score = |concept: &str, score| ConceptScore {
            concept: concept.into(),
            score,
            ..Default::default()
        };
        let record = SafetyRecord {
            trajectory: vec![
                StepRecord {
                    time: 0.9,
                    scores: vec![score("b", 2.0), score("a", 1.0)],
                    ..Default::default()
                },
                StepRecord { time: 0.5, ..Default::default() },
            ],
            final_scores: vec![score("a", 3.0), score("b", 4.0)],
            ..Default::default()
        };
        let concept = |name: &str| ConceptRef { name: name.into(), ..Default::default() };
        let concepts = ["a", "b"].map(concept);
        let image = recorded(&record, &concepts).expect("all scores are there");
        assert_eq!(image.steps, vec![RecordedStep { time: 0.9, scores: vec![1.0, 2.0] }]);
        assert_eq!(image.finished, vec![3.0, 4.0]);
        let more = [concepts.to_vec(), vec![concept("c")]].concat();
        assert!(recorded(&record, &more).expect_err("c is missing").to_string().contains("c ()"));
    }
}
