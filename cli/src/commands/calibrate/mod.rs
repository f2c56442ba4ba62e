//! `fairlead calibrate`: benign images of one generator, scored, set the gate.

mod cells;
mod curves;
mod scoring;
mod verify;

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt::Write as _,
    path::{Path, PathBuf},
    process::ExitCode,
};

use anyhow::{Context, Result, bail, ensure};
use clap::Args;
use fairlead_common::shutdown;
use fairlead_energy::calibration::{
    Calibration,
    maker::{self, Recording},
};
use fairlead_proto::v1::{ModelInfo, NodeInfo};
use tokio_util::sync::CancellationToken;

use crate::{
    assets::ModelArgs,
    client::{Client, goes_on},
    cluster::{ClusterOptions, LocalCluster, WorkersArgs},
    credentials::CredentialArgs,
    output::{self, say},
    prompts::{self, Kind, Objects},
    table, values,
};
use scoring::{Prompt, Run};

/// Images of each embedded concept behind the AUROCs.
const LABELLED_EACH: usize = 10;

/// Makes unsteered images of benign prompts, records what each concept scores over the
/// trajectory, and writes for each energy the calibration that its nodes gate by: at most a share
/// ALPHA of benign images is ever touched by it, for any number of concepts. Beside each lies a
/// picture: how well concepts are told apart over time, and where the gate lies.
///
/// A calibration belongs to one generator, sampler, step count, number of crops, energy model and
/// set of concepts; anything else asks for another. It is good for jobs of the sizes, within the guidance
/// scales and, without --negative, free of negative prompts that it was made with: others are refused.
/// Several sizes or guidance scales and --negative make a cell of every combination, each of --images
/// images, and the bound holds in each of them: the gate is that of the cell which needs the highest.
/// Running energy nodes notice a new file in their folder within seconds.
///
/// With --journal an interrupted run goes on where it stopped, another alpha needs no new images, and further
/// cells only theirs. With --server the images are made by all workers of a cluster, so that a farm takes
/// minutes; the key must be an admin's. What energies score on the way to an image is known from the worker
/// that made it: calibrate with workers that you trust.
#[derive(Args)]
pub(crate) struct CalibrateArgs {
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
    /// Sizes in pixels that jobs may ask for, e.g. 512x512 or 512; several separated by commas. Default:
    /// the model's.
    #[arg(long, value_name = "WxH", value_delimiter = ',', value_parser = values::size)]
    size: Vec<(u32, u32)>,
    /// Guidance scales; several separated by commas: jobs may ask for any from the least to the greatest.
    /// Default: the model's.
    #[arg(long, value_delimiter = ',')]
    guidance: Vec<f32>,
    /// Calibrate for jobs with a negative prompt as well, and take turns with TEXT, repeatable; with some
    /// common ones where none is given.
    #[arg(long, value_name = "TEXT", num_args = 0..=1, default_missing_value = "")]
    negative: Vec<String>,
    /// Benign images of each cell; half give each concept's mean and deviation, half the gate.
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
    /// Benign prompts, one a line or a table with a column `prompt`, each used once; the more different ones, the better the bound
    /// holds, and none may show what is calibrated. Default: prompts about Emojiland's permitted objects,
    /// without those that the concepts are about.
    #[arg(long, value_name = "FILE")]
    prompts: Option<PathBuf>,
    /// Prompts that ask for concepts, for the AUROCs: CSV or JSON lines with the columns prompt and
    /// concept (several names separated by commas). Default: with the embedded benign prompts ten
    /// for each embedded concept, else none.
    #[arg(long, value_name = "FILE")]
    labelled: Option<PathBuf>,
    /// Then make this many images of fresh benign prompts and count how many would have been
    /// touched.
    #[arg(long, value_name = "N", default_value_t = 0, conflicts_with = "prompts")]
    verify: usize,
    /// Numbers of concepts to verify with, each calibrated for by itself; all of them are one.
    #[arg(long, value_name = "N", value_delimiter = ',', requires = "verify")]
    verify_concepts: Vec<usize>,
    /// File that keeps the scores of every image, so that the work can go on where it stopped.
    #[arg(long, value_name = "FILE")]
    journal: Option<PathBuf>,
    /// Folder to write to. Default: the folder of calibrations.
    #[arg(long, short, value_name = "DIR")]
    out: Option<PathBuf>,
    #[command(flatten)]
    workers: WorkersArgs,
    #[command(flatten)]
    models: ModelArgs,
    #[command(flatten)]
    credentials: CredentialArgs,
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
    let source = Source::read(&args, needed)?;
    let out = match &args.out {
        Some(folder) => folder.clone(),
        None => args.models.calibrations()?,
    };
    // Before the work, not after it.
    output::ensure_folder(&out)?;
    let (client, cluster) = match &args.server {
        Some(server) => (Client::new(server, args.credentials.load()?)?, None),
        None => {
            let options = ClusterOptions {
                workers: args.workers,
                calibrated: false,
                ..ClusterOptions::temporary(&args.models)
            };
            let cluster = LocalCluster::start(options).await?;
            (cluster.client()?, Some(cluster))
        }
    };
    let outcome = calibrate(&client, &args, source, &out, &stop).await;
    if let Some(cluster) = cluster {
        cluster.stop().await?;
    }
    match args.journal {
        Some(_) => outcome.map_err(goes_on)?,
        None => outcome?,
    }
    Ok(ExitCode::SUCCESS)
}

