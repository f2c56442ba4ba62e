//! Attention over the pixels of a feature map and from them to the text (`Transformer2DModel`).

use candle_core::Tensor;

use super::config::UNetLevel;
use crate::attend::{MultiHeadAttention, to_image, to_tokens};
use crate::layers::{Activation, GroupNorm, LayerNorm, Linear, add};
use crate::weights::Scope;
use crate::{Result, Tape};

/// Epsilon of the group norm before the projection; diffusers does not make it a setting.
const GROUP_EPS: f64 = 1e-6;
/// Epsilon of the layer norms.
const LAYER_EPS: f64 = 1e-5;

/// `x + proj_out(blocks(proj_in(group_norm(x))))` on `[b, c, h, w]`.
#[derive(Debug)]
pub(super) struct Transformer {
    norm: GroupNorm,
    proj_in: Linear,
    blocks: Vec<Block>,
    proj_out: Linear,
}

impl Transformer {
    /// `linear` says how the projections are stored; a 1 x 1 convolution is the same linear map.
    pub(super) fn new(
        scope: &Scope<'_>,
        level: &UNetLevel,
        groups: usize,
        linear: bool,
    ) -> Result<Self> {
        let width = level.channels;
        let projection = |name: &str| {
            if linear {
                return scope.linear(name, width, width);
            }
            let projection = scope.at(name);
            let weight = projection.tensor("weight", &[width, width, 1, 1])?;
            let bias = projection.tensor("bias", &[width])?;
            Linear::new(weight.reshape((width, width))?, Some(bias))
        };
        let block = |i| Block::new(&scope.at("transformer_blocks").at(i), level);
        Ok(Self {
            norm: scope.group_norm("norm", width, groups, GROUP_EPS)?,
            proj_in: projection("proj_in")?,
            blocks: (0..level.transformer_layers).map(block).collect::<Result<_>>()?,
            proj_out: projection("proj_out")?,
        })
    }

    /// `context` is the text, `[b, n, cross_attention_dim]`.
    pub(super) fn forward(&self, x: &Tensor, context: &Tensor, tape: &mut Tape) -> Result<Tensor> {
        let y = self.proj_in.forward(&to_tokens(&self.norm.forward(x, tape)?)?, tape)?;
        let y = self.blocks.iter().try_fold(y, |y, block| block.forward(&y, context, tape))?;
        let y = self.proj_out.forward(&y, tape)?;
        add(x, &to_image(&y, x.shape())?)
    }

    /// The gradient with respect to `x`. The text is a constant.
    pub(super) fn backward(&self, dy: &Tensor, tape: &mut Tape) -> Result<Tensor> {
        let d = self.proj_out.backward(&to_tokens(dy)?, tape)?;
        let d = self.blocks.iter().rev().try_fold(d, |d, block| block.backward(&d, tape))?;
        let d = self.proj_in.backward(&d, tape)?;
        add(dy, &self.norm.backward(&to_image(&d, dy.shape())?, tape)?)
    }
}

/// Self-attention, attention to the text, feed-forward; each after a norm and added to its input.
#[derive(Debug)]
struct Block {
    norm1: LayerNorm,
    to_self: MultiHeadAttention,
    norm2: LayerNorm,
    to_text: MultiHeadAttention,
    norm3: LayerNorm,
    feed_forward: GegluFeedForward,
}

impl Block {
    fn new(scope: &Scope<'_>, level: &UNetLevel) -> Result<Self> {
        let (width, heads) = (level.channels, level.heads);
        let text = level.cross_attention_dim;
        Ok(Self {
            norm1: scope.layer_norm("norm1", width, LAYER_EPS)?,
            to_self: attention(&scope.at("attn1"), width, width, heads)?,
            norm2: scope.layer_norm("norm2", width, LAYER_EPS)?,
            to_text: attention(&scope.at("attn2"), width, text, heads)?,
            norm3: scope.layer_norm("norm3", width, LAYER_EPS)?,
            feed_forward: GegluFeedForward::new(&scope.at("ff").at("net"), width)?,
        })
    }

    fn forward(&self, x: &Tensor, context: &Tensor, tape: &mut Tape) -> Result<Tensor> {
        let y = self.norm1.forward(x, tape)?;
        let x = add(x, &self.to_self.forward(&y, tape)?)?;
        let y = self.norm2.forward(&x, tape)?;
        let x = add(&x, &self.to_text.forward_to(&y, context, tape)?)?;
        let y = self.norm3.forward(&x, tape)?;
        add(&x, &self.feed_forward.forward(&y, tape)?)
    }

    fn backward(&self, dy: &Tensor, tape: &mut Tape) -> Result<Tensor> {
        let d = self.feed_forward.backward(dy, tape)?;
        let dx = add(dy, &self.norm3.backward(&d, tape)?)?;
        let d = self.to_text.backward_to(&dx, tape)?;
        let dx = add(&dx, &self.norm2.backward(&d, tape)?)?;
        let d = self.to_self.backward(&dx, tape)?;
        add(&dx, &self.norm1.backward(&d, tape)?)
    }
}

/// Attention of which only the output projection has a bias.
fn attention(
    scope: &Scope<'_>,
    width: usize,
    context: usize,
    heads: usize,
) -> Result<MultiHeadAttention> {
    let projections = [
        scope.projection("to_q", width, width)?,
        scope.projection("to_k", context, width)?,
        scope.projection("to_v", context, width)?,
        scope.linear("to_out.0", width, width)?,
    ];
    Ok(MultiHeadAttention::new(projections, heads, width))
}

/// `net.2(a gelu(g))` with `[a, g] = net.0.proj(x)`: four times as wide inside.
#[derive(Debug)]
struct GegluFeedForward {
    widen: Linear,
    narrow: Linear,
    inner: usize,
}

impl GegluFeedForward {
    fn new(scope: &Scope<'_>, width: usize) -> Result<Self> {
        let inner = 4 * width;
        Ok(Self {
            widen: scope.linear("0.proj", width, 2 * inner)?,
            narrow: scope.linear("2", inner, width)?,
            inner,
        })
    }

    fn forward(&self, x: &Tensor, tape: &mut Tape) -> Result<Tensor> {
        let both = self.widen.forward(x, tape)?;
        let value = both.narrow(2, 0, self.inner)?.contiguous()?;
        let gate = both.narrow(2, self.inner, self.inner)?.contiguous()?;
        let gate = Activation::GeluErf.forward(&gate, tape)?;
        tape.push(&value);
        tape.push(&gate);
        self.narrow.forward(&(value * gate)?, tape)
    }

    fn backward(&self, dy: &Tensor, tape: &mut Tape) -> Result<Tensor> {
        let d = self.narrow.backward(dy, tape)?;
        let (gate, value) = (tape.pop()?, tape.pop()?);
        let dgate = Activation::GeluErf.backward(&(&d * value)?, tape)?;
        let dvalue = (d * gate)?;
        self.widen.backward(&Tensor::cat(&[dvalue, dgate], 2)?, tape)
    }
}
