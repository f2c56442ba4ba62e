//! `fairlead inspect`: what a PNG says about itself.

use std::{path::PathBuf, process::ExitCode};

use anyhow::Result;
use clap::Args;
use fairlead_common::record;
use fairlead_proto::v1::SafetyRecord;

use crate::{
    output::say,
    provenance::{Picture, RecordArgs},
};

/// Prints the generation parameters of a PNG and checks the file against its safety record. That the
/// record is genuine is for `fairlead verify` to say.
#[derive(Args)]
pub(crate) struct InspectArgs {
    /// A PNG made by Fairlead.
    image: PathBuf,
    #[command(flatten)]
    records: RecordArgs,
}

pub(crate) async fn run(args: InspectArgs) -> Result<ExitCode> {
    let picture = Picture::open(&args.image)?;
    for (keyword, text) in &picture.texts {
        say!("{keyword}:");
        for line in text.lines() {
            say!("  {line}");
        }
    }
    let Some(record) = args.records.open()?.of(&picture).await? else {
        say!("record: none beside the image; --server asks a coordinator for it");
        return Ok(ExitCode::SUCCESS);
    };
    print_record(&record);
    picture.check(&record)?;
    say!("sha256: {}, as recorded", picture.sha256);
    Ok(ExitCode::SUCCESS)
}

fn print_record(record: &SafetyRecord) {
    let policy = record.policy.clone().unwrap_or_default();
    say!("record: {} ({})", record.record_id, record.status().as_str_name());
    say!("policy: {} with {} concepts", policy.name, policy.concepts.len());
    let report = record::reported(record);
    let corrected = report.trajectory.iter().filter(|step| step.correction > 0.0).count();
    let (steered, reruns) = (report.steered, report.reruns);
    say!("steered, as the worker reports: {steered} ({corrected} corrections, {reruns} reruns)");
    let mut scores = match record.withheld_by_worker {
        true => {
            say!("withheld by the worker, on its own word; its scores:");
            report.final_scores.clone()
        }
        false => record.final_scores.clone(),
    };
    scores.sort_by(|a, b| (b.z - b.gate).total_cmp(&(a.z - a.gate)));
    for score in scores.iter().take(5) {
        let state = if score.open { "open" } else { "closed" };
        say!("  {:<28} z {:>6.2}  gate {:.2}  {state}", score.concept, score.z, score.gate);
    }
    match &record.signature {
        Some(signature) => say!("signed: with key {}", signature.key_id),
        None => say!("signed: no"),
    }
}
