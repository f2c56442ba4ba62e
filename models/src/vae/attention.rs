//! Self-attention over the pixels of the middle block: one head as wide as the channels.

use candle_core::Tensor;

use super::config::EPS;
use crate::attend::{MultiHeadAttention, to_image, to_tokens};
use crate::layers::{GroupNorm, add};
use crate::weights::Scope;
use crate::{Result, Tape};

/// `x + attention(group_norm(x))` on `[b, c, h, w]`.
#[derive(Debug)]
pub(super) struct PixelAttention {
    norm: GroupNorm,
    attention: MultiHeadAttention,
}

impl PixelAttention {
    /// Takes the names of today (`to_q`, `to_k`, `to_v`, `to_out.0`) and those of checkpoints from before
    /// diffusers 0.14 (`query`, `key`, `value`, `proj_attn`): whichever set the files hold.
    pub(super) fn new(scope: &Scope<'_>, channels: usize, groups: usize) -> Result<Self> {
        let [query, key, value, output] = if scope.has("proj_attn.weight") {
            ["query", "key", "value", "proj_attn"]
        } else {
            ["to_q", "to_k", "to_v", "to_out.0"]
        };
        let project = |name| scope.linear(name, channels, channels);
        let projections = [project(query)?, project(key)?, project(value)?, project(output)?];
        Ok(Self {
            norm: scope.group_norm("group_norm", channels, groups, EPS)?,
            attention: MultiHeadAttention::new(projections, 1, channels),
        })
    }

    pub(super) fn forward(&self, x: &Tensor, tape: &mut Tape) -> Result<Tensor> {
        let y = to_tokens(&self.norm.forward(x, tape)?)?;
        add(x, &to_image(&self.attention.forward(&y, tape)?, x.shape())?)
    }

    pub(super) fn backward(&self, dy: &Tensor, tape: &mut Tape) -> Result<Tensor> {
        let d = to_image(&self.attention.backward(&to_tokens(dy)?, tape)?, dy.shape())?;
        add(dy, &self.norm.backward(&d, tape)?)
    }
}
