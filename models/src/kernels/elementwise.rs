//! Element-wise kernels, and the approximations of exp and erf they are made of.

use rayon::prelude::*;

use super::scratch::{Unset, written};
use super::simd::dispatch;
use crate::layers::Activation;

/// Elements of a task.
const CHUNK: usize = 1 << 14;

/// `e^x` for `x` in -87..88, clamped outside; NaN stays NaN. Relative error below 2e-7 (Cephes `expf`).
#[inline(always)]
pub(super) fn exp(x: f32) -> f32 {
    /// Adding and subtracting it rounds to an integer, which then is in the low bits of the sum.
    const MAGIC: f32 = 12_582_912.0;
    const LN_2_HIGH: f32 = 0.693_359_4;
    const LN_2_LOW: f32 = -2.121_944_4e-4;
    let x = if x > 88.0 { 88.0 } else { x };
    let x = if x < -87.0 { -87.0 } else { x };
    let shifted = x * std::f32::consts::LOG2_E + MAGIC;
    let n = shifted - MAGIC;
    let r = x - n * LN_2_HIGH - n * LN_2_LOW;
    let mut p = 1.987_569_1e-4;
    for c in [1.398_199_9e-3, 8.333_452e-3, 4.166_579_6e-2, 1.666_666_5e-1, 0.5] {
        p = p * r + c;
    }
    let exponent = shifted.to_bits().wrapping_sub(MAGIC.to_bits()).wrapping_add(127) << 23;
    (p * r * r + r + 1.0) * f32::from_bits(exponent)
}

#[inline(always)]
pub(super) fn sigmoid(x: f32) -> f32 {
    1.0 / (1.0 + exp(-x))
}

/// The error function as the rational approximation used by Eigen and XLA, odd / even, on -4..4.
#[inline(always)]
fn erf(x: f32) -> f32 {
    let x = if x > 4.0 { 4.0 } else { x };
    let x = if x < -4.0 { -4.0 } else { x };
    let s = x * x;
    let mut p = -2.726_142_3e-10;
    for c in [
        2.770_681_4e-8,
        -2.101_024_1e-6,
        -5.692_506_4e-5,
        -7.349_906_3e-4,
        -2.954_6e-3,
        -1.609_603_3e-2,
    ] {
        p = p * s + c;
    }
    let mut q = -1.456_607_2e-5;
    for c in [-2.133_740_5e-4, -1.682_827e-3, -7.373_329_2e-3, -1.426_473_9e-2] {
        q = q * s + c;
    }
    x * p / q
}

/// `Phi(x)`.
#[inline(always)]
fn normal_cdf(x: f32) -> f32 {
    0.5 + 0.5 * erf(x * std::f32::consts::FRAC_1_SQRT_2)
}

/// Factor of `x` in the sigmoid of the quick GELU.
const QUICK: f32 = 1.702;
/// Factor of the cube in the tanh GELU.
const CUBIC: f32 = 0.044_715;
/// `2 sqrt(2 / pi)`: `(1 + tanh(u)) / 2` is `sigmoid(2 u)`.
const TANH_SCALE: f32 = 1.595_769_2;
/// `1 / sqrt(2 pi)`.
const DENSITY: f32 = 0.398_942_3;

/// `x sigmoid(x)`.
#[inline(always)]
pub(super) fn silu(x: f32) -> f32 {
    x * sigmoid(x)
}

/// Its slope.
#[inline(always)]
pub(super) fn silu_slope(x: f32) -> f32 {
    let s = sigmoid(x);
    s + x * s * (1.0 - s)
}

#[inline(always)]
fn map(x: &[f32], y: &mut Unset, f: impl Fn(f32) -> f32) {
    for (y, x) in y.iter_mut().zip(x) {
        y.write(f(*x));
    }
}

#[inline(always)]
fn map2(x: &[f32], dy: &[f32], dx: &mut Unset, slope: impl Fn(f32) -> f32) {
    for ((dx, x), dy) in dx.iter_mut().zip(x).zip(dy) {
        dx.write(dy * slope(*x));
    }
}

dispatch! {
    fn activate(kind: Activation, x: &[f32], y: &mut Unset) = activate_body;
}

