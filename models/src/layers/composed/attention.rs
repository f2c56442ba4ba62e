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
    scale: f64,
    causal: bool,
) -> Result<(Tensor, Tensor)> {
    let n = q.dim(2)?;
    let (kt, v) = (k.transpose(2, 3)?.contiguous()?, v.contiguous()?);
    let (mut outputs, mut log_sums) = (Vec::new(), Vec::new());
    for start in (0..n).step_by(BLOCK) {
        let rows = BLOCK.min(n - start);
        let scores = scores(&q.narrow(2, start, rows)?, &kt, scale, causal.then_some(start))?;
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
    scale: f64,
    causal: bool,
) -> Result<(Tensor, Tensor, Tensor)> {
    let n = q.dim(2)?;
    let k = k.contiguous()?;
    let (kt, vt) = (k.transpose(2, 3)?.contiguous()?, v.transpose(2, 3)?.contiguous()?);
    let (mut dq, mut dk, mut dv) = (Vec::new(), k.zeros_like()?, v.zeros_like()?);
    for start in (0..n).step_by(BLOCK) {
        let rows = BLOCK.min(n - start);
        let block = |t: &Tensor| t.narrow(2, start, rows)?.contiguous();
        let (q, dy, y) = (block(q)?, block(dy)?, block(y)?);
        let scores = scores(&q, &kt, scale, causal.then_some(start))?;
        let p = scores.broadcast_sub(&block(log_sums)?.unsqueeze(D::Minus1)?)?.exp()?;
        dv = (dv + p.transpose(2, 3)?.contiguous()?.matmul(&dy)?)?;
        let centre = (&dy * &y)?.sum_keepdim(D::Minus1)?;
        let ds = ((dy.matmul(&vt)?.broadcast_sub(&centre)? * p)? * scale)?;
        dq.push(ds.matmul(&k)?);
        dk = (dk + ds.transpose(2, 3)?.contiguous()?.matmul(&q)?)?;
    }
    Ok((Tensor::cat(&dq, 2)?, dk, dv))
}

/// Scaled scores of a block of queries; with `causal`, keys after the query are at minus infinity.
fn scores(q: &Tensor, kt: &Tensor, scale: f64, causal: Option<usize>) -> Result<Tensor> {
    let scores = (q.contiguous()?.matmul(kt)? * scale)?;
    let Some(start) = causal else { return Ok(scores) };
    let (rows, m) = (q.dim(2)?, kt.dim(3)?);
    let mask: Vec<f32> = (0..rows * m)
        .map(|i| if i % m > start + i / m { f32::NEG_INFINITY } else { 0.0 })
        .collect();
    Ok(scores.broadcast_add(&Tensor::from_vec(mask, (rows, m), q.device())?)?)
}
