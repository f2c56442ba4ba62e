//! One evaluation, from pixels to scores, gates, energy and gradient.
//!
//! Each image is one pass of the scorer over its own crops: the arithmetic of an image has the same
//! shape whatever else is in the batch, so its numbers do not depend on it, and the backward pass
//! runs only for images with an open gate, once for all of their concepts.

use candle_core::Tensor;

use crate::{
    crops::{self, Window},
    error::RequestError,
    gate::{self, Before, Level},
    metrics,
    scorer::{Pass, Scorer, ScorerDescription, ScorerError},
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
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Evaluation {
    /// One per concept of the request.
    pub(crate) concepts: Vec<Scored>,
    pub(crate) energy: f32,
    pub(crate) amplitude: f32,
    /// dE/dpixels `[3, h, w]`: there exactly if a gate is open and a gradient was asked for.
    pub(crate) gradient: Option<Vec<f32>>,
}

/// Evaluates `batch`, image by image; none if `abandoned` says so before it is through.
pub(crate) fn evaluate(
    scorer: &dyn Scorer,
    batch: &Batch,
    abandoned: impl Fn() -> bool,
) -> Result<Option<Vec<Evaluation>>, RequestError> {
    let ScorerDescription { height, width, .. } = *scorer.describe();
    let mut evaluations = Vec::with_capacity(batch.samples.len());
    for (image, pixels) in batch.pixels.chunks_exact(3 * height * width).enumerate() {
        if abandoned() {
            return Ok(None);
        }
        let pixels = Tensor::from_slice(pixels, (1, 3, height, width), scorer.device())
            .map_err(ScorerError::from)?;
        evaluations.push(evaluate_image(scorer, batch, image, &pixels)?);
    }
    Ok(Some(evaluations))
}

fn evaluate_image(
    scorer: &dyn Scorer,
    batch: &Batch,
    image: usize,
    pixels: &Tensor,
) -> Result<Evaluation, RequestError> {
    let ScorerDescription { height, width, steepness, .. } = *scorer.describe();
    let sample = &batch.samples[image];
    let windows = crops::windows(sample.crop_seed, batch.crops, height, width);
    let views = crops::cut(pixels, &windows)?;
    let indices = batch.concepts.iter().map(|concept| concept.index).collect::<Vec<_>>();
    let wants_gradient = batch.gradient && sample.gates.is_some();
    let pass = scorer.forward(&views, &indices, wants_gradient)?;
    let (scores, shares) =
        combined_scores(pass.scores(), windows.len(), &batch.concepts, steepness)?;
    let Some(gates) = &sample.gates else {
        let raw = |score| Scored { score, z: 0.0, gate: 0.0, open: false };
        let concepts = scores.into_iter().map(raw).collect();
        return Ok(Evaluation { concepts, energy: 0.0, amplitude: 0.0, gradient: None });
    };
    let Verdict { concepts, slopes, energy, amplitude } =
        verdict(&scores, gates, &batch.concepts, steepness);
    let gradient = if batch.gradient && concepts.iter().any(|concept| concept.open) {
        let gradient = pixel_gradient(pass, &windows, &slopes, &shares, (height, width))?;
        check_gradient(&gradient, image, &concepts, &batch.concepts)?;
        Some(gradient)
    } else {
        None
    };
    Ok(Evaluation { concepts, energy, amplitude, gradient })
}

/// dE/dpixels `[3, h, w]` of one image, from dE/dscore per concept and the shares
/// `[concepts][crops]` of its crops in each score.
fn pixel_gradient(
    pass: Box<dyn Pass + '_>,
    windows: &[Window],
    slopes: &[f32],
    shares: &[Vec<f32>],
    (height, width): (usize, usize),
) -> Result<Vec<f32>, ScorerError> {
    let of_crop =
        |crop: usize| slopes.iter().zip(shares).map(move |(slope, share)| slope * share[crop]);
    let on_scores = (0..windows.len()).flat_map(of_crop).collect::<Vec<_>>();
    let on_crops = pass.backward(&on_scores)?;
    expect_shape("gradient", &on_crops, &[windows.len(), 3, height, width])?;
    Ok(crops::cut_backward(&on_crops, windows)?.flatten_all()?.to_vec1()?)
}

/// The scores of one image, all finite, and for each concept their derivatives by its crops'
/// scores, from those scores `[crops, concepts]`.
fn combined_scores(
    scores: &[f32],
    crops: usize,
    concepts: &[AskedConcept],
    steepness: f32,
) -> Result<(Vec<f32>, Vec<Vec<f32>>), RequestError> {
    if scores.len() != crops * concepts.len() {
        let (got, expected) = (vec![scores.len()], vec![crops * concepts.len()]);
        return Err(ScorerError::Shape { what: "scores", got, expected }.into());
    }
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
            metrics::opened(&concepts[k].name);
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
