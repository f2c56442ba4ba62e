//! SigLIP's text tower.

use candle_core::Tensor;

use super::config::SiglipConfig;
use crate::layers::{LayerNorm, Linear};
use crate::tower::{Encoder, TokenEmbedding};
use crate::weights::Scope;
use crate::{Result, Tape};

/// transformers' `SiglipTextModel` up to its pooled output: every token sees every other, padding too,
/// and the last one stands for the text.
#[derive(Debug)]
pub(super) struct TextTower {
    embedding: TokenEmbedding,
    encoder: Encoder,
    final_norm: LayerNorm,
    head: Linear,
}

impl TextTower {
    pub(super) fn new(scope: &Scope<'_>, config: &SiglipConfig) -> Result<Self> {
        let (width, tower) = (config.text.width, &config.text);
        let sizes = [config.vocab_size, config.max_position_embeddings, width];
        Ok(Self {
            embedding: TokenEmbedding::new(&scope.at("embeddings"), sizes)?,
            encoder: Encoder::new(&scope.at("encoder"), tower, false)?,
            final_norm: scope.layer_norm("final_layer_norm", width, tower.eps)?,
            head: scope.linear("head", width, config.projection_dim)?,
        })
    }

    /// `[b, projection_dim]` of `b` windows.
    pub(super) fn forward(&self, ids: &[Vec<u32>]) -> Result<Tensor> {
        let tape = &mut Tape::off();
        let x = self.encoder.forward(&self.embedding.forward("SigLIP text model", ids)?, tape)?;
        let (b, n, width) = x.dims3()?;
        let last = x.narrow(1, n - 1, 1)?.contiguous()?.reshape((b, width))?;
        self.head.forward(&self.final_norm.forward(&last, tape)?, tape)
    }
}
