//! Attention in blocks of queries, so that the scores of all queries are never held at once.

use candle_core::{D, Tensor};

use crate::Result;

/// Queries taken at once.
const BLOCK: usize = 512;

/// The output `[b, heads, n, d]` and, per row, the logarithm of its sum of exponentials `[b, heads, n]`.
pub(in crate::layers) fn attention(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    how: Scores,
) -> Result<(Tensor, Tensor)> {
    let n = q.dim(2)?;
    let (kt, v) = (k.transpose(2, 3)?.contiguous()?, v.contiguous()?);
    let (mut outputs, mut log_sums) = (Vec::new(), Vec::new());
    for start in (0..n).step_by(BLOCK) {
        let rows = BLOCK.min(n - start);
        let scores = how.of(&q.narrow(2, start, rows)?, &kt, start)?;
        let log_sum = scores.log_sum_exp(D::Minus1)?;
        let p = scores.broadcast_sub(&log_sum.unsqueeze(D::Minus1)?)?.exp()?;
        outputs.push(p.matmul(&v)?);
        log_sums.push(log_sum);
    }
    Ok((Tensor::cat(&outputs, 2)?, Tensor::cat(&log_sums, 2)?))
}

/// `dv = P^T dy`, `dS = P (dy v^T - rowsum(dy y))`, `dq = dS k scale`, `dk = dS^T q scale`.
pub(in crate::layers) fn attention_backward(
    dy: &Tensor,
    [q, k, v, y, log_sums]: [&Tensor; 5],
    how: Scores,
) -> Result<(Tensor, Tensor, Tensor)> {
    let n = q.dim(2)?;
    let k = k.contiguous()?;
    let (kt, vt) = (k.transpose(2, 3)?.contiguous()?, v.transpose(2, 3)?.contiguous()?);
    let (mut dq, mut dk, mut dv) = (Vec::new(), k.zeros_like()?, v.zeros_like()?);
    for start in (0..n).step_by(BLOCK) {
        let rows = BLOCK.min(n - start);
        let block = |t: &Tensor| t.narrow(2, start, rows)?.contiguous();
        let (q, dy, y) = (block(q)?, block(dy)?, block(y)?);
        let scores = how.of(&q, &kt, start)?;
        let p = scores.broadcast_sub(&block(log_sums)?.unsqueeze(D::Minus1)?)?.exp()?;
        dv = (dv + p.transpose(2, 3)?.contiguous()?.matmul(&dy)?)?;
        let centre = (&dy * &y)?.sum_keepdim(D::Minus1)?;
        let ds = ((dy.matmul(&vt)?.broadcast_sub(&centre)? * p)? * how.scale)?;
        dq.push(ds.matmul(&k)?);
        dk = (dk + ds.transpose(2, 3)?.contiguous()?.matmul(&q)?)?;
    }
    Ok((Tensor::cat(&dq, 2)?, dk, dv))
}

/// How scores are made of queries and keys.
#[derive(Clone, Copy)]
pub(in crate::layers) struct Scores {
    /// Factor of the products.
    pub(in crate::layers) scale: f64,
    /// Whether keys after the query are at minus infinity.
    pub(in crate::layers) causal: bool,
    /// Added to the last key's.
    pub(in crate::layers) last: f64,
}

impl Scores {
    /// The scores of a block of queries, the first of which is query `start`.
    fn of(self, q: &Tensor, kt: &Tensor, start: usize) -> Result<Tensor> {
        let scores = (q.contiguous()?.matmul(kt)? * self.scale)?;
        if !self.causal && self.last == 0.0 {
            return Ok(scores);
        }
        let (rows, m) = (q.dim(2)?, kt.dim(3)?);
        let bias = |i: usize| match i % m {
            key if self.causal && key > start + i / m => f32::NEG_INFINITY,
            key if key + 1 == m => self.last as f32,
            _ => 0.0,
        };
        let bias: Vec<f32> = (0..rows * m).map(bias).collect();
        Ok(scores.broadcast_add(&Tensor::from_vec(bias, (rows, m), q.device())?)?)
    }
}
