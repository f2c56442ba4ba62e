//! Modulation: factors and shifts that a condition gives to every token of a sample (Peebles and Xie 2022,
//! "adaptive layer norm").
//!
//! The condition is a constant: gradients go to the tokens only.

use candle_core::Tensor;

use super::cpu::{build, floats};
use super::{expect, use_kernels};
use crate::kernels::elementwise::{self, PerSample};
use crate::{Error, Result, Tape};

/// `x factor + shift` with `x` `[b, n, d]`, `factor` and `shift` `[b, d]`. Saves the factor.
///
/// # Errors
/// When the shapes do not fit.
pub fn scale_shift(x: &Tensor, factor: &Tensor, shift: &Tensor, tape: &mut Tape) -> Result<Tensor> {
    let [n, d] = check("scale_shift", x, &[factor, shift])?;
    tape.push(factor);
    if !use_kernels(x.device()) {
        let y = x.broadcast_mul(&factor.unsqueeze(1)?)?;
        return Ok(y.broadcast_add(&shift.unsqueeze(1)?)?);
    }
    let (x, factor, shift) = (x.contiguous()?, factor.contiguous()?, shift.contiguous()?);
    let (values, factor, shift) = (floats(&x)?, floats(&factor)?, floats(&shift)?);
    let by = PerSample { factor: &factor, d, rows: n };
    build(x.shape(), |y| elementwise::scale_shift(&values, by, &shift, y))
}

/// `base + x factor` with `base` and `x` `[b, n, d]`, `factor` `[b, d]`: a residual connection with a gate.
/// Saves the factor.
///
/// # Errors
/// When the shapes do not fit.
pub fn add_scaled(base: &Tensor, x: &Tensor, factor: &Tensor, tape: &mut Tape) -> Result<Tensor> {
    let [n, d] = check("add_scaled", x, &[factor])?;
    if base.dims() != x.dims() {
        let problem = format!("base is {:?}, x is {:?}", base.dims(), x.dims());
        return Err(Error::invalid("add_scaled", problem));
    }
    tape.push(factor);
    if !use_kernels(x.device()) {
        return Ok((base + x.broadcast_mul(&factor.unsqueeze(1)?)?)?);
    }
    let (base, x, factor) = (base.contiguous()?, x.contiguous()?, factor.contiguous()?);
    let (bases, values, factor) = (floats(&base)?, floats(&x)?, floats(&factor)?);
    let by = PerSample { factor: &factor, d, rows: n };
    build(x.shape(), |y| elementwise::add_scaled(&bases, &values, by, y))
}

/// The backward pass of [`scale_shift`], and of [`add_scaled`] with respect to `x`: `dy factor`.
///
/// # Errors
/// When the tape is empty or `dy` is not of the shape of the output.
pub fn scale_backward(dy: &Tensor, tape: &mut Tape) -> Result<Tensor> {
    let factor = tape.pop()?;
    let [n, d] = check("scale_backward", dy, &[&factor])?;
    if !use_kernels(dy.device()) {
        return Ok(dy.broadcast_mul(&factor.unsqueeze(1)?)?);
    }
    let (dy, factor) = (dy.contiguous()?, factor.contiguous()?);
    let (values, factor) = (floats(&dy)?, floats(&factor)?);
    let by = PerSample { factor: &factor, d, rows: n };
    build(dy.shape(), |dx| elementwise::scale(&values, by, dx))
}

/// Tokens per sample and their width.
fn check(what: &'static str, x: &Tensor, per_sample: &[&Tensor]) -> Result<[usize; 2]> {
    expect(what, x, 3, "[b, n, d]")?;
    let (b, n, d) = x.dims3()?;
    match per_sample.iter().find(|t| t.dims() != [b, d]) {
        None => Ok([n, d]),
        Some(t) => Err(Error::invalid(what, format!("expected [{b}, {d}], got {:?}", t.dims()))),
    }
}