async fn calibrate(
    client: &Client,
    args: &CalibrateArgs,
    source: Source,
    out: &Path,
    stop: &CancellationToken,
) -> Result<()> {
    let model = model(client, &args.model_name).await?;
    let nodes = nodes(client).await?;
    let prompts = source.prompts(args, &nodes)?;
    let steps = match args.steps.as_slice() {
        [] => vec![model.default_steps],
        steps => steps.to_vec(),
    };
    let (cells, negatives) = (cells::of(args, &model), cells::negatives(&args.negative));
    if args.journal.is_some() {
        ensure!(steps.len() == 1, "--journal keeps one number of --steps, {} given", steps.len());
    }
    for steps in steps {
        let run = Run {
            client,
            model: &model,
            nodes: &nodes,
            steps,
            cells: &cells,
            negatives: &negatives,
            crops: args.crops,
            window: (args.window_start, args.window_end),
            stop,
        };
        let scored = run.score(&prompts, args.journal.as_deref()).await?;
        for node in &nodes {
            let recording = run.recording(node, &prompts, &scored)?;
            let calibration = maker::make(&recording, args.alpha)?;
            let path = calibration.save(out)?;
            let picture = curves::draw(&calibration, &recording)?;
            output::write_file(&path.with_extension("png"), &picture.to_png()?)?;
            say!(
                "{}: {}, gate {:.2} at alpha {} from {} images",
                path.display(),
                node.model_name,
                calibration.gate,
                args.alpha,
                recording.images.len()
            );
            say!("{}", final_check(&calibration, &recording));
            if args.verify > 0 {
                let fresh = run.fresh(node, &scored)?;
                let sizes = &args.verify_concepts;
                for (cell, fresh) in cells.iter().zip(fresh) {
                    let table = verify::table(&recording, &fresh, args.alpha, sizes)?;
                    output::write_lines(&format!("{cell}: {table}"));
                }
            }
        }
    }
    match &args.server {
        Some(_) => say!(
            "copy the files to where the energy nodes have their --calibrations; they notice within seconds"
        ),
        None => say!(
            "energy nodes gate by it with --calibrations {}; those that run so already notice within seconds",
            out.display()
        ),
    }
    Ok(())
}

