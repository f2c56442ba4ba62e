//! Antialiased resizing, as torch's `interpolate(.., antialias=True, align_corners=False)`.

use candle_core::Tensor;

use super::cpu::{build, floats};
use super::use_kernels;
use crate::kernels::resize::{Band, separable, transpose};
use crate::{Error, Result};

/// The interpolation kernel.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Filter {
    /// Keys' cubic with a = -0.5, support 2.
    BicubicAntialias,
    /// The triangle, support 1.
    BilinearAntialias,
}

impl Filter {
    /// Half the width of the kernel at scale 1.
    fn support(self) -> f64 {
        match self {
            Self::BicubicAntialias => 2.0,
            Self::BilinearAntialias => 1.0,
        }
    }

    /// The kernel's value at distance `t`.
    fn at(self, t: f64) -> f64 {
        const A: f64 = -0.5;
        let t = t.abs();
        match self {
            Self::BicubicAntialias if t < 1.0 => ((A + 2.0) * t - (A + 3.0)) * t * t + 1.0,
            Self::BicubicAntialias if t < 2.0 => (((t - 5.0) * t + 8.0) * t - 4.0) * A,
            Self::BilinearAntialias if t < 1.0 => 1.0 - t,
            _ => 0.0,
        }
    }
}

/// The weights of one direction, one [`Band`] an output.
///
/// For output `i` with `scale = from / to`: centre `scale (i + 0.5)`, kernel stretched by
/// `max(scale, 1)`, clipped to the image and normalised to sum 1 (`_compute_weights_aa` in torch's
/// `UpSampleKernel.cpp`, which follows Pillow).
fn bands(from: usize, to: usize, filter: Filter) -> Vec<Band> {
    let scale = from as f64 / to as f64;
    let stretch = scale.max(1.0);
    let support = filter.support() * stretch;
    let band = |i: usize| {
        let centre = scale * (i as f64 + 0.5);
        let first = (centre - support + 0.5).max(0.0) as usize;
        let end = ((centre + support + 0.5) as usize).min(from);
        let taps: Vec<f64> =
            (first..end).map(|j| filter.at((j as f64 - centre + 0.5) / stretch)).collect();
        let total: f64 = taps.iter().sum();
        Band { first, weights: taps.iter().map(|tap| (tap / total) as f32).collect() }
    };
    (0..to).map(band).collect()
}

/// Resizes `[b, c, h_in, w_in]` to `[b, c, h, w]`.
///
/// # Errors
/// When a side is 0 or `x` is not of rank 4.
pub fn resize(x: &Tensor, h: usize, w: usize, filter: Filter) -> Result<Tensor> {
    super::expect("resize", x, 4, "[b, c, h, w]")?;
    let (_, _, h_in, w_in) = x.dims4()?;
    check("resize", [h_in, w_in, h, w])?;
    apply(x, &bands(h_in, h, filter), &bands(w_in, w, filter))
}

/// The transpose of [`resize`]: `[b, c, h, w]` -> `[b, c, h_in, w_in]`.
///
/// # Errors
/// When a side is 0 or `dy` is not of rank 4.
pub fn resize_backward(dy: &Tensor, h_in: usize, w_in: usize, filter: Filter) -> Result<Tensor> {
    super::expect("resize_backward", dy, 4, "[b, c, h, w]")?;
    let (_, _, h, w) = dy.dims4()?;
    check("resize_backward", [h_in, w_in, h, w])?;
    let back = |from, to| transpose(&bands(from, to, filter), from);
    apply(dy, &back(h_in, h), &back(w_in, w))
}

/// `rows x columns^T` on every channel of `[b, c, h, w]`.
fn apply(x: &Tensor, rows: &[Band], columns: &[Band]) -> Result<Tensor> {
    let (b, c, h, w) = x.dims4()?;
    let x = x.contiguous()?;
    if use_kernels(x.device()) {
        let values = floats(&x)?;
        return build((b, c, rows.len(), columns.len()), |y| {
            separable(&values, (h, w), rows, columns, y)
        });
    }
    let across = x.reshape((b * c * h, w))?.matmul(&dense(columns, w, &x)?.t()?)?;
    let across = across.reshape((b * c, h, columns.len()))?;
    let rows = dense(rows, h, &x)?.broadcast_left(b * c)?.contiguous()?;
    Ok(rows.matmul(&across)?.reshape((b, c, (), columns.len()))?)
}

/// The bands as a matrix `[outputs, inputs]` on the device of `x`.
fn dense(bands: &[Band], inputs: usize, x: &Tensor) -> Result<Tensor> {
    let mut matrix = vec![0f32; bands.len() * inputs];
    for (row, band) in matrix.chunks_exact_mut(inputs).zip(bands) {
        row[band.first..band.first + band.weights.len()].copy_from_slice(&band.weights);
    }
    Ok(Tensor::from_vec(matrix, (bands.len(), inputs), x.device())?)
}

fn check(what: &'static str, sides: [usize; 4]) -> Result<()> {
    if sides.contains(&0) {
        return Err(Error::invalid(what, format!("sides must be at least 1, got {sides:?}")));
    }
    Ok(())
}
