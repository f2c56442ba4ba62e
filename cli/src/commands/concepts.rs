//! `fairlead concepts`: what a cluster steers away from and who serves it; more concepts for nodes that
//! run.

use std::{
    collections::BTreeMap,
    path::PathBuf,
    process::ExitCode,
    time::{Duration, UNIX_EPOCH},
};

use anyhow::Result;
use clap::Args;
use fairlead_common::envelope;
use fairlead_energy::ConceptSet;
use fairlead_proto::v1::{CalibrationInfo, ConceptRef, ServedConcept, ServingNode};

use crate::{client::Client, credentials::CredentialArgs, output::say};

/// Lists the concepts that live energy nodes serve: their group and version, which nodes serve them and
/// since when; then the nodes, with the calibrations that their gates come from.
///
/// --add gives concepts to nodes that run, without a restart: new jobs can have them at once. The packs
/// named together are one set with gates of its own; make its calibration before, with `fairlead calibrate
/// --concepts FILE` and the nodes' folder of calibrations as --out. Nodes keep what was added if they have
/// --added-concepts; to take it away, remove its file there and restart them.
///
/// A concept that was served once stays required by policies over all concepts, so that a node that
/// is gone is an error and no gap. --retire ends that.
#[derive(Args)]
pub(crate) struct ConceptsArgs {
    /// Coordinator to ask.
    #[arg(long, default_value = "http://127.0.0.1:7100", env = "FAIRLEAD_SERVER")]
    server: String,
    #[command(flatten)]
    credentials: CredentialArgs,
    /// Have running nodes serve the concepts of this pack, or of the packs in this folder. Repeatable.
    #[arg(long, value_name = "FILE|DIR")]
    add: Vec<PathBuf>,
    /// Nodes that are to serve them. Default: every live one. Repeatable.
    #[arg(long, value_name = "NODE", requires = "add")]
    node: Vec<String>,
    /// Add them to nodes without a calibration, too: jobs whose policy covers them are refused from then on,
    /// unless it sets allow_calibration_fallback.
    #[arg(long, requires = "add")]
    uncalibrated: bool,
    /// Forget this concept, which no node serves any longer.
    #[arg(long, value_name = "CONCEPT", conflicts_with = "add")]
    retire: Option<String>,
}

pub(crate) async fn run(args: ConceptsArgs) -> Result<ExitCode> {
    let client = Client::new(&args.server, args.credentials.load()?)?;
    if let Some(concept) = args.retire {
        let energies = client.retire(&concept).await?;
        let known = match energies.is_empty() {
            true => String::new(),
            false => format!("; it was known from {}", energies.join(", ")),
        };
        say!("`{concept}` is no longer required{known}");
        return Ok(ExitCode::SUCCESS);
    }
    if !args.add.is_empty() {
        let set = ConceptSet::load(&args.add)?;
        return add(&client, &set, args.node, args.uncalibrated).await;
    }
    let (served, absent) = client.concepts_and_absent().await?;
    if served.is_empty() && absent.is_empty() {
        say!("no energy node is registered; start one with `fairlead energy`");
        return Ok(ExitCode::FAILURE);
    }
    list_concepts(&served, &absent);
    list_nodes(&served);
    Ok(ExitCode::SUCCESS)
}

async fn add(
    client: &Client,
    set: &ConceptSet,
    nodes: Vec<String>,
    uncalibrated: bool,
) -> Result<ExitCode> {
    let mut code = ExitCode::SUCCESS;
    for deployment in client.deploy(set.definitions(), nodes, uncalibrated).await? {
        let (node, energy) = (&deployment.node_id, &deployment.model_name);
        if !deployment.error.is_empty() {
            say!("{node} ({energy}): {}", deployment.error);
            code = ExitCode::FAILURE;
            continue;
        }
        let concepts = deployment.concepts.iter().filter_map(|info| info.concept.as_ref());
        let names: Vec<&str> = concepts.map(|concept| concept.name.as_str()).collect();
        say!("{node} ({energy}) serves {}", names.join(", "));
        deployment.calibrations.iter().for_each(|c| say!("  {}", calibration(c)));
        if deployment.calibrations.is_empty() {
            say!(
                "  without a calibration yet: `fairlead calibrate --concepts FILE` makes one for the node's \
                 --calibrations"
            );
        }
    }
    Ok(code)
}