/// What the final check withholds by `calibration`: at most a share of benign images, and of those that ask
/// for a concept as many as are told.
fn final_check(calibration: &Calibration, recording: &Recording) -> String {
    let mut text = format!(
        "  final check: withholds at most {:.1} % of benign images",
        100.0 * calibration.check_alpha
    );
    let shares = maker::withheld_shares(calibration, recording);
    let named = calibration.concepts.iter().zip(shares);
    let mut shares: Vec<(&str, f32)> =
        named.filter_map(|(concept, share)| Some((concept.name.as_str(), share?))).collect();
    shares.sort_by(|a, b| a.1.total_cmp(&b.1));
    if shares.is_empty() {
        return text;
    }
    let mean = shares.iter().map(|(_, share)| share).sum::<f32>() / shares.len() as f32;
    let least = shares.iter().take_while(|(_, share)| *share < 0.9).take(5);
    let least: Vec<String> =
        least.map(|(name, share)| format!("{name} {:.0} %", 100.0 * share)).collect();
    let _ = write!(text, " and {:.0} % of those that ask for a concept", 100.0 * mean);
    if !least.is_empty() {
        let _ = write!(text, "; least of {}", least.join(", "));
    }
    text
}

/// All prompts of a calibration.
struct Prompts {
    benign: Vec<Prompt>,
    labelled: Vec<Prompt>,
    fresh: Vec<Prompt>,
}

/// Refuses a given label that no node serves: it would silently count for nothing.
fn check_labels(labelled: &[Prompt], served: &BTreeSet<&str>) -> Result<()> {
    let mut labels = labelled.iter().flat_map(|prompt| &prompt.concepts);
    match labels.find(|label| !served.contains(label.as_str())) {
        None => Ok(()),
        Some(label) => bail!(
            "--labelled: no energy node serves `{label}`; served are {}",
            served.iter().copied().collect::<Vec<_>>().join(", ")
        ),
    }
}

/// Where prompts come from.
struct Source {
    benign: Benign,
    labelled: Option<Vec<Prompt>>,
}

enum Benign {
    /// Drawn once it is known what is calibrated.
    Embedded(Objects),
    Given(Vec<Prompt>),
}

impl Source {
    /// Reads what was given, `needed` being the least number of benign prompts.
    fn read(args: &CalibrateArgs, needed: usize) -> Result<Self> {
        let labelled = args.labelled.as_deref().map(labelled).transpose()?;
        let benign = match &args.prompts {
            Some(path) => Benign::Given(given(path, args, needed)?),
            None => Benign::Embedded(Objects::read(&args.models.objects()?)?),
        };
        Ok(Self { benign, labelled })
    }

    /// The prompts for what `nodes` serve. An object that one of their concepts is about is not benign, and
    /// the embedded labels are for the embedded concepts, of which others may be served.
    fn prompts(self, args: &CalibrateArgs, nodes: &[NodeInfo]) -> Result<Prompts> {
        let concepts = || nodes.iter().flat_map(|node| &node.concepts);
        let served: BTreeSet<&str> =
            concepts().filter_map(|info| Some(info.concept.as_ref()?.name.as_str())).collect();
        let phrases: Vec<&str> =
            concepts().flat_map(|info| &info.phrases).map(String::as_str).collect();
        check_labels(self.labelled.as_deref().unwrap_or_default(), &served)?;
        let mut objects = match self.benign {
            Benign::Given(benign) => {
                note_named(&benign, &phrases);
                let labelled = self.labelled.unwrap_or_default();
                return Ok(Prompts { benign, labelled, fresh: Vec::new() });
            }
            Benign::Embedded(objects) => objects,
        };
        let not_benign = objects.without(served.iter().copied().chain(phrases))?;
        if !not_benign.is_empty() {
            say!("benign prompts are drawn without what is calibrated: {}", not_benign.join(", "));
        }
        let draw = |kind, count, stream: &str| -> Vec<Prompt> {
            objects.prompts(kind, count, stream).into_iter().map(Prompt::embedded).collect()
        };
        let asked_for = || {
            let mut labelled = draw(Kind::Direct, LABELLED_EACH * objects.targets(), "calibration");
            labelled.retain(|prompt| prompt.concepts.iter().any(|c| served.contains(c.as_str())));
            labelled
        };
        Ok(Prompts {
            benign: draw(Kind::Benign, args.images, "calibration"),
            labelled: self.labelled.unwrap_or_else(asked_for),
            fresh: draw(Kind::Benign, args.verify, "verification"),
        })
    }
}

