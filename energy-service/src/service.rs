//! What a loaded node answers: requests checked and resolved, results put on the wire.

use std::{
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use fairlead_common::{bounds::MAX_CONCEPTS, tensor};
use fairlead_proto::{MAX_MESSAGE_BYTES, PREPROCESSING_VERSION, PROTOCOL_VERSION, v1};
use tokio::sync::{Mutex, watch};

use crate::{
    calibration::{
        FileError,
        store::{Calibrations, Levels},
    },
    concepts::ConceptSet,
    crops::MAX_CROPS,
    engine::EngineHandle,
    error::RequestError,
    evaluate::{AskedConcept, Batch, Evaluation, Gate, Sample, Scored},
    gate::{Before, Level},
    kept,
    offer::{Offer, Run, Standing},
    preprocess,
    scorer::ScorerDescription,
    served::Served,
};

/// Longest time a call may take where its caller set no deadline.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(120);

/// Most images of one request, however small they are.
const MAX_BATCH: usize = 64;

/// How a node appears to others.
#[derive(Debug, Clone)]
pub(crate) struct Identity {
    pub(crate) node_id: String,
    /// "http://host:port".
    pub(crate) address: String,
    /// Crops where a request does not say.
    pub(crate) crops: u32,
}

/// Folders that a node reads, and writes what it learns to.
#[derive(Debug, Clone, Default)]
pub(crate) struct Folders {
    pub(crate) calibrations: Option<PathBuf>,
    pub(crate) added_concepts: Option<PathBuf>,
}

impl Folders {
    /// The calibrations at hand for what is served. It blocks.
    pub(crate) fn calibrations_of(&self, served: &Served) -> Result<Calibrations, FileError> {
        let load = |folder: &PathBuf| Calibrations::load(folder, served);
        self.calibrations.as_ref().map_or_else(|| Ok(Calibrations::default()), load)
    }
}

/// A node whose model is loaded.
#[derive(Debug)]
pub(crate) struct Node {
    engine: EngineHandle,
    scorer: ScorerDescription,
    offer: watch::Sender<Arc<Offer>>,
    /// Held by whoever changes the offer.
    changing: Mutex<()>,
    folders: Folders,
    identity: Identity,
}

impl Node {
    pub(crate) fn new(
        engine: EngineHandle,
        scorer: ScorerDescription,
        offer: Offer,
        folders: Folders,
        identity: Identity,
    ) -> Self {
        let offer = watch::Sender::new(Arc::new(offer));
        Self { engine, scorer, offer, changing: Mutex::new(()), folders, identity }
    }

    pub(crate) fn engine(&self) -> &EngineHandle {
        &self.engine
    }

    pub(crate) fn folders(&self) -> &Folders {
        &self.folders
    }

    /// What it serves now.
    pub(crate) fn offer(&self) -> Arc<Offer> {
        Arc::clone(&self.offer.borrow())
    }

    /// Changes when concepts are added, and when calibrations come or go.
    pub(crate) fn offers(&self) -> watch::Receiver<Arc<Offer>> {
        self.offer.subscribe()
    }

    /// Reads the calibrations anew; true if they changed. It blocks.
    pub(crate) fn reload(&self, directory: &Path) -> Result<bool, FileError> {
        let _changing = self.changing.blocking_lock();
        let Offer { served, calibrations } = &*self.offer();
        let fresh = Calibrations::load(directory, served)?;
        let changed = *calibrations != fresh;
        if changed {
            let offer = Offer { served: served.clone(), calibrations: fresh };
            self.offer.send_replace(Arc::new(offer));
        }
        Ok(changed)
    }

    /// Serves one more set of concepts from now on, with the calibrations that are there for it. Poll it to
    /// the end: the scorer's order and this node's must stay one.
    pub(crate) async fn add_concepts(
        &self,
        request: v1::AddConceptsRequest,
        now_unix_ms: i64,
    ) -> Result<v1::AddConceptsResponse, RequestError> {
        let set = ConceptSet::received(request.concepts)
            .map_err(|why| RequestError::Invalid { field: "concepts", why })?;
        let _changing = self.changing.lock().await;
        let (number, served) = self.offer().served.with(&set, now_unix_ms)?;
        if let Some(served) = served {
            self.learn(&set, number, served, request.allow_uncalibrated).await?;
        }
        let offer = self.offer();
        if let (Some(folder), 1..) = (self.folders.added_concepts.clone(), number) {
            let hash = offer.served.sets[number].clone();
            let kept = blocking(move || kept::write(&folder, &hash, &set)).await?;
            kept.map_err(|error| RequestError::NotKept(error.to_string()))?;
        }
        Ok(offer.set(number))
    }

    /// Has the engine learn `set`, and offers `served`, which has it as the set `number`.
    async fn learn(
        &self,
        set: &ConceptSet,
        number: usize,
        served: Served,
        allow_uncalibrated: bool,
    ) -> Result<(), RequestError> {
        let concepts = served.concepts.len();
        if concepts > MAX_CONCEPTS {
            return Err(RequestError::TooManyConcepts { concepts, most: MAX_CONCEPTS });
        }
        let folders = self.folders.clone();
        let load = move || Ok(Offer { calibrations: folders.calibrations_of(&served)?, served });
        let offer = blocking(load).await?.map_err(RequestError::Calibrations)?;
        let calibrations = offer.set(number).calibrations.len();
        if calibrations == 0 && !allow_uncalibrated {
            return Err(RequestError::Uncalibrated);
        }
        self.engine.learn(set.clone()).await?;
        self.offer.send_replace(Arc::new(offer));
        let names: Vec<&str> = set.concepts().iter().map(|c| c.name.as_str()).collect();
        tracing::info!(?names, calibrations, "concepts added");
        Ok(())
    }

    /// The node's full description.
    pub(crate) fn describe(&self) -> v1::NodeInfo {
        let ScorerDescription { kind, model_name, model_hash, height, width, filter, .. } =
            &self.scorer;
        let offer = self.offer();
        v1::NodeInfo {
            node_id: self.identity.node_id.clone(),
            address: self.identity.address.clone(),
            protocol_version: PROTOCOL_VERSION,
            preprocessing_version: PREPROCESSING_VERSION,
            kind: (*kind).to_owned(),
            model_name: model_name.clone(),
            model_hash: model_hash.clone(),
            input: Some(v1::InputSpec {
                height: *height as u32,
                width: *width as u32,
                datatype: v1::Datatype::F16.into(),
                range_min: 0.0,
                range_max: 1.0,
                max_batch: self.max_batch() as u32,
                filter: preprocess::on_the_wire(*filter).into(),
            }),
            concepts: offer.concepts(),
            calibrations: offer.calibrations(),
        }
    }

    /// As many images as fit a message as f32, with room for the rest of it.
    fn max_batch(&self) -> usize {
        let image = self.scorer.height * self.scorer.width * 3 * size_of::<f32>();
        (MAX_MESSAGE_BYTES / 2 / image).clamp(1, MAX_BATCH)
    }

    pub(crate) async fn evaluate(
        &self,
        request: v1::EvaluateRequest,
    ) -> Result<v1::EvaluateResponse, RequestError> {
        let offer = self.offer();
        let indices = offer.served.resolve(&request.concepts)?;
        let crops = self.crops(request.crops)?;
        self.check_samples(&request.samples)?;
        let images = request.samples.len();
        let (height, width) = (self.scorer.height, self.scorer.width);
        let pixels = preprocess::clean_estimates(request.pixels.as_ref(), images, height, width)?;
        let times = request.samples.iter().map(|sample| sample.time).collect::<Vec<_>>();
        let key = request.calibration.as_ref();
        let fallback = request.allow_calibration_fallback && !request.scores_only;
        let run = self.run(key, crops, fallback);
        let (levels, standing) =
            gating_or_standing(&offer, &indices, &times, run, request.scores_only)?;
        let concepts = asked(&offer.served, &indices);
        let samples = request.samples.iter().enumerate().map(|(image, context)| {
            let before = |k: usize| before(context, &concepts[k].name);
            let gates = levels.as_ref().map(|levels| gates(&levels.levels[image], before));
            Sample { crop_seed: context.crop_seed, gates }
        });
        let batch = Batch {
            pixels,
            samples: samples.collect(),
            concepts: concepts.clone(),
            crops,
            gradient: !request.scores_only,
        };
        let mut evaluations = self.score(batch).await?;
        stand(&mut evaluations, &standing);
        let gradient = gradient(&evaluations, height, width);
        let (calibration_ids, calibration_fallbacks) = origin(levels);
        Ok(v1::EvaluateResponse {
            samples: evaluations.iter().map(|e| self.sample_evaluation(e, &concepts)).collect(),
            gradient,
            calibration_ids,
            calibration_fallbacks,
        })
    }

    pub(crate) async fn check(
        &self,
        mut request: v1::CheckRequest,
    ) -> Result<v1::CheckResponse, RequestError> {
        let offer = self.offer();
        let indices = offer.served.resolve(&request.concepts)?;
        let crops = self.crops(request.crops)?;
        let key = request.calibration.as_ref();
        let fallback = request.allow_calibration_fallback && !request.scores_only;
        let run = self.run(key, crops, fallback);
        let (levels, mut standing) =
            gating_or_standing(&offer, &indices, &[0.0], run, request.scores_only)?;
        let ScorerDescription { height, width, filter, .. } = self.scorer;
        // Decoding a large image takes a while: not on the async threads.
        let png = std::mem::take(&mut request.png);
        let decode = move || preprocess::finished_image(&png, height, width, filter);
        let image = tokio::task::spawn_blocking(decode)
            .await
            .map_err(|error| RequestError::Png(format!("decoding failed: {error}")))??;
        let concepts = asked(&offer.served, &indices);
        let level: Vec<Level> = levels.iter().flat_map(|levels| levels.levels[0].clone()).collect();
        // One level for all, whatever happened to the image before.
        let finished: Vec<Level> = level.iter().map(Level::finished).collect();
        let gates = levels.as_ref().map(|_| gates(&finished, |_| Before::Closed));
        stand_at_finish(&mut standing);
        let batch = Batch {
            pixels: image.pixels,
            samples: vec![Sample { crop_seed: request.crop_seed, gates }],
            concepts: concepts.clone(),
            crops,
            gradient: false,
        };
        let mut evaluations = self.score(batch).await?;
        stand(&mut evaluations, &standing);
        let [evaluation] = evaluations.as_slice() else {
            return Err(RequestError::Stopped("one image went in, others came out".to_owned()));
        };
        let remains = |&k: &usize| {
            request.open_concepts.contains(&concepts[k].name)
                && level[k].is_open(evaluation.concepts[k].z, Before::Held)
        };
        let remaining = (0..level.len()).filter(remains).map(|k| concepts[k].name.clone());
        let (calibration_ids, calibration_fallbacks) = origin(levels);
        Ok(v1::CheckResponse {
            scores: self.concept_scores(evaluation, &concepts),
            flagged: evaluation.is_open(),
            image_sha256: image.sha256,
            remaining_concepts: remaining.collect(),
            calibration_ids,
            calibration_fallbacks,
        })
    }

    async fn score(&self, batch: Batch) -> Result<Vec<Evaluation>, RequestError> {
        tokio::time::timeout(ANSWER_TIMEOUT, self.engine.evaluate(batch))
            .await
            .unwrap_or(Err(RequestError::Late(ANSWER_TIMEOUT)))
    }

    fn crops(&self, asked: u32) -> Result<u32, RequestError> {
        match asked {
            0 => Ok(self.identity.crops),
            1..=MAX_CROPS => Ok(asked),
            _ => {
                let why = format!("is {asked}, must be 1 to {MAX_CROPS}, or 0 for the default");
                Err(RequestError::Invalid { field: "crops", why })
            }
        }
    }

    fn check_samples(&self, samples: &[v1::SampleContext]) -> Result<(), RequestError> {
        let invalid = |why| Err(RequestError::Invalid { field: "samples", why });
        let most = self.max_batch();
        if samples.is_empty() || samples.len() > most {
            return invalid(format!("has {} images, must have 1 to {most}", samples.len()));
        }
        match samples.iter().position(|sample| !(0.0..=1.0).contains(&sample.time)) {
            Some(image) => invalid(format!(
                "of image {image} has time {}; t / T lies in 0 to 1",
                samples[image].time
            )),
            None => Ok(()),
        }
    }

    fn run<'a>(
        &self,
        key: Option<&'a v1::CalibrationKey>,
        crops: u32,
        allow_fallback: bool,
    ) -> Result<Run<'a>, RequestError> {
        let missing = || "is missing; name generator, sampler and steps of the run".to_owned();
        let key = key
            .filter(|key| !key.generator.is_empty() && key.steps > 0)
            .ok_or_else(|| RequestError::Invalid { field: "calibration", why: missing() })?;
        Ok(Run { key, crops, allow_fallback, steepness: self.scorer.steepness })
    }

    fn sample_evaluation(
        &self,
        evaluation: &Evaluation,
        concepts: &[AskedConcept],
    ) -> v1::SampleEvaluation {
        v1::SampleEvaluation {
            scores: self.concept_scores(evaluation, concepts),
            energy: evaluation.energy,
            amplitude: evaluation.amplitude,
        }
    }

    fn concept_scores(
        &self,
        evaluation: &Evaluation,
        concepts: &[AskedConcept],
    ) -> Vec<v1::ConceptScore> {
        let score = |(concept, scored): (&AskedConcept, &Scored)| v1::ConceptScore {
            concept: concept.name.clone(),
            score: scored.score,
            z: scored.z,
            gate: scored.gate,
            open: scored.open,
            energy: self.scorer.model_name.clone(),
        };
        concepts.iter().zip(&evaluation.concepts).map(score).collect()
    }
}

