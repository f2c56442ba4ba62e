//! Scaled dot-product attention.

use candle_core::Tensor;

use super::cpu::{floats, tensor};
use super::{composed, use_kernels};
use crate::kernels::attention::{self as kernel, Saved, Shape};
use crate::{Error, Result, Tape};

/// `softmax(q k^T scale) v` per head, computed tile by tile: no `n x m` score matrix is kept. The backward
/// pass recomputes the scores.
#[derive(Debug, Clone, Copy)]
pub struct Attention {
    scale: f64,
    causal: bool,
    /// Added to the last key's score.
    last: f64,
}

impl Attention {
    /// Attention with scores multiplied by `scale`, usually `1 / sqrt(d)`.
    pub fn new(scale: f64) -> Self {
        Self { scale, causal: false, last: 0.0 }
    }

    /// The same, where query `i` sees the keys `0..=i` only.
    pub fn causal(mut self) -> Self {
        self.causal = true;
        self
    }

    /// The same, where the last key and value stand for `times` equal ones: its score grows by
    /// `ln(times)`, which is what as many terms add to the softmax.
    pub fn repeating_last(mut self, times: usize) -> Self {
        self.last = (times as f64).ln();
        self
    }

    /// Queries `[b, heads, n, d]`, keys and values `[b, heads, m, d]` -> `[b, heads, n, d]`. Saves its
    /// inputs, its output and one number a row.
    ///
    /// # Errors
    /// When the shapes do not fit, or `causal` and `n != m`.
    pub fn forward(&self, q: &Tensor, k: &Tensor, v: &Tensor, tape: &mut Tape) -> Result<Tensor> {
        tape.go_on()?;
        self.check(q, k, v)?;
        let (q, k, v) = (&q.contiguous()?, &k.contiguous()?, &v.contiguous()?);
        let (y, log_sums) = if use_kernels(q.device()) {
            self.forward_on_cpu(q, k, v)?
        } else {
            composed::attention(q, k, v, self.scores())?
        };
        for t in [q, k, v, &y, &log_sums] {
            tape.push(t);
        }
        Ok(y)
    }

    /// Gradients with respect to the queries, keys and values.
    ///
    /// # Errors
    /// When the tape is empty or `dy` is not of the shape of the output.
    pub fn backward(&self, dy: &Tensor, tape: &mut Tape) -> Result<(Tensor, Tensor, Tensor)> {
        tape.go_on()?;
        let (log_sums, y) = (tape.pop()?, tape.pop()?);
        let (v, k, q) = (tape.pop()?, tape.pop()?, tape.pop()?);
        if dy.dims() != y.dims() {
            return Err(Error::invalid(
                "Attention::backward",
                format!("expected {:?}, got {:?}", y.dims(), dy.dims()),
            ));
        }
        if use_kernels(dy.device()) {
            return self.backward_on_cpu(&dy.contiguous()?, [&q, &k, &v, &y, &log_sums]);
        }
        composed::attention_backward(dy, [&q, &k, &v, &y, &log_sums], self.scores())
    }

    fn scores(&self) -> composed::Scores {
        composed::Scores { scale: self.scale, causal: self.causal, last: self.last }
    }

    fn shape(&self, q: &Tensor, k: &Tensor) -> Result<Shape> {
        let (b, heads, n, d) = q.dims4()?;
        let (m, scale, last) = (k.dim(2)?, self.scale as f32, self.last as f32);
        Ok(Shape { heads: b * heads, n, m, d, scale, causal: self.causal, last })
    }

    fn forward_on_cpu(&self, q: &Tensor, k: &Tensor, v: &Tensor) -> Result<(Tensor, Tensor)> {
        let (b, heads, n, _) = q.dims4()?;
        let (mut y, mut log_sums) = (vec![0f32; q.elem_count()], vec![0f32; b * heads * n]);
        kernel::attention(
            self.shape(q, k)?,
            &floats(q)?,
            &floats(k)?,
            &floats(v)?,
            &mut y,
            &mut log_sums,
        );
        Ok((tensor(y, q.shape())?, tensor(log_sums, (b, heads, n))?))
    }

    fn backward_on_cpu(
        &self,
        dy: &Tensor,
        [q, k, v, y, log_sums]: [&Tensor; 5],
    ) -> Result<(Tensor, Tensor, Tensor)> {
        let shape = self.shape(q, k)?;
        let (qs, ks, vs, ys, log_sums) =
            (floats(q)?, floats(k)?, floats(v)?, floats(y)?, floats(log_sums)?);
        let saved = Saved { q: &qs, k: &ks, v: &vs, y: &ys, log_sums: &log_sums };
        let [mut dq, mut dk, mut dv] = [q, k, v].map(|t| vec![0f32; t.elem_count()]);
        kernel::attention_backward(shape, saved, &floats(dy)?, &mut dq, &mut dk, &mut dv);
        Ok((tensor(dq, q.shape())?, tensor(dk, k.shape())?, tensor(dv, v.shape())?))
    }

    fn check(&self, q: &Tensor, k: &Tensor, v: &Tensor) -> Result<()> {
        for t in [q, k, v] {
            super::expect("Attention::forward", t, 4, "[b, heads, n, d]")?;
        }
        let ((b, h, n, d), (kb, kh, m, kd)) = (q.dims4()?, k.dims4()?);
        if (b, h, d) != (kb, kh, kd) || k.dims() != v.dims() || m == 0 || (self.causal && n != m) {
            return Err(Error::invalid(
                "Attention::forward",
                format!("q {:?}, k {:?}, v {:?} do not fit", q.dims(), k.dims(), v.dims()),
            ));
        }
        Ok(())
    }
}