fn list_concepts(served: &[ServedConcept], absent: &[ConceptRef]) {
    say!("{:<28} {:<12} {:<10} NODES", "CONCEPT", "GROUP", "VERSION");
    for ServedConcept { concept, nodes } in served {
        let info = concept.clone().unwrap_or_default();
        let concept = info.concept.unwrap_or_default();
        let nodes: Vec<String> = nodes
            .iter()
            .map(|node| {
                let bare = if node.calibrations.is_empty() { ", no calibration" } else { "" };
                format!("{} (for {}{bare})", node.node_id, age(node.since_unix_ms))
            })
            .collect();
        let version = short(&concept.version);
        say!("{:<28} {:<12} {version:<10} {}", concept.name, info.group, nodes.join(", "));
    }
    for ConceptRef { name, energy, .. } in absent {
        say!(
            "{name:<28} {:<12} {:<10} none with {energy}: jobs that need it are refused until one comes or \
             `fairlead concepts --retire {name}`",
            "",
            ""
        );
    }
}

fn list_nodes(served: &[ServedConcept]) {
    let mut nodes: BTreeMap<&str, (&ServingNode, BTreeMap<&str, &CalibrationInfo>)> =
        BTreeMap::new();
    for node in served.iter().flat_map(|concept| &concept.nodes) {
        let (_, calibrations) =
            nodes.entry(&node.node_id).or_insert_with(|| (node, BTreeMap::new()));
        calibrations.extend(node.calibrations.iter().map(|c| (c.id.as_str(), c)));
    }
    say!("");
    say!("{:<28} {:<20} ADDRESS AND CALIBRATIONS", "NODE", "ENERGY");
    for (id, (node, calibrations)) in nodes {
        say!("{id:<28} {:<20} {}", node.model_name, node.address);
        for info in calibrations.values() {
            say!("{:<28} {:<20} {}", "", "", calibration(info));
        }
    }
}

/// What a calibration is for and what it says, e.g. "emojiland-sd: ddim, 25 steps, 4 crops, window 1 to
/// 0.4; gate 3.52 (alpha 0.01, 1000 images), 20 concepts, id 0123abcd".
fn calibration(info: &CalibrationInfo) -> String {
    let key = info.key.clone().unwrap_or_default();
    let CalibrationInfo { generator_name, id, alpha, gate, images, crops, concepts, .. } = info;
    let envelope = info.envelope.as_ref().map_or("no envelope".to_owned(), envelope::describe);
    let concepts = match concepts.as_slice() {
        [one] => one.clone(),
        several => format!("{} concepts", several.len()),
    };
    format!(
        "{generator_name}: {}, {} steps, {crops} crops, window {} to {}; {envelope}; gate {gate:.2} (alpha {alpha}, {images} \
         images), {concepts}, id {}",
        key.sampler,
        key.steps,
        info.window_start,
        info.window_end,
        short(id)
    )
}

fn short(hash: &str) -> String {
    hash.chars().take(8).collect()
}

fn age(since_unix_ms: i64) -> String {
    let since = Duration::from_millis(u64::try_from(since_unix_ms).unwrap_or_default());
    // A node's clock may be ahead of this machine's.
    let seconds = (UNIX_EPOCH + since).elapsed().unwrap_or_default().as_secs();
    match seconds {
        0..60 => format!("{seconds} s"),
        60..3_600 => format!("{} min", seconds / 60),
        3_600..86_400 => format!("{} h", seconds / 3_600),
        _ => format!("{} d", seconds / 86_400),
    }
}
