//! One evaluation, from pixels to scores, gates, energy and gradient.
//!
//! A pass of the scorer is over the crops of several images, of as many requests as wait; a scorer's
//! numbers for an image do not depend on the others. The backward pass runs only where a gate is
//! open, once for all concepts.

use std::collections::BTreeSet;

use candle_core::Tensor;

use crate::{
    crops::{self, Window},
    error::RequestError,
    gate::{self, Before, Level},
    metrics,
    scorer::{Scorer, ScorerDescription, ScorerError},
};

/// Images to score, `[samples, 3, h, w]` in the scorer's size.
#[derive(Debug, Clone)]
pub(crate) struct Batch {
    pub(crate) pixels: Vec<f32>,
    pub(crate) samples: Vec<Sample>,
    pub(crate) concepts: Vec<AskedConcept>,
    /// Crops per image.
    pub(crate) crops: u32,
    /// Whether to run a backward pass where a gate is open.
    pub(crate) gradient: bool,
}

impl Batch {
    /// What must be alike for batches to share a pass: crops and concepts.
    pub(crate) fn asks(&self) -> (u32, Vec<usize>) {
        (self.crops, self.concepts.iter().map(|concept| concept.index).collect())
    }
}

/// A concept of the request.
#[derive(Debug, Clone)]
pub(crate) struct AskedConcept {
    /// Index into the served set.
    pub(crate) index: usize,
    pub(crate) name: String,
    pub(crate) weight: f32,
}

/// What is known of one image.
#[derive(Debug, Clone)]
pub(crate) struct Sample {
    pub(crate) crop_seed: u64,
    /// One per concept of the request; none for raw scores without gates.
    pub(crate) gates: Option<Vec<Gate>>,
}

/// A concept's gate at one image.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Gate {
    pub(crate) level: Level,
    pub(crate) before: Before,
}

/// Verdict on one concept.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Scored {
    pub(crate) score: f32,
    /// 0 for raw scores.
    pub(crate) z: f32,
    /// The gate `q`; 0 for raw scores.
    pub(crate) gate: f32,
    pub(crate) open: bool,
}

/// Everything about one image.
#[derive(Debug, Clone, Default, PartialEq)]
pub(crate) struct Evaluation {
    /// One per concept of the request.
    pub(crate) concepts: Vec<Scored>,
    pub(crate) energy: f32,
    pub(crate) amplitude: f32,
    /// dE/dpixels `[3, h, w]`: there exactly if a gate is open and a gradient was asked for.
    pub(crate) gradient: Option<Vec<f32>>,
}

impl Evaluation {
    /// Whether some concept's gate is open.
    pub(crate) fn is_open(&self) -> bool {
        self.concepts.iter().any(|concept| concept.open)
    }
}

/// What becomes of one batch: its evaluations, or none if it was abandoned.
pub(crate) type Outcome = Result<Option<Vec<Evaluation>>, RequestError>;

/// One image of one of several batches.
#[derive(Clone, Copy)]
struct Image<'a> {
    batch: &'a Batch,
    /// Index of the batch.
    of: usize,
    /// Index in the batch.
    at: usize,
}

impl Image<'_> {
    fn sample(&self) -> &Sample {
        &self.batch.samples[self.at]
    }

    fn wants_gradient(&self) -> bool {
        self.batch.gradient && self.sample().gates.is_some()
    }

    /// A gate was open the last time, so one probably still is.
    fn is_likely_open(&self) -> bool {
        let gates = self.sample().gates.iter().flatten();
        self.wants_gradient() && gates.into_iter().any(|gate| gate.before != Before::Closed)
    }
}

