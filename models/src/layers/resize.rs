//! Antialiased resizing, as torch's `interpolate(.., antialias=True, align_corners=False)`.

use std::f64::consts::PI;

use candle_core::Tensor;

use super::cpu::{build, floats};
use super::use_kernels;
use crate::kernels::resize::{Band, separable, transpose};
use crate::{Error, Result};

/// The interpolation kernel, by Pillow's names. All but [`Filter::Nearest`] are antialiased.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Filter {
    /// Keys' cubic with a = -0.5, support 2.
    BicubicAntialias,
    /// The triangle, support 1.
    BilinearAntialias,
    /// The pixel in which an output's centre lies.
    Nearest,
    /// The sinc windowed by a wider one, support 3.
    Lanczos,
    /// The mean of the pixels that an output covers, support 1/2.
    Box,
    /// The sinc with Hamming's window, support 1.
    Hamming,
}

/// The weights of the inputs from `first` on that make up one output.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Taps {
    pub(crate) first: usize,
    pub(crate) weights: Vec<f64>,
}

impl Filter {
    /// The filter that Pillow, and so `resample` of a preprocessor's file, numbers so.
    pub fn from_pillow(number: u64) -> Option<Self> {
        Some(match number {
            0 => Self::Nearest,
            1 => Self::Lanczos,
            2 => Self::BilinearAntialias,
            3 => Self::BicubicAntialias,
            4 => Self::Box,
            5 => Self::Hamming,
            _ => return None,
        })
    }

    /// Half the width of the kernel at scale 1.
    fn support(self) -> f64 {
        match self {
            Self::Lanczos => 3.0,
            Self::BicubicAntialias => 2.0,
            Self::BilinearAntialias | Self::Hamming => 1.0,
            Self::Box | Self::Nearest => 0.5,
        }
    }

    /// The kernel's value at distance `t`.
    fn at(self, t: f64) -> f64 {
        const A: f64 = -0.5;
        let sinc = |t: f64| if t == 0.0 { 1.0 } else { (PI * t).sin() / (PI * t) };
        let (signed, t) = (t, t.abs());
        match self {
            Self::BicubicAntialias if t < 1.0 => ((A + 2.0) * t - (A + 3.0)) * t * t + 1.0,
            Self::BicubicAntialias if t < 2.0 => (((t - 5.0) * t + 8.0) * t - 4.0) * A,
            Self::BilinearAntialias if t < 1.0 => 1.0 - t,
            Self::Lanczos if t < 3.0 => sinc(t) * sinc(t / 3.0),
            Self::Hamming if t < 1.0 => sinc(t) * (0.54 + 0.46 * (PI * t).cos()),
            Self::Box | Self::Nearest if signed > -0.5 && signed <= 0.5 => 1.0,
            _ => 0.0,
        }
    }

    /// The weights of one direction, one [`Taps`] an output.
    ///
    /// For output `i` with `scale = from / to`: centre `scale (i + 0.5)`, kernel stretched by
    /// `max(scale, 1)`, clipped to the image and normalised to sum 1 (`_compute_weights_aa` in
    /// torch's `UpSampleKernel.cpp`, which follows Pillow's `precompute_coeffs`).
    pub(crate) fn taps(self, from: usize, to: usize) -> Vec<Taps> {
        let scale = from as f64 / to as f64;
        if self == Self::Nearest {
            let nearest = |i: usize| ((i as f64 + 0.5) * scale) as usize;
            let one = |i| Taps { first: nearest(i).min(from - 1), weights: vec![1.0] };
            return (0..to).map(one).collect();
        }
        let stretch = scale.max(1.0);
        let support = self.support() * stretch;
        let taps = |i: usize| {
            let centre = scale * (i as f64 + 0.5);
            let first = (centre - support + 0.5).max(0.0) as usize;
            let end = ((centre + support + 0.5) as usize).min(from);
            let raw: Vec<f64> =
                (first..end).map(|j| self.at((j as f64 - centre + 0.5) / stretch)).collect();
            let total: f64 = raw.iter().sum();
            Taps { first, weights: raw.iter().map(|tap| tap / total).collect() }
        };
        (0..to).map(taps).collect()
    }
}

/// [`Filter::taps`] in the precision of the networks.
fn bands(from: usize, to: usize, filter: Filter) -> Vec<Band> {
    let band = |taps: Taps| Band {
        first: taps.first,
        weights: taps.weights.iter().map(|&weight| weight as f32).collect(),
    };
    filter.taps(from, to).into_iter().map(band).collect()
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
