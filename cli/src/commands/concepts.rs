//! `fairlead concepts`: what a cluster steers away from and who serves it.

use std::{
    process::ExitCode,
    time::{Duration, UNIX_EPOCH},
};

use anyhow::Result;
use clap::Args;
use fairlead_proto::v1::{ServedConcept, ServingNode};

use crate::{client::Client, credentials::CredentialArgs, output::say};

/// Lists the concepts that live energy nodes serve: their group and version, and of each node its
/// model, how long it has served them and the number of its calibrations.
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
    /// Forget this concept, which no node serves any longer.
    #[arg(long, value_name = "CONCEPT")]
    retire: Option<String>,
}

pub(crate) async fn run(args: ConceptsArgs) -> Result<ExitCode> {
    let client = Client::new(&args.server, args.credentials.load()?)?;
    if let Some(concept) = args.retire {
        let energies = client.retire(&concept).await?;
        say!("`{concept}` is no longer required; it was known from {}", energies.join(", "));
        return Ok(ExitCode::SUCCESS);
    }
    let (served, absent) = client.concepts_and_absent().await?;
    if served.is_empty() && absent.is_empty() {
        say!("no energy node is registered; start one with `fairlead energy`");
        return Ok(ExitCode::FAILURE);
    }
    say!("{:<28} {:<12} {:<10} NODES", "CONCEPT", "GROUP", "VERSION");
    for ServedConcept { concept, nodes } in served {
        let info = concept.unwrap_or_default();
        let concept = info.concept.unwrap_or_default();
        let nodes: Vec<String> = nodes.iter().map(describe).collect();
        let version: String = concept.version.chars().take(8).collect();
        say!("{:<28} {:<12} {:<10} {}", concept.name, info.group, version, nodes.join(", "));
    }
    for concept in absent {
        say!(
            "{:<28} {:<12} {:<10} none with {}: jobs that need it are refused until one comes or \
             `fairlead concepts --retire {}`",
            concept.name,
            "",
            "",
            concept.energy,
            concept.name
        );
    }
    Ok(ExitCode::SUCCESS)
}

fn describe(node: &ServingNode) -> String {
    let since = Duration::from_millis(u64::try_from(node.since_unix_ms).unwrap_or_default());
    let age = (UNIX_EPOCH + since).elapsed().unwrap_or_default().as_secs();
    let age = match age {
        0..60 => format!("{age} s"),
        60..3_600 => format!("{} min", age / 60),
        3_600..86_400 => format!("{} h", age / 3_600),
        _ => format!("{} d", age / 86_400),
    };
    let calibrations = node.calibrations.len();
    format!("{} ({}, for {age}, {calibrations} calibrations)", node.node_id, node.model_name)
}
