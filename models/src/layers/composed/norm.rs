//! Group, layer and root-mean-square normalisation.

use candle_core::{D, Tensor};

use super::activation_slope;
use crate::Result;
use crate::layers::Activation;

/// The output and the statistics `[2, b, groups]` (means, then reciprocal standard deviations).
/// `shape` is `[samples, groups, channels per group, pixels]`.
pub(in crate::layers) fn group_norm(
    x: &Tensor,
    shape: [usize; 4],
    weight: &Tensor,
    bias: &Tensor,
    eps: f64,
    silu: bool,
) -> Result<(Tensor, Tensor)> {
    let [b, groups, per_group, pixels] = shape;
    let rows = x.contiguous()?.reshape((b * groups, per_group * pixels))?;
    let (mean, rstd) = statistics(&rows, eps)?;
    let normal = rows.broadcast_sub(&mean)?.broadcast_mul(&rstd)?;
    let y = affine(&normal, shape, weight, bias)?;
    let y = if silu { super::activation(Activation::Silu, &y)? } else { y };
    let stats = Tensor::cat(&[mean, rstd], 0)?.reshape((2, b, groups))?;
    Ok((y.reshape(x.dims())?, stats))
}

/// The input gradient.
pub(in crate::layers) fn group_norm_backward(
    dy: &Tensor,
    x: &Tensor,
    stats: &Tensor,
    shape: [usize; 4],
    weight: &Tensor,
    bias: &Tensor,
    silu: bool,
) -> Result<Tensor> {
    let [b, groups, per_group, pixels] = shape;
    let stats = stats.reshape((2, b * groups, 1))?;
    let (mean, rstd) = (stats.get(0)?, stats.get(1)?);
    let rows = x.contiguous()?.reshape((b * groups, per_group * pixels))?;
    let normal = rows.broadcast_sub(&mean)?.broadcast_mul(&rstd)?;
    let mut dy = dy.contiguous()?.reshape((b, groups * per_group, pixels))?;
    if silu {
        let y = affine(&normal, shape, weight, bias)?;
        dy = (dy * activation_slope(Activation::Silu, &y)?)?;
    }
    let scaled = dy
        .broadcast_mul(&weight.reshape((1, (), 1))?)?
        .reshape((b * groups, per_group * pixels))?;
    Ok(normalised_backward(&scaled, &normal, &rstd, true)?.reshape(x.dims())?)
}

/// What happens to each row of a layer or root-mean-square normalisation.
#[derive(Clone, Copy)]
pub(in crate::layers) struct RowNorm<'a> {
    /// `[d]`
    pub(in crate::layers) weight: &'a Tensor,
    /// `[d]`
    pub(in crate::layers) bias: &'a Tensor,
    /// Added to the mean square.
    pub(in crate::layers) eps: f64,
    /// Whether the mean is taken away first.
    pub(in crate::layers) centred: bool,
}

/// The output and the statistics `[2, rows]`.
pub(in crate::layers) fn row_norm(x: &Tensor, norm: RowNorm<'_>) -> Result<(Tensor, Tensor)> {
    let rows = x.contiguous()?.reshape(((), norm.weight.dims1()?))?;
    let (mean, rstd) = if norm.centred {
        statistics(&rows, norm.eps)?
    } else {
        let square = rows.sqr()?.mean_keepdim(D::Minus1)?;
        (square.zeros_like()?, (square + norm.eps)?.sqrt()?.recip()?)
    };
    let normal = rows.broadcast_sub(&mean)?.broadcast_mul(&rstd)?;
    let y = normal.broadcast_mul(norm.weight)?.broadcast_add(norm.bias)?;
    let stats = Tensor::cat(&[mean.t()?, rstd.t()?], 0)?;
    Ok((y.reshape(x.dims())?, stats))
}

/// The input gradient.
pub(in crate::layers) fn row_norm_backward(
    dy: &Tensor,
    x: &Tensor,
    stats: &Tensor,
    norm: RowNorm<'_>,
) -> Result<Tensor> {
    let d = norm.weight.dims1()?;
    let rows = x.contiguous()?.reshape(((), d))?;
    let (mean, rstd) = (stats.get(0)?.unsqueeze(1)?, stats.get(1)?.unsqueeze(1)?);
    let normal = rows.broadcast_sub(&mean)?.broadcast_mul(&rstd)?;
    let scaled = dy.contiguous()?.reshape(((), d))?.broadcast_mul(norm.weight)?;
    Ok(normalised_backward(&scaled, &normal, &rstd, norm.centred)?.reshape(x.dims())?)
}

/// Mean and reciprocal standard deviation (biased variance) of each row, as columns.
fn statistics(rows: &Tensor, eps: f64) -> Result<(Tensor, Tensor)> {
    let mean = rows.mean_keepdim(D::Minus1)?;
    let variance = rows.broadcast_sub(&mean)?.sqr()?.mean_keepdim(D::Minus1)?;
    Ok((mean, (variance + eps)?.sqrt()?.recip()?))
}

/// `rstd (g - mean(g) - normal mean(g normal))` per row, with `g` the gradient of the normalised rows; `mean(g)`
/// is left out where no mean was taken away.
fn normalised_backward(
    g: &Tensor,
    normal: &Tensor,
    rstd: &Tensor,
    centred: bool,
) -> Result<Tensor> {
    let along = (g * normal)?.mean_keepdim(D::Minus1)?;
    let d = g.broadcast_sub(&normal.broadcast_mul(&along)?.contiguous()?)?;
    let d = if centred { d.broadcast_sub(&g.mean_keepdim(D::Minus1)?)? } else { d };
    Ok(d.broadcast_mul(rstd)?)
}

/// `normal weight + bias` per channel, as `[b, c, pixels]`.
fn affine(
    normal: &Tensor,
    [b, groups, per_group, pixels]: [usize; 4],
    weight: &Tensor,
    bias: &Tensor,
) -> Result<Tensor> {
    let normal = normal.reshape((b, groups * per_group, pixels))?;
    Ok(normal.broadcast_mul(&weight.reshape((1, (), 1))?)?.broadcast_add(&bias.reshape((
        1,
        (),
        1,
    ))?)?)
}
