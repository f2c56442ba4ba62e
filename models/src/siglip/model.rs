//! Both towers of SigLIP and the space they share.

use candle_core::{Device, Tensor};

use super::config::SiglipConfig;
use super::text::TextTower;
use super::vision::VisionTower;
use crate::tower::{ImagePreprocess, PixelNorm, unit, unit_backward};
use crate::{ModelFolder, Result, Tape, weights};

/// transformers' `SiglipModel`. Images come as RGB in 0..1 and are normalised here; the gradient goes back
/// to those same pixels.
#[derive(Debug)]
pub struct SiglipModel {
    config: SiglipConfig,
    pixels: PixelNorm,
    text: TextTower,
    vision: VisionTower,
    logit_scale: f32,
    logit_bias: f32,
}

impl SiglipModel {
    /// Reads a transformers folder: `config.json`, `model.safetensors` (or its shards) and
    /// `preprocessor_config.json`.
    ///
    /// # Errors
    /// When a file is missing or malformed, a setting is not supported, or the weights do not fit it.
    pub fn load(dir: impl Into<ModelFolder>, device: &Device) -> Result<Self> {
        let folder = dir.into();
        let config = SiglipConfig::read(&folder.file("config.json"))?;
        let preprocess = ImagePreprocess::read(&folder, config.image_size, &ImagePreprocess::HALF)?;
        let pixels = PixelNorm::new(preprocess, config.image_size, device)?;
        weights::load(&folder, "model", device, |root| {
            let scalar = |name| Ok::<f32, crate::Error>(root.tensor(name, &[1])?.to_vec1()?[0]);
            Ok(Self {
                text: TextTower::new(&root.at("text_model"), &config)?,
                vision: VisionTower::new(&root.at("vision_model"), &config)?,
                logit_scale: scalar("logit_scale")?.exp(),
                logit_bias: scalar("logit_bias")?,
                config,
                pixels,
            })
        })
    }

    /// What `config.json` says.
    pub fn config(&self) -> &SiglipConfig {
        &self.config
    }

    /// What `preprocessor_config.json` says.
    pub fn preprocess(&self) -> &ImagePreprocess {
        self.pixels.preprocess()
    }

    /// Scale and bias of the pair probability `sigmoid(scale cos + bias)` that the model was trained with.
    pub fn logit(&self) -> (f32, f32) {
        (self.logit_scale, self.logit_bias)
    }

    /// Unit vectors `[b, projection_dim]` of `b` windows of token ids, filled up to the model's length.
    ///
    /// # Errors
    /// When there is no window, the windows differ in length or are longer than the model's positions, or an
    /// id is outside the vocabulary.
    pub fn text_features(&self, ids: &[Vec<u32>]) -> Result<Tensor> {
        unit(&self.text.forward(ids)?, &mut Tape::off())
    }

    /// Unit vectors `[b, projection_dim]` of images `[b, 3, image_size, image_size]`, RGB in 0..1.
    ///
    /// # Errors
    /// When the images have another shape.
    pub fn image_features(&self, pixels: &Tensor, tape: &mut Tape) -> Result<Tensor> {
        let pixels = self.pixels.forward("SiglipModel::image_features", pixels)?;
        unit(&self.vision.forward(&pixels, tape)?, tape)
    }

    /// The gradient with respect to the pixels given to [`SiglipModel::image_features`], from the gradient
    /// with respect to its unit vectors `[b, projection_dim]`.
    ///
    /// # Errors
    /// When the tape is empty or `dfeatures` has another shape.
    pub fn image_features_backward(&self, dfeatures: &Tensor, tape: &mut Tape) -> Result<Tensor> {
        let d = self.vision.backward(&unit_backward(dfeatures, tape)?, tape)?;
        self.pixels.backward(&d)
    }
}
