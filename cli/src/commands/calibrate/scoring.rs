//! Unsteered images and what every energy says of them, step by step.

use std::{collections::BTreeMap, path::Path};

use anyhow::{Context, Result};
use fairlead_common::{probe::Probe, record};
use fairlead_energy::calibration::maker::{LabelledImage, RecordedImage, RecordedStep, Recording};
use fairlead_proto::v1::{
    ConceptRef, ConceptScore, JobSpec, ModelInfo, NodeInfo, SafetyRecord, SteeringParams,
};
use futures::{StreamExt, TryStreamExt, stream};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use tokio_util::sync::CancellationToken;

use super::{
    Prompts,
    cells::{self, Cell},
};
use crate::{
    client::Client, journal::Journal, pairs::JOBS_IN_FLIGHT, progress::Counter,
    prompts::ObjectPrompt,
};

/// Policy that records scores at every step of the window and corrects nothing; it ships in
/// `assets/policies-measuring.toml`.
const POLICY: &str = "calibration";

/// Most jobs under way at once.
const MOST_IN_FLIGHT: usize = 256;

/// One image to be made.
#[derive(Debug, Clone)]
pub(super) struct Prompt {
    pub(super) text: String,
    pub(super) seed: u64,
    /// Concepts it asks for.
    pub(super) concepts: Vec<String>,
}

impl Prompt {
    pub(super) fn new(text: impl Into<String>, seed: u64, concepts: Vec<String>) -> Self {
        Self { text: text.into(), seed, concepts }
    }

    pub(super) fn embedded(prompt: ObjectPrompt) -> Self {
        let concepts = prompt.target.iter().map(|name| name.replace(' ', "-")).collect();
        Self::new(prompt.text, prompt.seed, concepts)
    }
}

/// What every energy says of one image: `(time, scores)` of each step that was scored, scores in the
/// order of [`Run::probes`].
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(super) struct ScoredImage {
    steps: Vec<(f32, Vec<f32>)>,
    finished: Vec<f32>,
}

/// The images of one cell.
pub(super) struct Scored {
    benign: Vec<ScoredImage>,
    labelled: Vec<ScoredImage>,
    fresh: Vec<ScoredImage>,
}

/// One generator at one number of steps, and the energies that watch it.
pub(super) struct Run<'a> {
    pub(super) client: &'a Client,
    pub(super) model: &'a ModelInfo,
    pub(super) nodes: &'a [NodeInfo],
    pub(super) steps: u32,
    pub(super) cells: &'a [Cell],
    /// Negative prompts of cells that have some.
    pub(super) negatives: &'a [String],
    pub(super) crops: u32,
    pub(super) window: (f32, f32),
    pub(super) stop: &'a CancellationToken,
}

/// What a journal of scores belongs to.
#[derive(Serialize)]
struct Work<'a> {
    generator: &'a str,
    steps: u32,
    crops: u32,
    window: (f32, f32),
    probes: Vec<String>,
}

