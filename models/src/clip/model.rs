//! Both towers of CLIP and the space they share.

use candle_core::{Device, Tensor};

use super::config::ClipConfig;
use super::open_clip;
use super::text::ClipTextModel;
use super::vision::VisionTower;
use crate::layers::Linear;
use crate::tower::{ImagePreprocess, PixelNorm, unit, unit_backward};
use crate::weights::{self, Scope};
use crate::{ModelFolder, Result, Tape};

/// transformers' `CLIPModel`. Images come as RGB in 0..1 and are normalised here; the gradient goes back to
/// those same pixels.
#[derive(Debug)]
pub struct ClipModel {
    config: ClipConfig,
    pixels: PixelNorm,
    text: ClipTextModel,
    vision: VisionTower,
    text_projection: Linear,
    visual_projection: Linear,
    logit_scale: f32,
}

impl ClipModel {
    /// Reads a transformers folder: `config.json`, `model.safetensors` (or its shards) and
    /// `preprocessor_config.json`; or one of open_clip: `open_clip_config.json` and
    /// `open_clip_model.safetensors`.
    ///
    /// # Errors
    /// When a file is missing or malformed, a setting is not supported, or the weights do not fit it.
    pub fn load(dir: impl Into<ModelFolder>, device: &Device) -> Result<Self> {
        let folder = dir.into();
        if open_clip::is_one(&folder) {
            return open_clip::load(&folder, device);
        }
        let config = ClipConfig::read(&folder.file("config.json"))?;
        let preprocess =
            ImagePreprocess::read(&folder, config.image_size, &ImagePreprocess::OPENAI)?;
        weights::load(&folder, "model", device, |root| {
            Self::build(root, config, preprocess, device)
        })
    }

    /// Builds the network from keys in transformers' names.
    pub(super) fn build(
        root: &Scope<'_>,
        config: ClipConfig,
        preprocess: ImagePreprocess,
        device: &Device,
    ) -> Result<Self> {
        let shared = config.projection_dim;
        let (text, vision) = (config.text.hidden_size, config.vision.hidden_size);
        Ok(Self {
            text: ClipTextModel::new(&root.at("text_model"), config.text.clone())?,
            vision: VisionTower::new(&root.at("vision_model"), config.vision.clone())?,
            text_projection: root.projection("text_projection", text, shared)?,
            visual_projection: root.projection("visual_projection", vision, shared)?,
            logit_scale: root.tensor("logit_scale", &[])?.to_scalar::<f32>()?.exp(),
            pixels: PixelNorm::new(preprocess, config.image_size, device)?,
            config,
        })
    }

    /// What `config.json` says.
    pub fn config(&self) -> &ClipConfig {
        &self.config
    }

    /// What `preprocessor_config.json` says.
    pub fn preprocess(&self) -> &ImagePreprocess {
        self.pixels.preprocess()
    }

    /// The factor on cosines that the model was trained with (100 for OpenAI's).
    pub fn logit_scale(&self) -> f32 {
        self.logit_scale
    }

    /// Unit vectors `[b, projection_dim]` of `b` windows of token ids.
    ///
    /// # Errors
    /// As [`ClipTextModel::forward`], and when a window has no end mark.
    pub fn text_features(&self, ids: &[Vec<u32>]) -> Result<Tensor> {
        let hidden = self.text.forward(ids)?;
        let pooled = self.text.pool(&hidden, ids)?;
        let mut tape = Tape::off();
        unit(&self.text_projection.forward(&pooled, &mut tape)?, &mut tape)
    }

    /// Unit vectors `[b, projection_dim]` of images `[b, 3, image_size, image_size]`, RGB in 0..1.
    ///
    /// # Errors
    /// When the images have another shape.
    pub fn image_features(&self, pixels: &Tensor, tape: &mut Tape) -> Result<Tensor> {
        let pixels = self.pixels.forward("ClipModel::image_features", pixels)?;
        let pooled = self.vision.forward(&pixels, tape)?;
        unit(&self.visual_projection.forward(&pooled, tape)?, tape)
    }

    /// The gradient with respect to the pixels given to [`ClipModel::image_features`], from the gradient with
    /// respect to its unit vectors `[b, projection_dim]`.
    ///
    /// # Errors
    /// When the tape is empty or `dfeatures` has another shape.
    pub fn image_features_backward(&self, dfeatures: &Tensor, tape: &mut Tape) -> Result<Tensor> {
        let d = self.visual_projection.backward(&unit_backward(dfeatures, tape)?, tape)?;
        self.pixels.backward(&self.vision.backward(&d, tape)?)
    }
}