#[inline(always)]
fn activate_body(kind: Activation, x: &[f32], y: &mut Unset) {
    match kind {
        Activation::GeluErf => map(x, y, |x| x * normal_cdf(x)),
        Activation::GeluTanh => map(x, y, |x| x * sigmoid(TANH_SCALE * (x + CUBIC * x * x * x))),
        Activation::GeluQuick => map(x, y, |x| x * sigmoid(QUICK * x)),
        Activation::Silu => map(x, y, silu),
    }
}

dispatch! {
    fn activate_backward(kind: Activation, x: &[f32], dy: &[f32], dx: &mut Unset) = activate_backward_body;
}

#[inline(always)]
fn activate_backward_body(kind: Activation, x: &[f32], dy: &[f32], dx: &mut Unset) {
    match kind {
        Activation::GeluErf => {
            map2(x, dy, dx, |x| normal_cdf(x) + x * DENSITY * exp(-0.5 * x * x));
        }
        Activation::GeluTanh => map2(x, dy, dx, |x| {
            let s = sigmoid(TANH_SCALE * (x + CUBIC * x * x * x));
            s + x * s * (1.0 - s) * TANH_SCALE * (1.0 + 3.0 * CUBIC * x * x)
        }),
        Activation::GeluQuick => map2(x, dy, dx, |x| {
            let s = sigmoid(QUICK * x);
            s + QUICK * x * s * (1.0 - s)
        }),
        Activation::Silu => map2(x, dy, dx, silu_slope),
    }
}

/// `f(x)`.
pub(crate) fn activation(kind: Activation, x: &[f32]) -> Vec<f32> {
    let fill = |y: &mut Unset| {
        y.par_chunks_mut(CHUNK).zip(x.par_chunks(CHUNK)).for_each(|(y, x)| activate(kind, x, y));
    };
    // SAFETY: both have as many elements.
    unsafe { written(x.len(), fill) }
}

/// `dy f'(x)`.
pub(crate) fn activation_backward(kind: Activation, x: &[f32], dy: &[f32]) -> Vec<f32> {
    assert_eq!(x.len(), dy.len(), "activation: sizes");
    let fill = |dx: &mut Unset| {
        dx.par_chunks_mut(CHUNK)
            .zip(x.par_chunks(CHUNK))
            .zip(dy.par_chunks(CHUNK))
            .for_each(|((dx, x), dy)| activate_backward(kind, x, dy, dx));
    };
    // SAFETY: all three have as many elements.
    unsafe { written(x.len(), fill) }
}

/// `a + b`.
pub(crate) fn add(a: &[f32], b: &[f32]) -> Vec<f32> {
    assert_eq!(a.len(), b.len(), "add: sizes");
    let fill = |y: &mut Unset| {
        y.par_chunks_mut(CHUNK).zip(a.par_chunks(CHUNK)).zip(b.par_chunks(CHUNK)).for_each(
            |((y, a), b)| {
                for ((y, a), b) in y.iter_mut().zip(a).zip(b) {
                    y.write(a + b);
                }
            },
        );
    };
    // SAFETY: all three have as many elements.
    unsafe { written(a.len(), fill) }
}

/// Rows of one width that samples hold so many of each, and one factor per sample and column.
#[derive(Clone, Copy)]
pub(crate) struct PerSample<'a> {
    /// `[samples, d]`
    pub(crate) factor: &'a [f32],
    /// Width of a row.
    pub(crate) d: usize,
    /// Rows of a sample.
    pub(crate) rows: usize,
}

impl PerSample<'_> {
    /// Runs `f(y, index of the row, factors of its sample)` on every row of `y`.
    fn for_rows(self, y: &mut [f32], f: impl Fn(&mut [f32], usize, &[f32], usize) + Sync) {
        let together = CHUNK.div_ceil(self.d);
        y.par_chunks_mut(together * self.d).enumerate().for_each(|(chunk, y)| {
            for (i, y) in y.chunks_exact_mut(self.d).enumerate() {
                let row = chunk * together + i;
                let at = row / self.rows * self.d;
                f(y, row * self.d, &self.factor[at..][..self.d], at);
            }
        });
    }
}

