//! SigLIP's image tower: a vision transformer over square patches, pooled by attention.

use candle_core::Tensor;

use super::config::SiglipConfig;
use crate::attend::MultiHeadAttention;
use crate::layers::{Conv2d, Conv2dConfig, LayerNorm, Linear, add};
use crate::tower::{Encoder, Perceptron};
use crate::weights::Scope;
use crate::{Result, Tape};

/// transformers' `SiglipVisionModel` up to its pooled output.
#[derive(Debug)]
pub(super) struct VisionTower {
    width: usize,
    grid: usize,
    patches: Conv2d,
    positions: Tensor,
    encoder: Encoder,
    post_norm: LayerNorm,
    head: AttentionPool,
}

impl VisionTower {
    pub(super) fn new(scope: &Scope<'_>, config: &SiglipConfig) -> Result<Self> {
        let (width, patch, grid) = (config.vision.width, config.patch_size, config.grid());
        let embeddings = scope.at("embeddings");
        let tower = &config.vision;
        Ok(Self {
            width,
            grid,
            patches: embeddings.conv(
                "patch_embedding",
                [3, width, patch],
                Conv2dConfig::patches(patch),
            )?,
            positions: embeddings.tensor("position_embedding.weight", &[grid * grid, width])?,
            encoder: Encoder::new(&scope.at("encoder"), tower, false)?,
            post_norm: scope.layer_norm("post_layernorm", width, tower.eps)?,
            head: AttentionPool::new(&scope.at("head"), config)?,
        })
    }

    /// Normalised pixels `[b, 3, s, s]` -> `[b, width]`.
    pub(super) fn forward(&self, pixels: &Tensor, tape: &mut Tape) -> Result<Tensor> {
        let x = self.patches.forward(pixels, tape)?.flatten_from(2)?.transpose(1, 2)?;
        let x = self.encoder.forward(&x.broadcast_add(&self.positions)?, tape)?;
        self.head.forward(&self.post_norm.forward(&x, tape)?, tape)
    }

    /// The gradient with respect to the normalised pixels, `[b, 3, s, s]`.
    pub(super) fn backward(&self, dy: &Tensor, tape: &mut Tape) -> Result<Tensor> {
        let d = self.post_norm.backward(&self.head.backward(dy, tape)?, tape)?;
        let d = self.encoder.backward(&d, tape)?.transpose(1, 2)?.contiguous()?;
        self.patches.backward(&d.reshape(((), self.width, self.grid, self.grid))?, tape)
    }
}

/// One learned query attends to all patches ("MAP head", Zhai et al. 2022), then `x + mlp(norm(x))`.
#[derive(Debug)]
struct AttentionPool {
    /// `[1, 1, width]`.
    probe: Tensor,
    attention: MultiHeadAttention,
    norm: LayerNorm,
    mlp: Perceptron,
}

impl AttentionPool {
    fn new(scope: &Scope<'_>, config: &SiglipConfig) -> Result<Self> {
        let (tower, width) = (&config.vision, config.vision.width);
        // torch's MultiheadAttention keeps the three projections in one matrix.
        let attention = scope.at("attention");
        let weight = attention.tensor("in_proj_weight", &[3 * width, width])?;
        let bias = attention.tensor("in_proj_bias", &[3 * width])?;
        let part = |i: usize| {
            let bias = bias.narrow(0, i * width, width)?.contiguous()?;
            Linear::new(weight.narrow(0, i * width, width)?.contiguous()?, Some(bias))
        };
        let output = attention.linear("out_proj", width, width)?;
        let projections = [part(0)?, part(1)?, part(2)?, output];
        Ok(Self {
            probe: scope.tensor("probe", &[1, 1, width])?,
            attention: MultiHeadAttention::new(projections, tower.heads, width),
            norm: scope.layer_norm("layernorm", width, tower.eps)?,
            mlp: Perceptron::new(&scope.at("mlp"), tower)?,
        })
    }

    /// `[b, n, width]` -> `[b, width]`.
    fn forward(&self, x: &Tensor, tape: &mut Tape) -> Result<Tensor> {
        let probe = self.probe.repeat((x.dim(0)?, 1, 1))?;
        let y = self.attention.forward_to(&probe, x, tape)?;
        let y = add(&y, &self.mlp.forward(&self.norm.forward(&y, tape)?, tape)?)?;
        Ok(y.squeeze(1)?)
    }

    fn backward(&self, dy: &Tensor, tape: &mut Tape) -> Result<Tensor> {
        let dy = dy.unsqueeze(1)?;
        let d = self.norm.backward(&self.mlp.backward(&dy, tape)?, tape)?;
        self.attention.backward_to_context(&add(&dy, &d)?, tape)
    }
}
