//! Making the images: every item unsteered and steered, kept as files and in journals.

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
};

use anyhow::{Context, Result, ensure};
use fairlead_common::{record, text};
use fairlead_proto::v1::{ImageStatus, JobSpec, SteeringParams};
use futures::{StreamExt, TryStreamExt, stream};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use tokio_util::sync::CancellationToken;

use super::sets::Item;
use crate::{
    client::Client,
    journal::Journal,
    output,
    pairs::{JOBS_IN_FLIGHT, UNSTEERED},
    progress::Counter,
    sheet::Picture,
};

/// What became of one image.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(super) struct Made {
    pub(super) withheld: bool,
    /// SHA-256 of the pixels.
    pub(super) pixels: String,
    pub(super) reruns: u32,
    /// Steps that were corrected.
    pub(super) corrections: u32,
    /// Milliseconds that the worker spent on it.
    pub(super) engine_ms: u32,
}

/// How all images of one side are made.
#[derive(Debug, Clone, Serialize)]
pub(super) struct Side {
    /// "unsteered" or "steered".
    pub(super) name: &'static str,
    pub(super) generator: String,
    pub(super) steps: Option<u32>,
    pub(super) guidance: Option<f32>,
    pub(super) policy: String,
    pub(super) negative_prompt: String,
    /// Everything that decides where steering leads: the knobs, and concepts and calibrations that are
    /// served.
    pub(super) conditions: Vec<String>,
    /// SHA-256 of all items.
    pub(super) items: String,
}

impl Side {
    /// The unsteered counterpart of a steered side.
    pub(super) fn unsteered(&self) -> Self {
        Self {
            name: "unsteered",
            policy: UNSTEERED.to_owned(),
            negative_prompt: String::new(),
            conditions: Vec::new(),
            ..self.clone()
        }
    }

    /// The file of an item's picture.
    pub(super) fn picture(&self, folder: &Path, item: &Item) -> PathBuf {
        folder.join("images").join(format!("{}-{}.png", item.key(), self.name))
    }

    /// Makes what is not made yet. Pictures go to `folder/images`, results to a journal there.
    pub(super) async fn make(
        &self,
        client: &Client,
        items: &[Item],
        folder: &Path,
        stop: &CancellationToken,
    ) -> Result<Vec<Made>> {
        output::ensure_folder(&folder.join("images"))?;
        let path = folder.join(format!("{}.jsonl", self.name));
        let (journal, mut done): (_, BTreeMap<String, Made>) = Journal::open(&path, self)?;
        let counter = Counter::new(format!("{} images", self.name), items.len());
        let made = items.iter().map(|item| {
            let known = done.remove(&item.key());
            let (counter, journal) = (&counter, &journal);
            async move {
                let made = match known {
                    Some(made) => made,
                    None => self.one(client, item, folder, journal, stop).await?,
                };
                counter.inc();
                anyhow::Ok(made)
            }
        });
        stream::iter(made).buffered(JOBS_IN_FLIGHT).try_collect().await
    }

    /// Takes pictures that something else made, `given/KEY.png`, as this side's.
    pub(super) fn adopt(&self, items: &[Item], folder: &Path, given: &Path) -> Result<Vec<Made>> {
        let journal = folder.join(format!("{}.jsonl", self.name));
        ensure!(
            !journal.exists(),
            "{} belongs to images that this command made; choose another --out for those of {}",
            journal.display(),
            given.display()
        );
        output::ensure_folder(&folder.join("images"))?;
        let adopted = items.iter().map(|item| {
            let path = given.join(format!("{}.png", item.key()));
            let png = std::fs::read(&path).with_context(|| {
                format!("cannot read {}, the picture of \"{}\"", path.display(), item.prompt)
            })?;
            let picture = Picture::from_png(&png).with_context(|| path.display().to_string())?;
            output::write_file(&self.picture(folder, item), &png)?;
            Ok(Made {
                withheld: false,
                pixels: hex::encode(Sha256::digest(&picture.rgb)),
                reruns: 0,
                corrections: 0,
                engine_ms: 0,
            })
        });
        adopted.collect()
    }

    async fn one(
        &self,
        client: &Client,
        item: &Item,
        folder: &Path,
        journal: &Journal,
        stop: &CancellationToken,
    ) -> Result<Made> {
        let spec = JobSpec {
            prompt: item.prompt.clone(),
            negative_prompt: self.negative_prompt.clone(),
            n: 1,
            seed: Some(item.seed),
            steps: self.steps,
            guidance_scale: item.guidance.or(self.guidance),
            policy: self.policy.clone(),
            ..Default::default()
        };
        let mut finished = client.complete(spec, stop, |_| {}).await?;
        let image = finished.images.remove(0);
        let withheld = image.info.status() == ImageStatus::Withheld;
        if !withheld {
            output::write_file(&self.picture(folder, item), &image.png)?;
        }
        let report = record::reported(&image.record);
        let pushed = report.trajectory.iter().filter(|step| step.correction > 0.0);
        let made = Made {
            withheld,
            pixels: image.record.pixels_sha256.clone(),
            reruns: report.reruns,
            corrections: pushed.count() as u32,
            engine_ms: report.engine_ms,
        };
        // After the picture: what the journal knows is there.
        journal.add(&item.key(), &made)?;
        Ok(made)
    }
}

/// The knobs and everything served, as text.
pub(super) async fn conditions(
    client: &Client,
    steering: Option<&SteeringParams>,
    policies: &Path,
) -> Result<Vec<String>> {
    let mut conditions = vec![
        format!("{:?}", steering.copied().unwrap_or_default()),
        text::read(policies).with_context(|| format!("cannot read {}", policies.display()))?,
    ];
    for served in client.concepts().await? {
        let concept = served.concept.and_then(|info| info.concept).unwrap_or_default();
        conditions.push(format!("{} {} {}", concept.name, concept.energy, concept.version));
        for node in served.nodes {
            conditions.extend(node.calibrations.into_iter().map(|calibration| calibration.id));
        }
    }
    conditions.sort();
    conditions.dedup();
    Ok(conditions)
}
