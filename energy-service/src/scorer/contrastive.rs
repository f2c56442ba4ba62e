//! The contrastive scorer: a CLIP or SigLIP model that compares an image with phrases.
//!
//! With `c_j = cos(image, text_j)` and K = 100,
//! `score_k = (LSE_{j in targets}(K c_j) - LSE_{j in anchors}(K c_j)) / K`, so
//! `d score_k / d image features = sum_j softmax_targets(K c)_j text_j - sum_j softmax_anchors(K c)_j text_j`:
//! the gradient of any sum of concepts is one vector per image, and one backward pass through the
//! image tower serves them all. Everything after the image features is done on the host, image by
//! image, so that no number depends on the batch.

use std::{collections::HashMap, path::Path};

use candle_core::{Device, Tensor};
use fairlead_models::{ContrastiveModel, DeviceName, Error, ModelFolder, Tape, load_contrastive};

use super::{Learned, Pass, Scorer, ScorerDescription, ScorerError};
use crate::concepts::{Concept, ConceptSet};

/// Sharpness K of the log-sum-exp over phrases.
const SHARPNESS: f32 = 100.0;

/// Steepness `K_s` of the energy of a cosine score.
const STEEPNESS: f32 = 50.0;

/// Phrases encoded in one go.
const TEXT_BATCH: usize = 32;

/// See the module.
pub(crate) struct Contrastive {
    model: Box<dyn ContrastiveModel>,
    device: Device,
    description: ScorerDescription,
    texts: Texts,
}

impl Contrastive {
    /// Loads the transformers model that `dir` stands for, see [`ModelFolder::find`], and encodes
    /// every phrase of `set` once.
    pub(crate) fn load(
        dir: &Path,
        device: DeviceName,
        set: &ConceptSet,
    ) -> Result<Self, ScorerError> {
        let device = device.open()?;
        let folder = ModelFolder::find(dir)?;
        let model = load_contrastive(&folder, &device)?;
        let mut texts = Texts::default();
        while texts.learn(set.concepts(), model.as_ref())? == Learned::Part {}
        let side = model.image_size();
        let description = ScorerDescription {
            kind: "contrastive",
            model_name: folder.name()?,
            model_hash: folder.hash()?,
            height: side,
            width: side,
            filter: model.filter(),
            steepness: STEEPNESS,
        };
        Ok(Self { model, device, description, texts })
    }
}

impl Scorer for Contrastive {
    fn describe(&self) -> &ScorerDescription {
        &self.description
    }

    fn learn(&mut self, set: &ConceptSet) -> Result<Learned, ScorerError> {
        self.texts.learn(set.concepts(), self.model.as_ref())
    }

    fn device(&self) -> &Device {
        &self.device
    }

    fn forward<'a>(
        &'a self,
        images: &Tensor,
        concepts: &[usize],
        gradient: bool,
    ) -> Result<Box<dyn Pass + 'a>, ScorerError> {
        let mut tape = if gradient { Tape::recording() } else { Tape::off() };
        let features = self.model.image_features(images, &mut tape)?.to_vec2::<f32>()?;
        let similarities = features.iter().map(|f| self.texts.similarities(f)).collect::<Vec<_>>();
        let scores = similarities
            .iter()
            .flat_map(|row| concepts.iter().map(|&k| self.texts.score(k, row)))
            .collect();
        let concepts = concepts.to_vec();
        Ok(Box::new(ContrastivePass { scorer: self, tape, similarities, concepts, scores }))
    }
}

struct ContrastivePass<'a> {
    scorer: &'a Contrastive,
    tape: Tape,
    /// `K c_j`, `[n][phrases]`.
    similarities: Vec<Vec<f32>>,
    concepts: Vec<usize>,
    scores: Vec<f32>,
}

impl Pass for ContrastivePass<'_> {
    fn scores(&self) -> &[f32] {
        &self.scores
    }

    fn backward(mut self: Box<Self>, slopes: &[f32]) -> Result<Tensor, ScorerError> {
        let Contrastive { model, device, texts, .. } = self.scorer;
        let gradient = self
            .similarities
            .iter()
            .zip(slopes.chunks_exact(self.concepts.len()))
            .flat_map(|(row, slopes)| texts.pull_back(&self.concepts, row, slopes))
            .collect::<Vec<_>>();
        let gradient = Tensor::from_vec(gradient, (self.similarities.len(), texts.width), device)?;
        Ok(model.image_features_backward(&gradient, &mut self.tape)?)
    }
}

