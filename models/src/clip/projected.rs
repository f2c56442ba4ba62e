//! CLIP's text tower with its projection, as Stable Diffusion XL and 3 use it.

use candle_core::{Device, Tensor};

use super::config::ClipTextConfig;
use super::text::ClipTextModel;
use crate::layers::Linear;
use crate::{ModelFolder, Result, Tape, weights};

/// transformers' `CLIPTextModelWithProjection`.
#[derive(Debug)]
pub struct ClipTextModelWithProjection {
    text: ClipTextModel,
    projection: Linear,
    projection_dim: usize,
}

/// What [`ClipTextModelWithProjection`] makes of `b` windows of `n` tokens.
#[derive(Debug, Clone)]
pub struct ProjectedText {
    /// The hidden states before the last block, without the final norm: `[b, n, hidden_size]`.
    pub penultimate: Tensor,
    /// The projection of the last state at the end mark: `[b, projection_dim]`.
    pub embeds: Tensor,
}

impl ClipTextModelWithProjection {
    /// Reads a transformers folder: `config.json` and `model.safetensors` (or its shards).
    ///
    /// # Errors
    /// When a file is missing or malformed, a setting is not supported, or the weights do not fit it.
    pub fn load(dir: impl Into<ModelFolder>, device: &Device) -> Result<Self> {
        let folder = dir.into();
        let path = folder.file("config.json");
        let (config, projection_dim) = ClipTextConfig::read_with_projection(&path)?;
        weights::load(&folder, "model", device, |root| {
            let width = config.hidden_size;
            Ok(Self {
                text: ClipTextModel::new(&root.at("text_model"), config)?,
                projection: root.projection("text_projection", width, projection_dim)?,
                projection_dim,
            })
        })
    }

    /// What `config.json` says of the tower.
    pub fn config(&self) -> &ClipTextConfig {
        self.text.config()
    }

    /// Width of [`ProjectedText::embeds`].
    pub fn projection_dim(&self) -> usize {
        self.projection_dim
    }

    /// States and projection of `b` windows of token ids.
    ///
    /// # Errors
    /// As [`ClipTextModel::forward`], and when a window has no end mark.
    pub fn forward(&self, ids: &[Vec<u32>]) -> Result<ProjectedText> {
        let (penultimate, last) = self.text.last_two(ids)?;
        let pooled = self.text.pool(&last, ids)?;
        Ok(ProjectedText {
            penultimate,
            embeds: self.projection.forward(&pooled, &mut Tape::off())?,
        })
    }
}