/// `y = x factor + shift`, with `shift` `[samples, d]`.
pub(crate) fn scale_shift(x: &[f32], by: PerSample<'_>, shift: &[f32], y: &mut [f32]) {
    by.for_rows(y, |y, row, factor, sample| {
        let shift = &shift[sample..][..by.d];
        for (((y, x), factor), shift) in y.iter_mut().zip(&x[row..]).zip(factor).zip(shift) {
            *y = x * factor + shift;
        }
    });
}

/// `y = x factor`.
pub(crate) fn scale(x: &[f32], by: PerSample<'_>, y: &mut [f32]) {
    by.for_rows(y, |y, row, factor, _| {
        for ((y, x), factor) in y.iter_mut().zip(&x[row..]).zip(factor) {
            *y = x * factor;
        }
    });
}

/// `y = base + x factor`.
pub(crate) fn add_scaled(base: &[f32], x: &[f32], by: PerSample<'_>, y: &mut [f32]) {
    by.for_rows(y, |y, row, factor, _| {
        for (((y, base), x), factor) in y.iter_mut().zip(&base[row..]).zip(&x[row..]).zip(factor) {
            *y = base + x * factor;
        }
    });
}

/// Every pixel of `x` (rows of `w`) twice in both directions.
pub(crate) fn upsample2x(x: &[f32], w: usize, y: &mut [f32]) {
    let rows = CHUNK.div_ceil(4 * w);
    y.par_chunks_mut(rows * 4 * w).zip(x.par_chunks(rows * w)).for_each(|(y, x)| {
        for (y, x) in y.chunks_exact_mut(4 * w).zip(x.chunks_exact(w)) {
            let (first, second) = y.split_at_mut(2 * w);
            for (pair, x) in first.chunks_exact_mut(2).zip(x) {
                pair.fill(*x);
            }
            second.copy_from_slice(first);
        }
    });
}

/// The sum of each 2 x 2 block of `dy`; `w` is the width of `dx`.
pub(crate) fn upsample2x_backward(dy: &[f32], w: usize, dx: &mut [f32]) {
    let rows = CHUNK.div_ceil(4 * w);
    dx.par_chunks_mut(rows * w).zip(dy.par_chunks(rows * 4 * w)).for_each(|(dx, dy)| {
        for (dx, dy) in dx.chunks_exact_mut(w).zip(dy.chunks_exact(4 * w)) {
            let (first, second) = dy.split_at(2 * w);
            for ((dx, a), b) in dx.iter_mut().zip(first.chunks_exact(2)).zip(second.chunks_exact(2))
            {
                *dx = (a[0] + a[1]) + (b[0] + b[1]);
            }
        }
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The worst error of `f` relative to `max(|reference|, floor)` over a grid of -range..range.
    fn worst(
        range: f64,
        floor: f64,
        f: impl Fn(f32) -> f32,
        reference: impl Fn(f64) -> f64,
    ) -> f64 {
        (0..=200_000)
            .map(|i| {
                let x = (range * (f64::from(i) / 100_000.0 - 1.0)) as f32;
                let truth = reference(f64::from(x));
                (f64::from(f(x)) - truth).abs() / truth.abs().max(floor)
            })
            .fold(0.0, f64::max)
    }

    #[test]
    fn exp_and_erf_are_accurate() {
        let e = worst(86.0, 1e-300, exp, f64::exp);
        assert!(e < 3e-7, "exp {e:e}");
        let e = worst(6.0, 1e-300, erf, candle_core::cpu::erf::erf_f64);
        assert!(e < 1e-6, "erf {e:e}");
        let e = worst(20.0, 1e-30, silu, |x| x / (1.0 + (-x).exp()));
        assert!(e < 1e-6, "silu {e:e}");
    }

    #[test]
    fn not_a_number_is_never_hidden() {
        assert!(exp(f32::NAN).is_nan() && erf(f32::NAN).is_nan() && silu(f32::NAN).is_nan());
        assert!(exp(-1e30) < 1e-37 && exp(1e30) > 1e38);
    }
}
