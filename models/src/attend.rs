//! Multi-head attention with its four projections, as every network here uses it.

use candle_core::{Shape, Tensor};

use crate::layers::{Attention, Linear, add, merge_heads, split_heads};
use crate::{Result, Tape};

/// `output(attention(query(x), key(context), value(context)))`.
#[derive(Debug)]
pub(crate) struct MultiHeadAttention {
    query: Linear,
    key: Linear,
    value: Linear,
    output: Linear,
    attention: Attention,
    heads: usize,
}

impl MultiHeadAttention {
    /// From the projections of queries, keys, values and output; `width` is that of all heads together.
    pub(crate) fn new(
        [query, key, value, output]: [Linear; 4],
        heads: usize,
        width: usize,
    ) -> Self {
        let attention = Attention::new(((width / heads) as f64).powf(-0.5));
        Self { query, key, value, output, attention, heads }
    }

    /// The same, where a position sees itself and those before it only.
    pub(crate) fn causal(mut self) -> Self {
        self.attention = self.attention.causal();
        self
    }

    /// From `x` `[b, n, width]` to itself.
    pub(crate) fn forward(&self, x: &Tensor, tape: &mut Tape) -> Result<Tensor> {
        self.forward_to(x, x, tape)
    }

    /// The backward pass of [`MultiHeadAttention::forward`].
    pub(crate) fn backward(&self, dy: &Tensor, tape: &mut Tape) -> Result<Tensor> {
        let (dq, dk, dv) = self.backward_to_heads(dy, tape)?;
        let dv = self.value.backward(&merge_heads(&dv)?, tape)?;
        let dk = self.key.backward(&merge_heads(&dk)?, tape)?;
        let dq = self.query.backward(&merge_heads(&dq)?, tape)?;
        add(&add(&dq, &dk)?, &dv)
    }

    /// From `x` `[b, n, width]` to a context `[b, m, context width]`.
    pub(crate) fn forward_to(
        &self,
        x: &Tensor,
        context: &Tensor,
        tape: &mut Tape,
    ) -> Result<Tensor> {
        let q = split_heads(&self.query.forward(x, tape)?, self.heads)?;
        let k = split_heads(&self.key.forward(context, tape)?, self.heads)?;
        let v = split_heads(&self.value.forward(context, tape)?, self.heads)?;
        self.output.forward(&merge_heads(&self.attention.forward(&q, &k, &v, tape)?)?, tape)
    }

    /// The backward pass of [`MultiHeadAttention::forward_to`] with respect to `x`; the context is a constant.
    pub(crate) fn backward_to(&self, dy: &Tensor, tape: &mut Tape) -> Result<Tensor> {
        let (dq, _, _) = self.backward_to_heads(dy, tape)?;
        self.query.backward(&merge_heads(&dq)?, tape)
    }

    /// The backward pass of [`MultiHeadAttention::forward_to`] with respect to the context; `x` is a constant.
    pub(crate) fn backward_to_context(&self, dy: &Tensor, tape: &mut Tape) -> Result<Tensor> {
        let (_, dk, dv) = self.backward_to_heads(dy, tape)?;
        let dv = self.value.backward(&merge_heads(&dv)?, tape)?;
        add(&self.key.backward(&merge_heads(&dk)?, tape)?, &dv)
    }

    fn backward_to_heads(&self, dy: &Tensor, tape: &mut Tape) -> Result<(Tensor, Tensor, Tensor)> {
        let d = split_heads(&self.output.backward(dy, tape)?, self.heads)?;
        self.attention.backward(&d, tape)
    }
}

/// An image `[b, c, h, w]` as a sequence of pixels `[b, h w, c]`.
pub(crate) fn to_tokens(x: &Tensor) -> Result<Tensor> {
    Ok(x.flatten_from(2)?.transpose(1, 2)?.contiguous()?)
}

/// The inverse of [`to_tokens`], to an image of the given shape. Each is the other's backward pass.
pub(crate) fn to_image(x: &Tensor, shape: &Shape) -> Result<Tensor> {
    Ok(x.transpose(1, 2)?.contiguous()?.reshape(shape)?)
}
