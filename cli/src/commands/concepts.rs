//! `fairlead concepts`: what a cluster steers away from and who serves it.

use std::process::ExitCode;

use anyhow::Result;
use clap::Args;

use crate::client::Client;

/// Lists the concepts that live energy nodes serve, their group, and the nodes.
#[derive(Args)]
pub(crate) struct ConceptsArgs {
    /// Coordinator to ask.
    #[arg(long, default_value = "http://127.0.0.1:7100", env = "FAIRLEAD_SERVER")]
    server: String,
}

pub(crate) async fn run(args: ConceptsArgs) -> Result<ExitCode> {
    let concepts = Client::new(&args.server)?.concepts().await?;
    if concepts.is_empty() {
        println!("no energy node is registered; start one with `fairlead energy`");
        return Ok(ExitCode::FAILURE);
    }
    println!("{:<28} {:<12} {:<10} NODES", "CONCEPT", "GROUP", "VERSION");
    for served in concepts {
        let info = served.concept.unwrap_or_default();
        let concept = info.concept.unwrap_or_default();
        let nodes: Vec<String> = served
            .nodes
            .iter()
            .map(|node| {
                format!(
                    "{} ({}, {} calibrations)",
                    node.node_id,
                    node.model_name,
                    node.calibrations.len()
                )
            })
            .collect();
        let version: String = concept.version.chars().take(8).collect();
        println!("{:<28} {:<12} {:<10} {}", concept.name, info.group, version, nodes.join(", "));
    }
    Ok(ExitCode::SUCCESS)
}
