//! The transformer that both towers share: pre-norm, self-attention, two-layer perceptron.

use candle_core::Tensor;

use super::config::TowerConfig;
use crate::attend::MultiHeadAttention;
use crate::layers::{Activation, LayerNorm, Linear, add};
use crate::weights::Scope;
use crate::{Result, Tape};

/// `num_hidden_layers` blocks, `[b, n, width]` -> the same shape.
#[derive(Debug)]
pub(crate) struct Encoder {
    blocks: Vec<Block>,
}

impl Encoder {
    /// Builds the blocks from `layers.0`, `layers.1`, .. With `causal`, a token sees only itself and those before it.
    pub(crate) fn new(scope: &Scope<'_>, config: &TowerConfig, causal: bool) -> Result<Self> {
        let block = |i| Block::new(&scope.at("layers").at(i), config, causal);
        Ok(Self { blocks: (0..config.layers).map(block).collect::<Result<_>>()? })
    }

    pub(crate) fn forward(&self, x: &Tensor, tape: &mut Tape) -> Result<Tensor> {
        self.blocks.iter().try_fold(x.clone(), |x, block| block.forward(&x, tape))
    }

    /// What the last block gets and what it makes of it.
    pub(crate) fn last_two(&self, x: &Tensor, tape: &mut Tape) -> Result<(Tensor, Tensor)> {
        let Some((last, others)) = self.blocks.split_last() else {
            return Ok((x.clone(), x.clone()));
        };
        let x = others.iter().try_fold(x.clone(), |x, block| block.forward(&x, tape))?;
        let y = last.forward(&x, tape)?;
        Ok((x, y))
    }

    pub(crate) fn backward(&self, dy: &Tensor, tape: &mut Tape) -> Result<Tensor> {
        self.blocks.iter().rev().try_fold(dy.clone(), |dy, block| block.backward(&dy, tape))
    }
}

#[derive(Debug)]
struct Block {
    norm1: LayerNorm,
    attention: MultiHeadAttention,
    norm2: LayerNorm,
    mlp: Perceptron,
}

impl Block {
    fn new(scope: &Scope<'_>, config: &TowerConfig, causal: bool) -> Result<Self> {
        let &TowerConfig { width, heads, eps, .. } = config;
        let attn = scope.at("self_attn");
        let project = |name| attn.linear(name, width, width);
        let projections =
            [project("q_proj")?, project("k_proj")?, project("v_proj")?, project("out_proj")?];
        let attention = MultiHeadAttention::new(projections, heads, width);
        Ok(Self {
            norm1: scope.layer_norm("layer_norm1", width, eps)?,
            attention: if causal { attention.causal() } else { attention },
            norm2: scope.layer_norm("layer_norm2", width, eps)?,
            mlp: Perceptron::new(&scope.at("mlp"), config)?,
        })
    }

    fn forward(&self, x: &Tensor, tape: &mut Tape) -> Result<Tensor> {
        let y = self.norm1.forward(x, tape)?;
        let x = add(x, &self.attention.forward(&y, tape)?)?;
        let y = self.norm2.forward(&x, tape)?;
        add(&x, &self.mlp.forward(&y, tape)?)
    }

    fn backward(&self, dy: &Tensor, tape: &mut Tape) -> Result<Tensor> {
        let d = self.mlp.backward(dy, tape)?;
        let dx = add(dy, &self.norm2.backward(&d, tape)?)?;
        let d = self.attention.backward(&dx, tape)?;
        add(&dx, &self.norm1.backward(&d, tape)?)
    }
}

/// Two linear layers with an activation between.
#[derive(Debug)]
pub(crate) struct Perceptron {
    fc1: Linear,
    activation: Activation,
    fc2: Linear,
}

impl Perceptron {
    pub(crate) fn new(scope: &Scope<'_>, config: &TowerConfig) -> Result<Self> {
        let &TowerConfig { width, mlp_width, activation, .. } = config;
        let fc1 = scope.linear("fc1", width, mlp_width)?;
        Ok(Self { fc1, activation, fc2: scope.linear("fc2", mlp_width, width)? })
    }

    pub(crate) fn forward(&self, x: &Tensor, tape: &mut Tape) -> Result<Tensor> {
        let y = self.activation.forward(&self.fc1.forward(x, tape)?, tape)?;
        self.fc2.forward(&y, tape)
    }

    pub(crate) fn backward(&self, dy: &Tensor, tape: &mut Tape) -> Result<Tensor> {
        let d = self.activation.backward(&self.fc2.backward(dy, tape)?, tape)?;
        self.fc1.backward(&d, tape)
    }
}