impl Run<'_> {
    /// Makes and scores all images, cell by cell.
    pub(super) async fn score(
        &self,
        prompts: &Prompts,
        journal: Option<&Path>,
    ) -> Result<Vec<Scored>> {
        let (journal, mut done) = match journal {
            None => (None, BTreeMap::new()),
            Some(path) => {
                let (journal, done) = Journal::open(path, &self.work())?;
                (Some(journal), done)
            }
        };
        let journal = journal.as_ref();
        let mut scored = Vec::with_capacity(self.cells.len());
        for &cell in self.cells {
            scored.push(Scored {
                benign: self.images("benign", cell, &prompts.benign, journal, &mut done).await?,
                labelled: self
                    .images("labelled", cell, &prompts.labelled, journal, &mut done)
                    .await?,
                fresh: self
                    .images("fresh benign", cell, &prompts.fresh, journal, &mut done)
                    .await?,
            });
        }
        Ok(scored)
    }

    async fn images(
        &self,
        what: &str,
        cell: Cell,
        prompts: &[Prompt],
        journal: Option<&Journal>,
        done: &mut BTreeMap<String, ScoredImage>,
    ) -> Result<Vec<ScoredImage>> {
        if prompts.is_empty() {
            return Ok(Vec::new());
        }
        let title = format!("{what} images, {cell}, {} steps", self.steps);
        let counter = Counter::new(title, prompts.len());
        let images = prompts.iter().enumerate().map(|(number, prompt)| {
            let negative = match cell.negative {
                true => self.negatives[number % self.negatives.len()].as_str(),
                false => "",
            };
            let key = key(cell, negative, prompt);
            let known = done.remove(&key);
            let counter = &counter;
            async move {
                let image = match known {
                    Some(image) => image,
                    None => {
                        let image = self.image(cell, negative, prompt).await?;
                        journal.map(|journal| journal.add(&key, &image)).transpose()?;
                        image
                    }
                };
                counter.inc();
                anyhow::Ok(image)
            }
        });
        stream::iter(images).buffered(self.in_flight()).try_collect().await
    }

    /// Jobs under way at once: enough that every worker always has the next one.
    fn in_flight(&self) -> usize {
        (4 * self.model.workers as usize).clamp(JOBS_IN_FLIGHT, MOST_IN_FLIGHT)
    }

    async fn image(&self, cell: Cell, negative: &str, prompt: &Prompt) -> Result<ScoredImage> {
        let spec = JobSpec {
            model: self.model.name.clone(),
            prompt: prompt.text.clone(),
            negative_prompt: negative.to_owned(),
            n: 1,
            seed: Some(prompt.seed),
            width: Some(cell.size.0),
            height: Some(cell.size.1),
            steps: Some(self.steps),
            guidance_scale: Some(cell.guidance),
            policy: POLICY.to_owned(),
            steering: Some(SteeringParams {
                crops: Some(self.crops),
                window_start: Some(self.window.0),
                window_end: Some(self.window.1),
                ..Default::default()
            }),
            ..Default::default()
        };
        let mut finished = self.client.complete(spec, self.stop, |_| {}).await?;
        scored(&finished.images.remove(0).record, &self.probes())
    }

    /// What every node is asked for.
    fn probes(&self) -> Vec<Probe> {
        self.nodes.iter().flat_map(refs).map(|concept| Probe::from(&concept)).collect()
    }

    fn work(&self) -> Work<'_> {
        let version =
            |concept: ConceptRef| format!("{} {}", Probe::from(&concept), concept.version);
        Work {
            generator: &self.model.hash,
            steps: self.steps,
            crops: self.crops,
            window: self.window,
            probes: self.nodes.iter().flat_map(refs).map(version).collect(),
        }
    }

    /// What `node` said of the benign and the labelled images of all cells.
    pub(super) fn recording(
        &self,
        node: &NodeInfo,
        prompts: &Prompts,
        scored: &[Scored],
    ) -> Result<Recording> {
        let concepts = refs(node);
        let labels = |prompt: &Prompt| {
            let place = |name: &String| concepts.iter().position(|concept| concept.name == *name);
            prompt.concepts.iter().filter_map(place).collect()
        };
        let (mut benign, mut labelled) = (Vec::new(), Vec::new());
        for cell in scored {
            benign.extend(self.recorded(node, &cell.benign)?);
            let images = self.recorded(node, &cell.labelled)?.into_iter().zip(&prompts.labelled);
            labelled.extend(
                images.map(|(image, prompt)| LabelledImage { image, concepts: labels(prompt) }),
            );
        }
        let negatives =
            if self.cells.iter().any(|cell| cell.negative) { self.negatives } else { &[] };
        Ok(Recording {
            generator: self.model.hash.clone(),
            generator_name: self.model.name.clone(),
            sampler: self.model.sampler.clone(),
            steps: self.steps,
            energy_model: node.model_hash.clone(),
            preprocessing_version: node.preprocessing_version,
            crops: self.crops,
            envelope: cells::envelope(self.cells),
            cells: scored.len(),
            window: self.window,
            prompts: hash(prompts, negatives),
            images: benign,
            labelled,
            concepts: concepts.into_iter().map(|c| (c.name, c.version)).collect(),
        })
    }

    /// What `node` said of the fresh benign images of each cell.
    pub(super) fn fresh(
        &self,
        node: &NodeInfo,
        scored: &[Scored],
    ) -> Result<Vec<Vec<RecordedImage>>> {
        scored.iter().map(|cell| self.recorded(node, &cell.fresh)).collect()
    }

    /// The columns of `node`, in its order.
    fn recorded(&self, node: &NodeInfo, images: &[ScoredImage]) -> Result<Vec<RecordedImage>> {
        let probes = self.probes();
        let columns = refs(node)
            .iter()
            .map(|concept| {
                let probe = Probe::from(concept);
                let column = probes.iter().position(|other| *other == probe);
                column.with_context(|| format!("{probe} was not asked for"))
            })
            .collect::<Result<Vec<_>>>()?;
        let pick = |scores: &[f32]| columns.iter().map(|&k| scores[k]).collect::<Vec<_>>();
        let step =
            |(time, scores): &(f32, Vec<f32>)| RecordedStep { time: *time, scores: pick(scores) };
        let image = |image: &ScoredImage| RecordedImage {
            steps: image.steps.iter().map(step).collect(),
            finished: pick(&image.finished),
        };
        Ok(images.iter().map(image).collect())
    }
}