/// Evaluates batches that ask for the same concepts with as many crops, `most` images in one pass of
/// the scorer. Between passes a batch is left for which `abandoned` holds.
///
/// Images that had a gate open go first, in passes that are ready for a gradient. The others are
/// scored without; those whose gate has just opened then pass once more.
pub(crate) fn evaluate(
    scorer: &dyn Scorer,
    batches: &[&Batch],
    most: usize,
    abandoned: impl Fn(usize) -> bool,
) -> Vec<Outcome> {
    let images = batches
        .iter()
        .enumerate()
        .flat_map(|(of, batch)| (0..batch.samples.len()).map(move |at| Image { batch, of, at }));
    let (likely, others): (Vec<_>, Vec<_>) = images.partition(Image::is_likely_open);
    let mut together = Together {
        scorer,
        most,
        abandoned: &abandoned,
        outcomes: batches
            .iter()
            .map(|batch| Ok(Some(vec![Evaluation::default(); batch.samples.len()])))
            .collect(),
    };
    together.passes(&likely, true);
    // A single image records its pass: going on from there costs less than a second pass.
    let opened = together.passes(&others, most == 1 || others.len() == 1);
    together.passes(&opened, true);
    for (batch, outcome) in batches.iter().zip(&together.outcomes) {
        let evaluations = outcome.iter().flatten().flatten().filter(|_| batch.gradient);
        for (concept, scored) in evaluations.flat_map(|e| batch.concepts.iter().zip(&e.concepts)) {
            if scored.open {
                metrics::opened(&concept.name);
            }
        }
    }
    together.outcomes
}

/// Batches on their way.
struct Together<'a> {
    scorer: &'a dyn Scorer,
    most: usize,
    abandoned: &'a dyn Fn(usize) -> bool,
    outcomes: Vec<Outcome>,
}

impl Together<'_> {
    /// Evaluates `images` in passes; returns those that lack the gradient they want.
    fn passes<'b>(&mut self, images: &[Image<'b>], recording: bool) -> Vec<Image<'b>> {
        let mut left = images.to_vec();
        let mut lacking = Vec::new();
        while !left.is_empty() {
            for of in left.iter().map(|image| image.of).collect::<BTreeSet<_>>() {
                if (self.abandoned)(of) && self.outcomes[of].is_ok() {
                    self.outcomes[of] = Ok(None);
                }
            }
            // An image whose batch has come to nothing is not computed.
            left.retain(|image| matches!(self.outcomes[image.of], Ok(Some(_))));
            let rest = left.split_off(self.most.min(left.len()));
            for (image, result) in left.iter().zip(self.pass(&left, recording)) {
                match result {
                    Ok(evaluation) => {
                        if evaluation.gradient.is_none()
                            && image.wants_gradient()
                            && evaluation.is_open()
                        {
                            lacking.push(*image);
                        }
                        if let Ok(Some(evaluations)) = &mut self.outcomes[image.of] {
                            evaluations[image.at] = evaluation;
                        }
                    }
                    Err(error) => self.outcomes[image.of] = Err(error),
                }
            }
            left = rest;
        }
        lacking
    }

    /// One pass; if it fails as a whole, each image by itself, so that only the one that made it fail
    /// is to blame.
    fn pass(&self, images: &[Image<'_>], recording: bool) -> Vec<Result<Evaluation, RequestError>> {
        match pass(self.scorer, images, recording) {
            Ok(results) => results,
            Err(error) if images.len() == 1 => vec![Err(error)],
            Err(_) => {
                let single = |image| {
                    let alone = pass(self.scorer, std::slice::from_ref(image), recording);
                    alone.and_then(|mut results| results.remove(0))
                };
                images.iter().map(single).collect()
            }
        }
    }
}