/// Unit text features of all phrases, each phrase once, and which phrases make up each concept.
#[derive(Default)]
struct Texts {
    /// Where each phrase's features are.
    known: HashMap<String, usize>,
    /// `[phrases, width]`, row-major.
    features: Vec<f32>,
    width: usize,
    concepts: Vec<PhraseIndices>,
}

impl Texts {
    /// Encodes a batch of those phrases of further concepts that are not known yet; the concepts are known
    /// with the last.
    fn learn(
        &mut self,
        concepts: &[Concept],
        model: &dyn ContrastiveModel,
    ) -> Result<Learned, ScorerError> {
        let (phrases, indices) = new_phrases(&self.known, concepts);
        let ids = phrases
            .iter()
            .map(|(concept, phrase)| token_ids(model, concept, phrase))
            .collect::<Result<Vec<_>, _>>()?;
        let batch = &ids[..ids.len().min(TEXT_BATCH)];
        let features = if batch.is_empty() {
            Vec::new()
        } else {
            model.text_features(batch)?.to_vec2::<f32>()?
        };
        let broken = features.iter().position(|row| row.iter().any(|value| !value.is_finite()));
        if let Some(row) = broken {
            return Err(ScorerError::Features { phrase: phrases[row].1.to_owned() });
        }
        self.width = features.first().map_or(self.width, Vec::len);
        self.features.extend(features.concat());
        for (_, phrase) in &phrases[..batch.len()] {
            self.known.insert((*phrase).to_owned(), self.known.len());
        }
        if batch.len() < phrases.len() {
            return Ok(Learned::Part);
        }
        self.concepts.extend(indices);
        Ok(Learned::All)
    }

    fn row(&self, phrase: usize) -> &[f32] {
        &self.features[phrase * self.width..][..self.width]
    }

    /// `K c_j` for every phrase.
    fn similarities(&self, image: &[f32]) -> Vec<f32> {
        self.features
            .chunks_exact(self.width)
            .map(|text| SHARPNESS * text.iter().zip(image).map(|(a, b)| a * b).sum::<f32>())
            .collect()
    }

    fn score(&self, concept: usize, similarities: &[f32]) -> f32 {
        let PhraseIndices { targets, anchors } = &self.concepts[concept];
        let lse = |phrases: &[usize]| log_sum_exp(phrases.iter().map(|&j| similarities[j]));
        (lse(targets) - lse(anchors)) / SHARPNESS
    }

    /// `sum_k slope_k d score_k / d image features`. Phrases are summed in the order in which the concepts
    /// name them, so that no bit depends on what else a node has learned.
    fn pull_back(&self, concepts: &[usize], similarities: &[f32], slopes: &[f32]) -> Vec<f32> {
        let mut weights = vec![0f32; similarities.len()];
        let (mut is_named, mut named) = (vec![false; similarities.len()], Vec::new());
        for (&concept, &slope) in concepts.iter().zip(slopes) {
            let PhraseIndices { targets, anchors } = &self.concepts[concept];
            for (phrases, sign) in [(targets, slope), (anchors, -slope)] {
                let total = log_sum_exp(phrases.iter().map(|&j| similarities[j]));
                for &j in phrases {
                    weights[j] += sign * (similarities[j] - total).exp();
                    if !std::mem::replace(&mut is_named[j], true) {
                        named.push(j);
                    }
                }
            }
        }
        let mut gradient = vec![0f32; self.width];
        for (j, weight) in named.into_iter().map(|j| (j, weights[j])) {
            for (sum, &text) in gradient.iter_mut().zip(self.row(j)) {
                *sum += weight * text;
            }
        }
        gradient
    }
}

/// Which phrases make up one concept, as indices into the list of all.
#[derive(Debug, Clone, PartialEq)]
struct PhraseIndices {
    targets: Vec<usize>,
    anchors: Vec<usize>,
}

/// Every phrase that is not `known` once, with the first concept that uses it, and the indices per concept.
fn new_phrases<'a>(
    known: &HashMap<String, usize>,
    concepts: &'a [Concept],
) -> (Vec<(&'a str, &'a str)>, Vec<PhraseIndices>) {
    let mut phrases = Vec::new();
    let mut new = HashMap::new();
    let indices = concepts
        .iter()
        .map(|concept| {
            let [targets, anchors] = [&concept.targets, &concept.anchors].map(|list| {
                let mut indices = Vec::with_capacity(list.len());
                for phrase in list {
                    let index = known.get(phrase).copied().unwrap_or_else(|| {
                        *new.entry(phrase.as_str()).or_insert_with(|| {
                            phrases.push((concept.name.as_str(), phrase.as_str()));
                            known.len() + phrases.len() - 1
                        })
                    });
                    indices.push(index);
                }
                indices
            });
            PhraseIndices { targets, anchors }
        })
        .collect();
    (phrases, indices)
}

