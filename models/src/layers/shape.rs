//! Moving data: skip connections and attention heads.

use candle_core::Tensor;

use super::cpu::{floats, tensor};
use super::{expect, use_kernels};
use crate::kernels::elementwise;
use crate::{Error, Result};

/// `a + b` of the same shape, for residual connections.
///
/// # Errors
/// When the shapes differ.
pub fn add(a: &Tensor, b: &Tensor) -> Result<Tensor> {
    if !use_kernels(a.device()) || a.dims() != b.dims() {
        return Ok((a + b)?);
    }
    let (a, b) = (a.contiguous()?, b.contiguous()?);
    let (x, y) = (floats(&a)?, floats(&b)?);
    tensor(elementwise::add(&x, &y), a.shape())
}

/// Joins two images along their channels: `[b, c1, h, w]`, `[b, c2, h, w]` -> `[b, c1 + c2, h, w]`.
///
/// # Errors
/// When the other dimensions differ.
pub fn concat_channels(a: &Tensor, b: &Tensor) -> Result<Tensor> {
    Ok(Tensor::cat(&[a, b], 1)?)
}

/// The backward pass of [`concat_channels`]: splits `[b, c, h, w]` into its first `c1` channels and
/// the rest.
///
/// # Errors
/// When there are fewer than `c1` channels.
pub fn split_channels(dy: &Tensor, c1: usize) -> Result<(Tensor, Tensor)> {
    let c = dy.dim(1)?;
    if c1 > c {
        return Err(Error::invalid("split_channels", format!("{c1} of {c} channels")));
    }
    Ok((dy.narrow(1, 0, c1)?.contiguous()?, dy.narrow(1, c1, c - c1)?.contiguous()?))
}

/// `[b, n, heads * d]` -> `[b, heads, n, d]`, contiguous. [`merge_heads`] is its inverse and so also its
/// backward pass.
///
/// # Errors
/// When the width is not a multiple of `heads`.
pub fn split_heads(x: &Tensor, heads: usize) -> Result<Tensor> {
    expect("split_heads", x, 3, "[b, n, heads * d]")?;
    let (b, n, width) = x.dims3()?;
    if heads == 0 || width % heads != 0 {
        return Err(Error::invalid("split_heads", format!("width {width} over {heads} heads")));
    }
    Ok(x.reshape((b, n, heads, width / heads))?.transpose(1, 2)?.contiguous()?)
}

/// `[b, heads, n, d]` -> `[b, n, heads * d]`, contiguous.
///
/// # Errors
/// When `x` has another rank.
pub fn merge_heads(x: &Tensor) -> Result<Tensor> {
    expect("merge_heads", x, 4, "[b, heads, n, d]")?;
    let (b, heads, n, d) = x.dims4()?;
    Ok(x.transpose(1, 2)?.contiguous()?.reshape((b, n, heads * d))?)
}