/// One pass of the scorer over the crops of `images`, backward as well if it is `recording` and a
/// gate is open.
fn pass(
    scorer: &dyn Scorer,
    images: &[Image<'_>],
    recording: bool,
) -> Result<Vec<Result<Evaluation, RequestError>>, RequestError> {
    let Some(Image { batch: first, .. }) = images.first() else { return Ok(Vec::new()) };
    let ScorerDescription { height, width, steepness, .. } = *scorer.describe();
    let size = 3 * height * width;
    let mut windows = Vec::with_capacity(images.len());
    let mut views = Vec::with_capacity(images.len());
    for image in images {
        let pixels = &image.batch.pixels[image.at * size..][..size];
        let pixels = Tensor::from_slice(pixels, (1, 3, height, width), scorer.device())
            .map_err(ScorerError::from)?;
        windows.push(crops::windows(image.sample().crop_seed, first.crops, height, width));
        views.push(crops::cut(&pixels, &windows[windows.len() - 1])?);
    }
    let views = Tensor::cat(&views, 0).map_err(ScorerError::from)?;
    let (crops, concepts) = (first.crops as usize, first.concepts.len());
    let indices = first.concepts.iter().map(|concept| concept.index).collect::<Vec<_>>();
    let recording = recording && images.iter().any(Image::wants_gradient);
    let pass = scorer.forward(&views, &indices, recording)?;
    let scores = pass.scores();
    if scores.len() != images.len() * crops * concepts {
        let (got, expected) = (vec![scores.len()], vec![images.len() * crops * concepts]);
        return Err(ScorerError::Shape { what: "scores", got, expected }.into());
    }
    let judged = images.iter().zip(scores.chunks_exact(crops * concepts));
    let judged: Vec<_> = judged.map(|(image, scores)| judge(image, scores, steepness)).collect();
    let pushed = |judged: &Result<Judged, RequestError>, image: &Image<'_>| {
        image.wants_gradient() && judged.as_ref().is_ok_and(|judged| judged.evaluation.is_open())
    };
    let mut gradients = None;
    if recording && judged.iter().zip(images).any(|(judged, image)| pushed(judged, image)) {
        // Images that are not pushed take part with slopes of zero.
        let slopes = judged.iter().zip(images).flat_map(|(judged, image)| match judged {
            Ok(it) if pushed(judged, image) => it.on_scores(crops),
            _ => vec![0.0; crops * concepts],
        });
        let on_crops = pass.backward(&slopes.collect::<Vec<_>>())?;
        expect_shape("gradient", &on_crops, &[images.len() * crops, 3, height, width])?;
        gradients = Some(on_crops);
    }
    let finished = judged.into_iter().zip(images).zip(&windows).enumerate();
    let finish = |(i, ((judged, image), windows)): (usize, ((_, &Image<'_>), &Vec<Window>))| {
        let pushed = pushed(&judged, image);
        let mut evaluation = judged?.evaluation;
        if let Some(gradients) = gradients.as_ref().filter(|_| pushed) {
            let mine = gradients.narrow(0, i * crops, crops).map_err(ScorerError::from)?;
            let gradient = crops::cut_backward(&mine, windows)?;
            let gradient = gradient.flatten_all().and_then(|g| g.to_vec1());
            let gradient = gradient.map_err(ScorerError::from)?;
            check_gradient(&gradient, image.at, &evaluation.concepts, &image.batch.concepts)?;
            evaluation.gradient = Some(gradient);
        }
        Ok(evaluation)
    };
    Ok(finished.map(finish).collect())
}

/// What an image's scores say.
struct Judged {
    /// Without a gradient.
    evaluation: Evaluation,
    /// dE/dscore per concept; 0 where the gate is closed.
    slopes: Vec<f32>,
    /// Shares `[concepts][crops]` of the crops in each score.
    shares: Vec<Vec<f32>>,
}

impl Judged {
    /// dE/dscore of each crop, `[crops, concepts]`.
    fn on_scores(&self, crops: usize) -> Vec<f32> {
        let of_crop = |crop: usize| {
            self.slopes.iter().zip(&self.shares).map(move |(slope, share)| slope * share[crop])
        };
        (0..crops).flat_map(of_crop).collect()
    }
}

fn judge(image: &Image<'_>, scores: &[f32], steepness: f32) -> Result<Judged, RequestError> {
    let concepts = &image.batch.concepts;
    let (scores, shares) = combined_scores(scores, concepts, steepness)?;
    let Some(gates) = &image.sample().gates else {
        let raw = |score| Scored { score, z: 0.0, gate: 0.0, open: false };
        let evaluation =
            Evaluation { concepts: scores.into_iter().map(raw).collect(), ..Evaluation::default() };
        return Ok(Judged { evaluation, slopes: Vec::new(), shares });
    };
    let Verdict { concepts, slopes, energy, amplitude } =
        verdict(&scores, gates, concepts, steepness);
    let evaluation = Evaluation { concepts, energy, amplitude, gradient: None };
    Ok(Judged { evaluation, slopes, shares })
}

/// The scores of one image, all finite, and for each concept their derivatives by its crops'
/// scores, from those scores `[crops, concepts]`.
fn combined_scores(
    scores: &[f32],
    concepts: &[AskedConcept],
    steepness: f32,
) -> Result<(Vec<f32>, Vec<Vec<f32>>), RequestError> {
    let combined = |k: usize| {
        let of_crops = scores.iter().skip(k).step_by(concepts.len()).copied();
        crops::combine(&of_crops.collect::<Vec<_>>(), steepness)
    };
    let (scores, shares): (Vec<_>, Vec<_>) = (0..concepts.len()).map(combined).unzip();
    let broken = concepts.iter().zip(&scores).filter(|(_, score)| !score.is_finite());
    let names = broken.map(|(concept, _)| concept.name.as_str()).collect::<Vec<_>>();
    if names.is_empty() {
        Ok((scores, shares))
    } else {
        Err(RequestError::Score { concepts: names.join(", ") })
    }
}

struct Verdict {
    concepts: Vec<Scored>,
    /// dE/dscore per concept; 0 where the gate is closed.
    slopes: Vec<f32>,
    energy: f32,
    amplitude: f32,
}

fn verdict(scores: &[f32], gates: &[Gate], concepts: &[AskedConcept], steepness: f32) -> Verdict {
    let mut verdict = Verdict {
        concepts: Vec::with_capacity(scores.len()),
        slopes: vec![0.0; scores.len()],
        energy: 0.0,
        amplitude: 0.0,
    };
    for (k, (&score, Gate { level, before })) in scores.iter().zip(gates).enumerate() {
        let z = level.z(score);
        let open = level.is_open(z, *before);
        if open {
            let (tau, weight) = (level.tau(*before), concepts[k].weight);
            verdict.energy += weight * gate::energy(score, tau, steepness);
            verdict.slopes[k] = weight * gate::energy_slope(score, tau, steepness);
            verdict.amplitude = verdict.amplitude.max(level.amplitude(z, *before));
        }
        verdict.concepts.push(Scored { score, z, gate: level.gate, open });
    }
    verdict
}

fn expect_shape(what: &'static str, got: &Tensor, expected: &[usize]) -> Result<(), ScorerError> {
    if got.dims() == expected {
        return Ok(());
    }
    Err(ScorerError::Shape { what, got: got.dims().to_vec(), expected: expected.to_vec() })
}

/// A gradient with no greater value than this says nothing: what normalises it guards against a
/// division by zero with a larger number.
const LEAST_GRADIENT: f32 = 1e-10;

/// A gradient under an open gate must be there, finite and not all zero: anything else would leave
/// the image unsteered in silence.
pub(crate) fn check_gradient(
    gradient: &[f32],
    image: usize,
    verdicts: &[Scored],
    concepts: &[AskedConcept],
) -> Result<(), RequestError> {
    let what = if gradient.iter().any(|value| !value.is_finite()) {
        "not finite"
    } else if gradient.iter().all(|value| value.abs() < LEAST_GRADIENT) {
        "all zero"
    } else {
        return Ok(());
    };
    let open = concepts.iter().zip(verdicts).filter(|(_, verdict)| verdict.open);
    let names = open.map(|(concept, _)| concept.name.as_str()).collect::<Vec<_>>().join(", ");
    Err(RequestError::Gradient { image, what, concepts: names })
}

#[cfg(test)]
mod tests;
