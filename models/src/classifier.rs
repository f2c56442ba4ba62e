//! Image classifiers of others, as ONNX exports: they judge pictures and never steer, so that a library
//! without gradients runs them.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use candle_core::{Device, Tensor};
use serde::Deserialize;
use sha2::{Digest, Sha256};
use tract_onnx::prelude::*;

use crate::layers::{Filter, resize};
use crate::{Error, Result};

type Plan = Arc<TypedSimplePlan>;

/// An ONNX export of a transformers `ForImageClassification` model: `model.onnx` (or `onnx/model.onnx`) with one input
/// `[b, 3, h, w]` and logits as its first output, beside `config.json` and `preprocessor_config.json`.
#[derive(Debug)]
pub struct OnnxClassifier {
    plan: Plan,
    labels: Vec<String>,
    hash: String,
    /// Probabilities are independent of each other (sigmoid), not shares of one (softmax).
    is_multi_label: bool,
    preprocess: Preprocess,
}

/// The part of `config.json` that says what the logits mean.
#[derive(Deserialize)]
struct Config {
    id2label: BTreeMap<usize, String>,
    problem_type: Option<String>,
}

/// `preprocessor_config.json`.
#[derive(Debug, Deserialize)]
struct Preprocess {
    size: Size,
    #[serde(default = "bilinear")]
    resample: u32,
    #[serde(default = "yes")]
    do_normalize: bool,
    #[serde(default = "yes")]
    do_resize: bool,
    #[serde(default)]
    do_center_crop: bool,
    #[serde(default = "yes")]
    do_rescale: bool,
    #[serde(default = "byte")]
    rescale_factor: f64,
    #[serde(default)]
    image_mean: Vec<f32>,
    #[serde(default)]
    image_std: Vec<f32>,
}

#[derive(Debug, Deserialize)]
#[serde(untagged)]
enum Size {
    Side(usize),
    Sides { height: usize, width: usize },
}

fn bilinear() -> u32 {
    2
}

fn yes() -> bool {
    true
}

fn byte() -> f64 {
    1.0 / 255.0
}

impl OnnxClassifier {
    /// Reads the folder.
    ///
    /// # Errors
    /// When a file is missing or malformed, or the network cannot be run.
    pub fn load(dir: &Path) -> Result<Self> {
        let candidates = [dir.join("model.onnx"), dir.join("onnx/model.onnx")];
        let Some(model) = candidates.iter().find(|path| path.is_file()) else {
            let hint = "give the folder of a transformers image classifier with its ONNX export";
            return Err(Error::MissingFile { path: candidates[0].clone(), hint: hint.into() });
        };
        let path = dir.join("config.json");
        let config: Config = read(&path)?;
        let labels: Vec<String> = config.id2label.values().cloned().collect();
        if labels.is_empty() || !config.id2label.keys().copied().eq(0..labels.len()) {
            return Err(Error::malformed(&path, "id2label must number the labels from 0 on"));
        }
        let path = dir.join("preprocessor_config.json");
        let preprocess: Preprocess = read(&path)?;
        preprocess.check().map_err(|what| Error::malformed(&path, what))?;
        let (height, width) = preprocess.sides();
        let plan = plan(model, height, width)
            .map_err(|error| Error::malformed(model, format!("it cannot be run: {error:#}")))?;
        let is_multi_label = config.problem_type.as_deref() == Some("multi_label_classification");
        let bytes = std::fs::read(model).map_err(|source| Error::unreadable(model, source))?;
        let hash = hex::encode(Sha256::digest(&bytes));
        Ok(Self { plan, labels, hash, is_multi_label, preprocess })
    }

    /// SHA-256 of `model.onnx`, in hex.
    pub fn hash(&self) -> &str {
        &self.hash
    }

    /// The labels, in the order of the probabilities.
    pub fn labels(&self) -> &[String] {
        &self.labels
    }

