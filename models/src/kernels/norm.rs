//! Group normalisation (with SiLU), layer and root-mean-square normalisation.

use rayon::prelude::*;

use super::elementwise::{silu, silu_slope};
use super::simd::dispatch;

/// Floats whose moments are taken at once, while they are in the nearest cache.
const CHUNK: usize = 4096;
/// Independent partial sums.
const LANES: usize = 16;

/// The parameters of a normalisation.
#[derive(Clone, Copy)]
pub(crate) struct Affine<'a> {
    /// `[c]`
    pub(crate) weight: &'a [f32],
    /// `[c]`
    pub(crate) bias: &'a [f32],
}

/// The shape of a group normalisation.
#[derive(Clone, Copy)]
pub(crate) struct Groups {
    /// Groups of one sample.
    pub(crate) groups: usize,
    /// Channels of one group.
    pub(crate) channels: usize,
    /// Pixels of one channel.
    pub(crate) pixels: usize,
    /// Whether SiLU follows.
    pub(crate) silu: bool,
}

/// Sums of `f(i)` in 16 lanes, joined in order.
#[inline(always)]
fn lane_sum(n: usize, f: impl Fn(usize) -> f32) -> f64 {
    let mut lanes = [0f32; LANES];
    let whole = n / LANES * LANES;
    for i in (0..whole).step_by(LANES) {
        for (l, lane) in lanes.iter_mut().enumerate() {
            *lane += f(i + l);
        }
    }
    let tail: f64 = (whole..n).map(|i| f64::from(f(i))).sum();
    lanes.iter().map(|lane| f64::from(*lane)).sum::<f64>() + tail
}

/// Mean and reciprocal standard deviation (biased variance) of `x`; chunks are joined by Chan's rule.
#[inline(always)]
fn statistics(x: &[f32], eps: f64) -> (f32, f32) {
    let (mut count, mut mean, mut squares) = (0f64, 0f64, 0f64);
    for x in x.chunks(CHUNK) {
        let n = x.len() as f64;
        let local = lane_sum(x.len(), |i| x[i]) / n;
        let centre = local as f32;
        let rounded = local - f64::from(centre);
        let spread =
            lane_sum(x.len(), |i| (x[i] - centre) * (x[i] - centre)) - n * rounded * rounded;
        let delta = local - mean;
        squares += spread + delta * delta * count * n / (count + n);
        mean += (local - mean) * n / (count + n);
        count += n;
    }
    (mean as f32, (1.0 / (squares / count + eps).sqrt()) as f32)
}

