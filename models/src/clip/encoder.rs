//! The transformer that both towers share: pre-norm, self-attention, two-layer perceptron.

use candle_core::Tensor;

use super::config::TowerConfig;
use crate::attend::MultiHeadAttention;
use crate::layers::{Activation, LayerNorm, Linear, add};
use crate::weights::Scope;
use crate::{Result, Tape};

/// `num_hidden_layers` blocks, `[b, n, width]` -> the same shape.
#[derive(Debug)]
pub(super) struct Encoder {
    blocks: Vec<Block>,
}

impl Encoder {
    /// Builds the blocks from `layers.0`, `layers.1`, .. With `causal`, a token sees only itself and those before it.
    pub(super) fn new(scope: &Scope<'_>, config: &TowerConfig, causal: bool) -> Result<Self> {
        let block = |i| Block::new(&scope.at("layers").at(i), config, causal);
        Ok(Self { blocks: (0..config.layers).map(block).collect::<Result<_>>()? })
    }

    pub(super) fn forward(&self, x: &Tensor, tape: &mut Tape) -> Result<Tensor> {
        self.blocks.iter().try_fold(x.clone(), |x, block| block.forward(&x, tape))
    }

    pub(super) fn backward(&self, dy: &Tensor, tape: &mut Tape) -> Result<Tensor> {
        self.blocks.iter().rev().try_fold(dy.clone(), |dy, block| block.backward(&dy, tape))
    }
}

#[derive(Debug)]
struct Block {
    norm1: LayerNorm,
    attention: MultiHeadAttention,
    norm2: LayerNorm,
    fc1: Linear,
    activation: Activation,
    fc2: Linear,
}

impl Block {
    fn new(scope: &Scope<'_>, config: &TowerConfig, causal: bool) -> Result<Self> {
        let &TowerConfig { width, mlp_width, heads, activation, eps, .. } = config;
        let (attn, mlp) = (scope.at("self_attn"), scope.at("mlp"));
        let project = |name| attn.linear(name, width, width);
        let projections =
            [project("q_proj")?, project("k_proj")?, project("v_proj")?, project("out_proj")?];
        let attention = MultiHeadAttention::new(projections, heads, width);
        Ok(Self {
            norm1: scope.layer_norm("layer_norm1", width, eps)?,
            attention: if causal { attention.causal() } else { attention },
            norm2: scope.layer_norm("layer_norm2", width, eps)?,
            fc1: mlp.linear("fc1", width, mlp_width)?,
            activation,
            fc2: mlp.linear("fc2", mlp_width, width)?,
        })
    }

    fn forward(&self, x: &Tensor, tape: &mut Tape) -> Result<Tensor> {
        let y = self.norm1.forward(x, tape)?;
        let x = add(x, &self.attention.forward(&y, tape)?)?;
        let y = self.fc1.forward(&self.norm2.forward(&x, tape)?, tape)?;
        let y = self.fc2.forward(&self.activation.forward(&y, tape)?, tape)?;
        add(&x, &y)
    }

    fn backward(&self, dy: &Tensor, tape: &mut Tape) -> Result<Tensor> {
        let d = self.activation.backward(&self.fc2.backward(dy, tape)?, tape)?;
        let dx = add(dy, &self.norm2.backward(&self.fc1.backward(&d, tape)?, tape)?)?;
        let d = self.attention.backward(&dx, tape)?;
        add(&dx, &self.norm1.backward(&d, tape)?)
    }
}
