//! `fairlead inspect`: what a PNG says about itself.

use std::{fs::File, io::BufReader, path::PathBuf, process::ExitCode};

use anyhow::{Context, Result, bail};
use clap::Args;
use fairlead_common::record;
use fairlead_proto::v1::SafetyRecord;
use sha2::{Digest, Sha256};

use crate::{client::Client, output::say};

/// Largest file looked at.
const MAX_BYTES: u64 = 256 << 20;

/// Prints the generation parameters of a PNG and checks the file against its safety record: the
/// one beside it (`NAME.json`), or the coordinator's with --server.
#[derive(Args)]
pub(crate) struct InspectArgs {
    /// A PNG made by Fairlead.
    image: PathBuf,
    /// Take the safety record from this coordinator.
    #[arg(long, env = "FAIRLEAD_SERVER")]
    server: Option<String>,
}

pub(crate) async fn run(args: InspectArgs) -> Result<ExitCode> {
    let texts = read_texts(&args.image)?;
    for (keyword, text) in &texts {
        say!("{keyword}:");
        for line in text.lines() {
            say!("  {line}");
        }
    }
    let Some((_, record_id)) = texts.iter().find(|(keyword, _)| keyword == "fairlead-record")
    else {
        bail!("{} carries no `fairlead-record`: Fairlead did not make it", args.image.display());
    };
    let record = match &args.server {
        Some(server) => Client::new(server)?.record(record_id).await?,
        None => {
            let path = args.image.with_extension("json");
            if !path.exists() {
                say!("record: none beside the image; --server asks a coordinator for it");
                return Ok(ExitCode::SUCCESS);
            }
            let text = std::fs::read_to_string(&path)
                .with_context(|| format!("cannot read {}", path.display()))?;
            record::from_json(&text).with_context(|| path.display().to_string())?
        }
    };
    if record.record_id != *record_id {
        bail!("the image names record {record_id}, the record found is {}", record.record_id);
    }
    print_record(&record);
    let bytes = std::fs::read(&args.image)?;
    let digest = hex::encode(Sha256::digest(&bytes));
    if digest != record.image_sha256 {
        bail!(
            "the file is not the one that was released: its sha256 is {digest}, the record's {}",
            record.image_sha256
        );
    }
    say!("sha256: {digest}, as recorded");
    Ok(ExitCode::SUCCESS)
}

fn print_record(record: &SafetyRecord) {
    let policy = record.policy.clone().unwrap_or_default();
    say!("record: {} ({})", record.record_id, record.status().as_str_name());
    say!("policy: {} with {} concepts", policy.name, policy.concepts.len());
    let corrected = record.trajectory.iter().filter(|step| step.correction > 0.0).count();
    say!("steered: {} ({corrected} corrections, {} reruns)", record.steered, record.reruns);
    let mut scores = record.final_scores.clone();
    scores.sort_by(|a, b| (b.z - b.gate).total_cmp(&(a.z - a.gate)));
    for score in scores.iter().take(5) {
        let state = if score.open { "open" } else { "closed" };
        say!("  {:<28} z {:>6.2}  gate {:.2}  {state}", score.concept, score.z, score.gate);
    }
}

/// All text chunks of the PNG, in order.
fn read_texts(path: &PathBuf) -> Result<Vec<(String, String)>> {
    let file = File::open(path).with_context(|| format!("cannot open {}", path.display()))?;
    let size = file.metadata()?.len();
    if size > MAX_BYTES {
        bail!("{} has {size} bytes, more than the {MAX_BYTES} looked at", path.display());
    }
    let mut reader = png::Decoder::new(BufReader::new(file))
        .read_info()
        .with_context(|| format!("{} is not a PNG", path.display()))?;
    reader.finish().with_context(|| format!("{} is a damaged PNG", path.display()))?;
    let info = reader.info();
    let mut texts = Vec::new();
    for chunk in &info.uncompressed_latin1_text {
        texts.push((chunk.keyword.clone(), chunk.text.clone()));
    }
    for chunk in &info.utf8_text {
        texts.push((chunk.keyword.clone(), chunk.get_text()?));
    }
    Ok(texts)
}
