//! Attention among image tokens, or among those of image and text together.

use candle_core::Tensor;

use super::config::Sd3TransformerConfig;
use crate::layers::{Attention, LayerNorm, Linear, add, merge_heads, split_heads};
use crate::weights::Scope;
use crate::{Result, Tape};

/// Epsilon of the norms of queries and keys.
const QK_EPS: f64 = 1e-6;

/// Queries, keys and values `[b, heads, n, d]` of one kind of token.
struct Heads {
    q: Tensor,
    k: Tensor,
    v: Tensor,
}

/// The projections of one kind of token.
#[derive(Debug)]
struct Projections {
    query: Linear,
    key: Linear,
    value: Linear,
    /// Of queries and keys.
    norms: Option<[LayerNorm; 2]>,
    heads: usize,
}

impl Projections {
    fn new(
        scope: &Scope<'_>,
        config: &Sd3TransformerConfig,
        names: [&str; 3],
        norms: [&str; 2],
    ) -> Result<Self> {
        let width = config.width();
        let norm = |name| {
            let weight = scope.at(name).tensor("weight", &[config.head_dim])?;
            LayerNorm::rms(weight, QK_EPS)
        };
        let both = || Ok::<_, crate::Error>([norm(norms[0])?, norm(norms[1])?]);
        Ok(Self {
            query: scope.linear(names[0], width, width)?,
            key: scope.linear(names[1], width, width)?,
            value: scope.linear(names[2], width, width)?,
            norms: config.qk_norm.then(both).transpose()?,
            heads: config.heads,
        })
    }

    fn forward(&self, x: &Tensor, tape: &mut Tape) -> Result<Heads> {
        let mut q = split_heads(&self.query.forward(x, tape)?, self.heads)?;
        let mut k = split_heads(&self.key.forward(x, tape)?, self.heads)?;
        let v = split_heads(&self.value.forward(x, tape)?, self.heads)?;
        if let Some([of_queries, of_keys]) = &self.norms {
            q = of_queries.forward(&q, tape)?;
            k = of_keys.forward(&k, tape)?;
        }
        Ok(Heads { q, k, v })
    }

    fn backward(&self, Heads { mut q, mut k, v }: Heads, tape: &mut Tape) -> Result<Tensor> {
        if let Some([of_queries, of_keys]) = &self.norms {
            k = of_keys.backward(&k, tape)?;
            q = of_queries.backward(&q, tape)?;
        }
        let dv = self.value.backward(&merge_heads(&v)?, tape)?;
        let dk = self.key.backward(&merge_heads(&k)?, tape)?;
        add(&add(&self.query.backward(&merge_heads(&q)?, tape)?, &dk)?, &dv)
    }
}

/// Names of the projections of image tokens, and of their norms.
const IMAGE: ([&str; 3], [&str; 2]) = (["to_q", "to_k", "to_v"], ["norm_q", "norm_k"]);
/// The same of text tokens.
const TEXT: ([&str; 3], [&str; 2]) =
    (["add_q_proj", "add_k_proj", "add_v_proj"], ["norm_added_q", "norm_added_k"]);

fn scaled(config: &Sd3TransformerConfig) -> Attention {
    Attention::new((config.head_dim as f64).powf(-0.5))
}

/// Attention of image tokens among themselves, up to the output projection.
#[derive(Debug)]
pub(super) struct SelfAttention {
    image: Projections,
    attention: Attention,
}

impl SelfAttention {
    pub(super) fn new(scope: &Scope<'_>, config: &Sd3TransformerConfig) -> Result<Self> {
        let image = Projections::new(scope, config, IMAGE.0, IMAGE.1)?;
        Ok(Self { image, attention: scaled(config) })
    }

    pub(super) fn forward(&self, x: &Tensor, tape: &mut Tape) -> Result<Tensor> {
        let Heads { q, k, v } = self.image.forward(x, tape)?;
        merge_heads(&self.attention.forward(&q, &k, &v, tape)?)
    }

    pub(super) fn backward(&self, dy: &Tensor, tape: &mut Tape) -> Result<Tensor> {
        let d = split_heads(dy, self.image.heads)?;
        let (q, k, v) = self.attention.backward(&d, tape)?;
        self.image.backward(Heads { q, k, v }, tape)
    }
}

/// Attention of image and text tokens to all of them, up to the output projections.
#[derive(Debug)]
pub(super) struct JointAttention {
    image: Projections,
    text: Projections,
    attention: Attention,
}

impl JointAttention {
    /// The last text token stands for `repeats` equal ones.
    pub(super) fn new(
        scope: &Scope<'_>,
        config: &Sd3TransformerConfig,
        repeats: usize,
    ) -> Result<Self> {
        Ok(Self {
            image: Projections::new(scope, config, IMAGE.0, IMAGE.1)?,
            text: Projections::new(scope, config, TEXT.0, TEXT.1)?,
            // The text comes last, so its last token is the last of all.
            attention: scaled(config).repeating_last(repeats),
        })
    }

    /// Image `x` `[b, n, width]` and text `c` `[b, m, width]`, each to its own shape.
    pub(super) fn forward(
        &self,
        x: &Tensor,
        c: &Tensor,
        tape: &mut Tape,
    ) -> Result<(Tensor, Tensor)> {
        let (image, text) = (self.image.forward(x, tape)?, self.text.forward(c, tape)?);
        let both = |a: &Tensor, b: &Tensor| Tensor::cat(&[a, b], 2);
        let q = both(&image.q, &text.q)?;
        let (k, v) = (both(&image.k, &text.k)?, both(&image.v, &text.v)?);
        apart(&self.attention.forward(&q, &k, &v, tape)?, x.dim(1)?)
            .and_then(|(x, c)| Ok((merge_heads(&x)?, merge_heads(&c)?)))
    }

    pub(super) fn backward(
        &self,
        dx: &Tensor,
        dc: &Tensor,
        tape: &mut Tape,
    ) -> Result<(Tensor, Tensor)> {
        let heads = self.image.heads;
        let d = Tensor::cat(&[split_heads(dx, heads)?, split_heads(dc, heads)?], 2)?;
        let (q, k, v) = self.attention.backward(&d, tape)?;
        let n = dx.dim(1)?;
        let ((q, text_q), (k, text_k), (v, text_v)) = (apart(&q, n)?, apart(&k, n)?, apart(&v, n)?);
        let dc = self.text.backward(Heads { q: text_q, k: text_k, v: text_v }, tape)?;
        Ok((self.image.backward(Heads { q, k, v }, tape)?, dc))
    }
}

/// `[b, heads, n + m, d]` as its first `n` tokens and the rest.
fn apart(x: &Tensor, n: usize) -> Result<(Tensor, Tensor)> {
    let m = x.dim(2)? - n;
    Ok((x.narrow(2, 0, n)?.contiguous()?, x.narrow(2, n, m)?.contiguous()?))
}
