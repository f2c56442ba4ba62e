//! CLIP's image tower: a vision transformer over square patches and one class token.

use candle_core::{DType, Tensor};

use super::config::ClipVisionConfig;
use crate::layers::{Conv2d, Conv2dConfig, LayerNorm};
use crate::tower::Encoder;
use crate::weights::Scope;
use crate::{Result, Tape};

/// transformers' `CLIPVisionModel` up to its pooled output.
#[derive(Debug)]
pub(super) struct VisionTower {
    config: ClipVisionConfig,
    patches: Conv2d,
    class: Tensor,
    positions: Tensor,
    pre_norm: LayerNorm,
    encoder: Encoder,
    post_norm: LayerNorm,
}

impl VisionTower {
    pub(super) fn new(scope: &Scope<'_>, config: ClipVisionConfig) -> Result<Self> {
        let (width, patch, eps) = (config.hidden_size, config.patch_size, config.tower.eps);
        let embeddings = scope.at("embeddings");
        let tokens = config.grid() * config.grid() + 1;
        let kernel = embeddings.tensor("patch_embedding.weight", &[width, 3, patch, patch])?;
        Ok(Self {
            patches: Conv2d::new(kernel, None, Conv2dConfig::patches(patch))?,
            class: embeddings.tensor("class_embedding", &[width])?,
            positions: embeddings.tensor("position_embedding.weight", &[tokens, width])?,
            // The name is misspelt in every checkpoint.
            pre_norm: scope.layer_norm("pre_layrnorm", width, eps)?,
            encoder: Encoder::new(&scope.at("encoder"), &config.tower, false)?,
            post_norm: scope.layer_norm("post_layernorm", width, eps)?,
            config,
        })
    }

    /// Normalised pixels `[b, 3, s, s]` -> the class token after the last norm, `[b, width]`.
    pub(super) fn forward(&self, pixels: &Tensor, tape: &mut Tape) -> Result<Tensor> {
        let (b, width) = (pixels.dim(0)?, self.config.hidden_size);
        let patches = self.patches.forward(pixels, tape)?.flatten_from(2)?.transpose(1, 2)?;
        let class = self.class.broadcast_as((b, 1, width))?;
        let x = Tensor::cat(&[&class, &patches], 1)?.broadcast_add(&self.positions)?;
        let x = self.encoder.forward(&self.pre_norm.forward(&x, tape)?, tape)?;
        self.post_norm.forward(&x.narrow(1, 0, 1)?.contiguous()?.reshape((b, width))?, tape)
    }

    /// The gradient with respect to the normalised pixels, `[b, 3, s, s]`.
    pub(super) fn backward(&self, dy: &Tensor, tape: &mut Tape) -> Result<Tensor> {
        let d = self.post_norm.backward(dy, tape)?;
        let (b, width) = d.dims2()?;
        let grid = self.config.grid();
        let others = Tensor::zeros((b, grid * grid, width), DType::F32, d.device())?;
        let d = Tensor::cat(&[&d.unsqueeze(1)?, &others], 1)?;
        let d = self.pre_norm.backward(&self.encoder.backward(&d, tape)?, tape)?;
        let d = d.narrow(1, 1, grid * grid)?.transpose(1, 2)?.contiguous()?;
        self.patches.backward(&d.reshape((b, width, grid, grid))?, tape)
    }
}