    /// The probability of each label for a picture of `width` x `height` pixels, RGB8 row by row.
    ///
    /// # Errors
    /// When the network fails, or its logits are not finite or not as many as the labels.
    pub fn probabilities(&self, rgb: &[u8], width: usize, height: usize) -> Result<Vec<f32>> {
        let pixels = self.preprocess.pixels(rgb, width, height)?;
        let logits = self
            .logits(pixels)
            .map_err(|error| Error::invalid("OnnxClassifier", format!("{error:#}")))?;
        if logits.len() != self.labels.len() || logits.iter().any(|logit| !logit.is_finite()) {
            let (found, labels) = (logits.len(), self.labels.len());
            let problem = format!("{found} logits for {labels} labels, or some are not finite");
            return Err(Error::invalid("OnnxClassifier", problem));
        }
        if self.is_multi_label {
            return Ok(logits.iter().map(|logit| 1.0 / (1.0 + (-logit).exp())).collect());
        }
        let greatest = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        let weights: Vec<f32> = logits.iter().map(|logit| (logit - greatest).exp()).collect();
        let sum: f32 = weights.iter().sum();
        Ok(weights.iter().map(|weight| weight / sum).collect())
    }

    fn logits(&self, pixels: Vec<f32>) -> TractResult<Vec<f32>> {
        let (height, width) = self.preprocess.sides();
        let pixels = tract_ndarray::Array4::from_shape_vec((1, 3, height, width), pixels)?;
        let outputs = self.plan.run(tvec!(pixels.into_tensor().into()))?;
        Ok(outputs[0].to_plain_array_view::<f32>()?.iter().copied().collect())
    }
}

fn read<T: for<'a> Deserialize<'a>>(path: &PathBuf) -> Result<T> {
    let text = std::fs::read_to_string(path).map_err(|source| Error::unreadable(path, source))?;
    serde_json::from_str(&text).map_err(|error| Error::malformed(path, error.to_string()))
}

fn plan(model: &Path, height: usize, width: usize) -> TractResult<Plan> {
    tract_onnx::onnx()
        .model_for_path(model)?
        .with_input_fact(0, f32::fact([1, 3, height, width]).into())?
        .into_optimized()?
        .into_runnable()
}

impl Preprocess {
    fn check(&self) -> std::result::Result<(), String> {
        for (name, values) in [("image_mean", &self.image_mean), ("image_std", &self.image_std)] {
            if self.do_normalize && values.len() != 3 {
                return Err(format!("{name} must have three numbers"));
            }
        }
        // What is not done here must not be wanted: a judge that sees other pixels judges wrongly.
        if !self.do_resize || self.do_center_crop {
            return Err(
                "do_resize must be true and do_center_crop false: pictures are resized whole"
                    .into(),
            );
        }
        if !self.do_rescale || (self.rescale_factor * 255.0 - 1.0).abs() > 1e-6 {
            return Err("rescale_factor must be 1/255, with do_rescale true".into());
        }
        if self.image_std.iter().any(|std| *std <= 0.0) {
            return Err("image_std must be above 0".into());
        }
        if !matches!(self.resample, 2 | 3) {
            return Err(format!(
                "resample is {}; supported are 2 (bilinear) and 3 (bicubic)",
                self.resample
            ));
        }
        match self.sides() {
            (0, _) | (_, 0) => Err("size must be above 0".into()),
            _ => Ok(()),
        }
    }

    fn sides(&self) -> (usize, usize) {
        match self.size {
            Size::Side(side) => (side, side),
            Size::Sides { height, width } => (height, width),
        }
    }

    /// Normalised pixels `[3, height, width]`.
    fn pixels(&self, rgb: &[u8], w: usize, h: usize) -> Result<Vec<f32>> {
        let values: Vec<f32> = rgb.iter().map(|&value| f32::from(value) / 255.0).collect();
        let pixels = Tensor::from_vec(values, (1, h, w, 3), &Device::Cpu)?;
        let mut pixels = pixels.permute((0, 3, 1, 2))?.contiguous()?;
        let (height, width) = self.sides();
        if (h, w) != (height, width) {
            let filter = match self.resample {
                3 => Filter::BicubicAntialias,
                _ => Filter::BilinearAntialias,
            };
            pixels = resize(&pixels, height, width, filter)?;
        }
        let mut values = pixels.flatten_all()?.to_vec1::<f32>()?;
        if self.do_normalize {
            let planes = values.chunks_exact_mut(height * width);
            for ((plane, mean), std) in planes.zip(&self.image_mean).zip(&self.image_std) {
                plane.iter_mut().for_each(|value| *value = (*value - mean) / std);
            }
        }
        Ok(values)
    }
}