fn asked(served: &Served, indices: &[usize]) -> Vec<AskedConcept> {
    let asked = |&index: &usize| {
        let info = &served.concepts[index].info;
        AskedConcept { index, name: info.name.clone(), weight: info.weight }
    };
    indices.iter().map(asked).collect()
}

/// Runs what reads or writes files.
async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> T + Send + 'static,
) -> Result<T, RequestError> {
    let ended = tokio::task::spawn_blocking(work).await;
    ended.map_err(|error| RequestError::Stopped(error.to_string()))
}

fn before(context: &v1::SampleContext, concept: &String) -> Before {
    match (context.held_concepts.contains(concept), context.open_concepts.contains(concept)) {
        (true, _) => Before::Held,
        (false, true) => Before::Open,
        (false, false) => Before::Closed,
    }
}

fn gates(levels: &[Level], before: impl Fn(usize) -> Before) -> Vec<Gate> {
    let gate = |(k, &level)| Gate { level, before: before(k) };
    levels.iter().enumerate().map(gate).collect()
}

/// The levels that gates go by, or those that raw scores are only set beside: who only observes
/// needs no calibration, and sees z and gate where there is one.
fn gating_or_standing(
    offer: &Offer,
    indices: &[usize],
    times: &[f32],
    run: Result<Run<'_>, RequestError>,
    scores_only: bool,
) -> Result<(Option<Levels>, Standing), RequestError> {
    if !scores_only {
        return Ok((Some(offer.levels(indices, times, &run?)?), Standing::new()));
    }
    Ok((None, run.map(|run| offer.standing(indices, times, &run)).unwrap_or_default()))
}