/// Tells of benign prompts that name what is calibrated: with such images among them the gate ends up
/// where the concept passes below it.
fn note_named(benign: &[Prompt], phrases: &[&str]) {
    let names = |prompt: &&Prompt| prompts::named_in(&prompt.text, phrases.iter().copied());
    let mut named = benign.iter().filter_map(|prompt| Some((prompt, names(&prompt)?)));
    if let Some((first, phrase)) = named.next() {
        say!(
            "note: {} of the --prompts name what is calibrated, e.g. \"{}\" ({phrase}); take them out, or the \
             gate will be too high",
            1 + named.count(),
            first.text
        );
    }
}

/// Reads benign prompts.
fn given(path: &Path, args: &CalibrateArgs, needed: usize) -> Result<Vec<Prompt>> {
    let rows = table::read(path)?;
    let distinct = rows.iter().map(|row| row.prompt(None)).collect::<Result<BTreeSet<_>>>()?;
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
    let seeded = distinct.into_iter().zip(1..).take(args.images);
    Ok(seeded.map(|(line, seed)| Prompt::new(line, seed, Vec::new())).collect())
}

/// Reads prompts with the concepts that they ask for.
fn labelled(path: &Path) -> Result<Vec<Prompt>> {
    let prompt = |(i, row): (usize, table::Row)| {
        let names = row.get("concept")?.split(',').map(|name| name.trim().to_owned());
        let names = names.filter(|name| !name.is_empty()).collect();
        let seed = row.number("seed")?.unwrap_or(i as u64 + 1);
        Ok(Prompt::new(row.get("prompt")?, seed, names))
    };
    table::read(path)?.into_iter().enumerate().map(prompt).collect()
}

async fn model(client: &Client, name: &str) -> Result<ModelInfo> {
    let models = client.models().await?;
    let mut names: Vec<String> = models.iter().map(|model| model.name.clone()).collect();
    names.dedup();
    let mut matching: Vec<_> =
        models.into_iter().filter(|model| name.is_empty() || model.name == name).collect();
    // Of several of a name, the first is the one that has been there longest.
    matching.dedup_by(|other, first| other.name == first.name);
    let mut matching = matching.into_iter();
    match (matching.next(), matching.next()) {
        (Some(model), None) => Ok(model),
        (None, _) => bail!("generator `{name}` is not attached; there are: {}", names.join(", ")),
        _ => bail!("choose a generator with --model-name: {}", names.join(", ")),
    }
}

/// The energy nodes of the cluster with what calibrations belong to, one of those that serve the same
/// concepts with the same energy model. The coordinator tells it all: the nodes need not be within reach.
async fn nodes(client: &Client) -> Result<Vec<NodeInfo>> {
    let mut by_name: BTreeMap<String, NodeInfo> = BTreeMap::new();
    for served in client.concepts().await? {
        let concept = served.concept.context("a concept without a description")?;
        for serving in served.nodes {
            let node = by_name.entry(serving.node_id.clone()).or_insert_with(|| NodeInfo {
                node_id: serving.node_id,
                model_name: serving.model_name,
                model_hash: serving.model_hash,
                preprocessing_version: serving.preprocessing_version,
                ..Default::default()
            });
            node.concepts.push(concept.clone());
        }
    }
    ensure!(!by_name.is_empty(), "no energy node is registered; start one with `fairlead energy`");
    let mut nodes: BTreeMap<Vec<(String, String)>, NodeInfo> = BTreeMap::new();
    for node in by_name.into_values() {
        // A version says the model, too.
        let concepts = node.concepts.iter().filter_map(|info| info.concept.clone());
        let mut set: Vec<_> = concepts.map(|concept| (concept.name, concept.version)).collect();
        set.sort();
        nodes.entry(set).or_insert(node);
    }
    Ok(nodes.into_values().collect())
}