dispatch! {
    fn group(x: &[f32], shape: Groups, affine: Affine<'_>, eps: f64, stats: (&mut f32, &mut f32), y: &mut [f32]) = group_body;
}

#[inline(always)]
fn group_body(
    x: &[f32],
    shape: Groups,
    affine: Affine<'_>,
    eps: f64,
    stats: (&mut f32, &mut f32),
    y: &mut [f32],
) {
    let (mean, rstd) = statistics(x, eps);
    (*stats.0, *stats.1) = (mean, rstd);
    let channels = x.chunks_exact(shape.pixels).zip(y.chunks_exact_mut(shape.pixels));
    for (c, (x, y)) in channels.enumerate() {
        let scale = affine.weight[c] * rstd;
        let shift = affine.bias[c] - mean * scale;
        if shape.silu {
            for (y, x) in y.iter_mut().zip(x) {
                *y = silu(x * scale + shift);
            }
        } else {
            for (y, x) in y.iter_mut().zip(x) {
                *y = x * scale + shift;
            }
        }
    }
}

/// `y` of the shape of `x` `[b, groups, channels, pixels]`; `means` and `rstds` are `[b, groups]`.
pub(crate) fn group_norm(
    x: &[f32],
    shape: Groups,
    affine: Affine<'_>,
    eps: f64,
    (means, rstds): (&mut [f32], &mut [f32]),
    y: &mut [f32],
) {
    let size = shape.channels * shape.pixels;
    y.par_chunks_mut(size)
        .zip(x.par_chunks(size))
        .zip(means.par_iter_mut().zip(rstds))
        .enumerate()
        .for_each(|(i, ((y, x), stats))| {
            group(x, shape, affine.group(i % shape.groups, shape.channels), eps, stats, y);
        });
}

impl<'a> Affine<'a> {
    fn group(self, group: usize, channels: usize) -> Self {
        let part = group * channels..(group + 1) * channels;
        Self { weight: &self.weight[part.clone()], bias: &self.bias[part] }
    }
}

dispatch! {
    fn group_backward(dy: &[f32], x: &[f32], shape: Groups, affine: Affine<'_>, stats: (f32, f32), dx: &mut [f32]) = group_backward_body;
}

/// `dx` first holds the gradient `g` of the normalised values, then
/// `rstd (g - mean(g) - normal mean(g normal))`.
#[inline(always)]
fn group_backward_body(
    dy: &[f32],
    x: &[f32],
    shape: Groups,
    affine: Affine<'_>,
    (mean, rstd): (f32, f32),
    dx: &mut [f32],
) {
    let (mut sum, mut along) = (0f64, 0f64);
    for (c, start) in (0..x.len()).step_by(shape.pixels).enumerate() {
        let weight = affine.weight[c];
        let scale = weight * rstd;
        let shift = affine.bias[c] - mean * scale;
        for start in (start..start + shape.pixels).step_by(CHUNK.min(shape.pixels)) {
            let end = (start + CHUNK).min((c + 1) * shape.pixels);
            let (x, dy, g) = (&x[start..end], &dy[start..end], &mut dx[start..end]);
            if shape.silu {
                for ((g, dy), x) in g.iter_mut().zip(dy).zip(x) {
                    *g = dy * weight * silu_slope(x * scale + shift);
                }
            } else {
                for (g, dy) in g.iter_mut().zip(dy) {
                    *g = dy * weight;
                }
            }
            let g = &*g;
            sum += lane_sum(g.len(), |i| g[i]);
            along += lane_sum(g.len(), |i| g[i] * ((x[i] - mean) * rstd));
        }
    }
    let n = x.len() as f64;
    let (sum, along) = ((sum / n) as f32, (along / n) as f32);
    for (dx, x) in dx.iter_mut().zip(x) {
        *dx = rstd * (*dx - sum - (x - mean) * rstd * along);
    }
}

/// The input gradient of [`group_norm`].
pub(crate) fn group_norm_backward(
    dy: &[f32],
    x: &[f32],
    shape: Groups,
    affine: Affine<'_>,
    (means, rstds): (&[f32], &[f32]),
    dx: &mut [f32],
) {
    let size = shape.channels * shape.pixels;
    dx.par_chunks_mut(size).zip(x.par_chunks(size).zip(dy.par_chunks(size))).enumerate().for_each(
        |(i, (dx, (x, dy)))| {
            let affine = affine.group(i % shape.groups, shape.channels);
            group_backward(dy, x, shape, affine, (means[i], rstds[i]), dx);
        },
    );
}

/// What happens to each row of a layer or root-mean-square normalisation.
#[derive(Clone, Copy)]
pub(crate) struct RowNorm<'a> {
    /// `[d]` each.
    pub(crate) affine: Affine<'a>,
    /// Added to the mean square.
    pub(crate) eps: f64,
    /// Whether the mean is taken away first.
    pub(crate) centred: bool,
}

dispatch! {
    fn rows(x: &[f32], norm: RowNorm<'_>, stats: (&mut [f32], &mut [f32]), y: &mut [f32]) = rows_body;
}

#[inline(always)]
fn rows_body(x: &[f32], norm: RowNorm<'_>, stats: (&mut [f32], &mut [f32]), y: &mut [f32]) {
    let RowNorm { affine, eps, centred } = norm;
    let d = affine.weight.len();
    let stats = stats.0.iter_mut().zip(stats.1);
    for ((x, y), out) in x.chunks_exact(d).zip(y.chunks_exact_mut(d)).zip(stats) {
        let (mean, rstd) = if centred {
            statistics(x, eps)
        } else {
            let square = lane_sum(d, |i| x[i] * x[i]) / d as f64;
            (0.0, (1.0 / (square + eps).sqrt()) as f32)
        };
        (*out.0, *out.1) = (mean, rstd);
        for (((y, x), weight), bias) in y.iter_mut().zip(x).zip(affine.weight).zip(affine.bias) {
            *y = (x - mean) * rstd * weight + bias;
        }
    }
}

/// `y` of the shape of `x` `[rows, d]`; `means` and `rstds` are `[rows]`.
pub(crate) fn row_norm(
    x: &[f32],
    norm: RowNorm<'_>,
    (means, rstds): (&mut [f32], &mut [f32]),
    y: &mut [f32],
) {
    let d = norm.affine.weight.len();
    let n = CHUNK.div_ceil(d);
    y.par_chunks_mut(n * d)
        .zip(x.par_chunks(n * d))
        .zip(means.par_chunks_mut(n).zip(rstds.par_chunks_mut(n)))
        .for_each(|((y, x), stats)| rows(x, norm, stats, y));
}

dispatch! {
    fn rows_backward(dy: &[f32], x: &[f32], norm: RowNorm<'_>, stats: (&[f32], &[f32]), dx: &mut [f32]) = rows_backward_body;
}

#[inline(always)]
fn rows_backward_body(
    dy: &[f32],
    x: &[f32],
    norm: RowNorm<'_>,
    stats: (&[f32], &[f32]),
    dx: &mut [f32],
) {
    let weight = norm.affine.weight;
    let d = weight.len();
    let rows = dx.chunks_exact_mut(d).zip(x.chunks_exact(d)).zip(dy.chunks_exact(d));
    for (((dx, x), dy), (mean, rstd)) in rows.zip(stats.0.iter().zip(stats.1)) {
        let normal = |i: usize| (x[i] - mean) * rstd;
        let sum =
            if norm.centred { (lane_sum(d, |i| dy[i] * weight[i]) / d as f64) as f32 } else { 0.0 };
        let along = (lane_sum(d, |i| dy[i] * weight[i] * normal(i)) / d as f64) as f32;
        for (i, dx) in dx.iter_mut().enumerate() {
            *dx = rstd * (dy[i] * weight[i] - sum - normal(i) * along);
        }
    }
}

/// The input gradient of [`row_norm`].
pub(crate) fn row_norm_backward(
    dy: &[f32],
    x: &[f32],
    norm: RowNorm<'_>,
    (means, rstds): (&[f32], &[f32]),
    dx: &mut [f32],
) {
    let d = norm.affine.weight.len();
    let n = CHUNK.div_ceil(d);
    dx.par_chunks_mut(n * d)
        .zip(x.par_chunks(n * d).zip(dy.par_chunks(n * d)))
        .zip(means.par_chunks(n).zip(rstds.par_chunks(n)))
        .for_each(|((dx, (x, dy)), stats)| rows_backward(dy, x, norm, stats, dx));
}