/// Ids of a phrase that must fit the text model's window.
fn token_ids(
    model: &dyn ContrastiveModel,
    concept: &str,
    phrase: &str,
) -> Result<Vec<u32>, ScorerError> {
    model.encode(phrase).map_err(|error| match error {
        Error::TextTooLong { tokens, most } => ScorerError::Phrase {
            concept: concept.to_owned(),
            phrase: phrase.to_owned(),
            tokens,
            window: most,
        },
        other => other.into(),
    })
}

/// `ln sum exp`, shifted by the greatest value; of nothing it is negative infinity.
fn log_sum_exp(values: impl Iterator<Item = f32> + Clone) -> f32 {
    let greatest = values.clone().fold(f32::NEG_INFINITY, f32::max);
    greatest + values.map(|value| (value - greatest).exp()).sum::<f32>().ln()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::random::SplitMix64;

    fn unit(random: &mut SplitMix64, width: usize) -> Vec<f32> {
        let raw = (0..width).map(|_| random.unit() - 0.5).collect::<Vec<_>>();
        let norm = raw.iter().map(|v| v * v).sum::<f32>().sqrt();
        raw.iter().map(|v| v / norm).collect()
    }

    fn texts() -> Texts {
        let mut random = SplitMix64::new(3);
        let indices = |targets: &[usize], anchors: &[usize]| PhraseIndices {
            targets: targets.to_vec(),
            anchors: anchors.to_vec(),
        };
        Texts {
            known: HashMap::new(),
            features: (0..5).flat_map(|_| unit(&mut random, 16)).collect(),
            width: 16,
            concepts: vec![indices(&[0, 1], &[3, 4]), indices(&[2], &[3])],
        }
    }

    #[test]
    fn a_score_of_single_phrases_is_a_difference_of_cosines() {
        let texts = texts();
        let row = texts.similarities(texts.row(2));
        let cosine: f32 = texts.row(2).iter().zip(texts.row(3)).map(|(a, b)| a * b).sum();
        assert!((texts.score(1, &row) - (1.0 - cosine)).abs() < 1e-5);
    }

    #[test]
    fn the_pulled_back_gradient_agrees_with_finite_differences() {
        let texts = texts();
        let mut random = SplitMix64::new(8);
        let (image, direction) = (unit(&mut random, 16), unit(&mut random, 16));
        let slopes = [0.7, -0.2];
        let at = |step: f32| {
            let moved = image.iter().zip(&direction).map(|(x, d)| x + step * d).collect::<Vec<_>>();
            let row = texts.similarities(&moved);
            (0..2).map(|k| f64::from(slopes[k] * texts.score(k, &row))).sum::<f64>()
        };
        let numeric = (at(2e-3) - at(-2e-3)) / 4e-3;
        let row = texts.similarities(&image);
        let gradient = texts.pull_back(&[0, 1], &row, &slopes);
        let analytic: f64 = gradient.iter().zip(&direction).map(|(g, d)| f64::from(g * d)).sum();
        assert!(
            (numeric - analytic).abs() < 2e-3 * analytic.abs().max(0.1),
            "{numeric} {analytic}"
        );
    }

    #[test]
    fn log_sum_exp_survives_large_values() {
        assert!((log_sum_exp([1000.0, 1000.0].into_iter()) - (1000.0 + 2f32.ln())).abs() < 1e-3);
        assert!((log_sum_exp([-1000.0, 3.0].into_iter()) - 3.0).abs() < 1e-6);
    }

    #[test]
    fn each_phrase_is_encoded_once() {
        let concept = |name: &str, targets: &[&str]| Concept {
            name: name.into(),
            group: "g".into(),
            targets: targets.iter().map(|&t| t.into()).collect(),
            anchors: vec!["nothing".into()],
            weight: 1.0,
            fallback_threshold: None,
        };
        let concepts = [concept("a", &["x", "y"]), concept("b", &["y"])];
        let (phrases, indices) = new_phrases(&HashMap::new(), &concepts);
        assert_eq!(phrases, [("a", "x"), ("a", "y"), ("a", "nothing")]);
        assert_eq!(indices[1], PhraseIndices { targets: vec![1], anchors: vec![2] });
        let known = HashMap::from([("y".to_owned(), 0), ("z".to_owned(), 1)]);
        let (phrases, indices) = new_phrases(&known, &concepts);
        assert_eq!(phrases, [("a", "x"), ("a", "nothing")]);
        assert_eq!(indices[0], PhraseIndices { targets: vec![2, 0], anchors: vec![3] });
    }
}