/// Those that a finished image's raw scores are set beside.
fn stand_at_finish(standing: &mut Standing) {
    standing.iter_mut().flatten().flatten().for_each(|level| *level = level.finished());
}

/// Fills in where raw scores stand; no gate opens by it.
fn stand(evaluations: &mut [Evaluation], standing: &Standing) {
    for (evaluation, levels) in evaluations.iter_mut().zip(standing) {
        for (scored, level) in evaluation.concepts.iter_mut().zip(levels) {
            if let Some(level) = level {
                (scored.z, scored.gate) = (level.z(scored.score), level.gate);
            }
        }
    }
}

fn origin(levels: Option<Levels>) -> (Vec<String>, Vec<String>) {
    levels.map(|levels| (levels.calibration_ids, levels.fallbacks)).unwrap_or_default()
}

/// The gradients on the wire, zero rows for images whose gates are closed: in f32, because a pixel's
/// share of the gradient may lie below the least f16.
fn gradient(evaluations: &[Evaluation], height: usize, width: usize) -> Option<v1::Tensor> {
    if evaluations.iter().all(|evaluation| evaluation.gradient.is_none()) {
        return None;
    }
    let size = 3 * height * width;
    let mut values = Vec::with_capacity(evaluations.len() * size);
    for evaluation in evaluations {
        match &evaluation.gradient {
            Some(gradient) => values.extend_from_slice(gradient),
            None => values.resize(values.len() + size, 0.0),
        }
    }
    let shape = [evaluations.len(), 3, height, width];
    Some(tensor::encode("gradient", &shape, &values, v1::Datatype::F32))
}
