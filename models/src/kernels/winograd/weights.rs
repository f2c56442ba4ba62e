//! The kernels of a layer and their transform.

use std::ops::Range;

use rayon::prelude::*;

use super::transform::{scatter, transform_kernels};
use super::{GAP, POINTS, ROWS};
use crate::kernels::gemm::LANES;
use crate::kernels::scratch::{Shared, with_scratch};

/// Kernels `[c_out, c_in]` of a convolution as they lie in memory.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Kernels<'a> {
    /// `[c_out, c_in, 3, 3]` of the layer.
    weight: &'a [f32],
    pub(super) c_out: usize,
    pub(super) c_in: usize,
    /// Whether they are read for the input gradient: channels exchanged, kernels flipped.
    transposed: bool,
}

impl<'a> Kernels<'a> {
    /// The kernels of the layer's weight `[c_out, c_in, 3, 3]`.
    pub(crate) fn forward(weight: &'a [f32], c_out: usize, c_in: usize) -> Self {
        Self { weight, c_out, c_in, transposed: false }
    }

    /// The kernels that compute the input gradient of the same layer.
    pub(crate) fn backward(weight: &'a [f32], c_out: usize, c_in: usize) -> Self {
        Self { weight, c_out: c_in, c_in: c_out, transposed: true }
    }

    /// Floats of the transformed kernels.
    pub(crate) fn transformed_len(self) -> usize {
        POINTS * self.c_out * self.c_in
    }

    /// All kernels transformed, `[36, c_out, c_in]`.
    pub(crate) fn transform(self) -> Vec<f32> {
        let mut data = vec![0f32; self.transformed_len()];
        let plane = self.c_out * self.c_in;
        let out = Shared::new(&mut data);
        (0..self.c_out.div_ceil(ROWS)).into_par_iter().for_each(|block| {
            let rows = block * ROWS..self.c_out.min((block + 1) * ROWS);
            let (first, len) = (rows.start * self.c_in, rows.len() * self.c_in);
            with_scratch(POINTS * (len + GAP), |u| {
                self.transform_rows(rows, len + GAP, u);
                for (point, u) in u.chunks_exact(len + GAP).enumerate() {
                    // SAFETY: blocks of rows are disjoint.
                    unsafe {
                        std::ptr::copy_nonoverlapping(
                            u.as_ptr(),
                            out.at(point * plane + first),
                            len,
                        )
                    };
                }
            });
        });
        data
    }

    /// `G g G^T` of the kernels of some output channels, `[36, rows, c_in]` with planes `plane` apart.
    pub(super) fn transform_rows(self, rows: Range<usize>, plane: usize, u: &mut [f32]) {
        let mut g = [[0f32; LANES]; 9];
        let mut points = [[0f32; LANES]; POINTS];
        for (row, output) in rows.enumerate() {
            for input in (0..self.c_in).step_by(LANES) {
                let lanes = LANES.min(self.c_in - input);
                self.gather(output, input, lanes, &mut g);
                transform_kernels(&g, &mut points);
                let to = &mut u[row * self.c_in + input..];
                assert!((POINTS - 1) * plane + lanes <= to.len(), "transformed kernels: sizes");
                // SAFETY: asserted.
                unsafe { scatter(&points, 0, lanes, to.as_mut_ptr(), plane) };
            }
        }
    }

    /// The kernels from `lanes` input channels to one output channel, tap by tap.
    fn gather(self, output: usize, input: usize, lanes: usize, g: &mut [[f32; LANES]; 9]) {
        let (first, step) = if self.transposed {
            ((input * self.c_out + output) * 9, self.c_out * 9)
        } else {
            ((output * self.c_in + input) * 9, 9)
        };
        for (lane, kernel) in self.weight[first..].chunks(step).take(lanes).enumerate() {
            let kernel: &[f32; 9] = kernel.first_chunk().expect("kernels have nine taps");
            for (row, tap) in g.iter_mut().zip(kernel) {
                row[lane] = *tap;
            }
        }
        if self.transposed {
            g.reverse();
        }
    }
}

/// The factor of the 36 products.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Weights<'a> {
    /// Transformed beforehand, `[36, c_out, c_in]`: four times the memory of the kernels.
    Kept(&'a [f32]),
    /// Transformed a few rows at a time while they are used.
    Made,
}