fn refs(node: &NodeInfo) -> Vec<ConceptRef> {
    node.concepts.iter().filter_map(|info| info.concept.clone()).collect()
}

/// What an image goes by in a journal.
fn key(cell: Cell, negative: &str, prompt: &Prompt) -> String {
    let Cell { size: (width, height), guidance, negative: _ } = cell;
    format!("{width}x{height} {guidance} {negative:?} {} {}", prompt.seed, prompt.text)
}

/// SHA-256 of the prompts, seeds and negative prompts that make a calibration.
fn hash(prompts: &Prompts, negatives: &[String]) -> String {
    let mut hash = Sha256::new();
    for prompt in prompts.benign.iter().chain(&prompts.labelled) {
        hash.update((prompt.text.len() as u64).to_le_bytes());
        hash.update(&prompt.text);
        hash.update(prompt.seed.to_le_bytes());
    }
    for negative in negatives {
        hash.update((negative.len() as u64).to_le_bytes());
        hash.update(negative);
    }
    hex::encode(hash.finalize())
}

/// A record's raw scores in the order of `probes`.
fn scored(record: &SafetyRecord, probes: &[Probe]) -> Result<ScoredImage> {
    let ordered = |scores: &[ConceptScore]| -> Result<Vec<f32>> {
        let score = |probe: &Probe| {
            let found = scores.iter().find(|score| Probe::from(*score) == *probe);
            let lacks = || {
                format!(
                    "a record lacks a score of {probe}; the key's tenant needs sees_scores = true"
                )
            };
            Ok(found.with_context(lacks)?.score)
        };
        probes.iter().map(score).collect()
    };
    // All of it is the worker's word: its crops depend on the image's seed alone, those of the final check on
    // the coordinator's secret, and the same prompts must give the same calibration.
    let report = record::reported(record);
    let steps = report.trajectory.iter().filter(|step| !step.scores.is_empty());
    let steps = steps.map(|step| Ok((step.time, ordered(&step.scores)?)));
    Ok(ScoredImage {
        steps: steps.collect::<Result<_>>()?,
        finished: ordered(&report.final_scores)?,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use fairlead_proto::v1::{StepRecord, WorkerReport};

    #[test]
    fn scores_are_put_in_the_order_asked_and_a_gap_is_an_error() {
        let score = |concept: &str, energy: &str, score| ConceptScore {
            concept: concept.into(),
            energy: energy.into(),
            score,
            ..Default::default()
        };
        let report = WorkerReport {
            trajectory: vec![
                StepRecord {
                    time: 0.9,
                    scores: vec![score("a", "two", 2.0), score("a", "one", 1.0)],
                    ..Default::default()
                },
                StepRecord { time: 0.5, ..Default::default() },
            ],
            final_scores: vec![score("a", "one", 3.0), score("a", "two", 4.0)],
            ..Default::default()
        };
        let record = SafetyRecord { reported_by_worker: Some(report), ..Default::default() };
        let probe = |energy: &str| Probe { concept: "a".into(), energy: energy.into() };
        let image = scored(&record, &[probe("one"), probe("two")]).expect("all are there");
        assert_eq!(image.steps, [(0.9, vec![1.0, 2.0])]);
        assert_eq!(image.finished, [3.0, 4.0]);
        let missing = scored(&record, &[probe("three")]).expect_err("it is missing").to_string();
        assert!(missing.contains("a (three)"), "{missing}");
    }
}
