//! Linear layers and every convolution that is not Winograd's: matrix products, shared out in rectangles
//! of the output. How they are cut does not change a bit of the result.

use rayon::prelude::*;

use super::gemm::{LANES, Lhs, Rhs, Start, gemm, gemm_raw, pack, packed_len};
use super::scratch::{Shared, with_scratch};

/// Columns of a rectangle.
const COLUMNS: usize = 12 * LANES;
/// Least multiplications that are worth a task of their own.
const TASK: usize = 1 << 16;

/// A square kernel moving over an image.
#[derive(Clone, Copy)]
pub(crate) struct Window {
    /// Side of the kernel.
    pub(crate) side: usize,
    /// Its step.
    pub(crate) stride: usize,
    /// Zeros above and to the left.
    pub(crate) before: usize,
    /// Sides of the image.
    pub(crate) image: (usize, usize),
    /// Sides of the output.
    pub(crate) out: (usize, usize),
}

/// `W^T` of a weight `[outputs, inputs]` in panels, the right factor of [`linear`].
pub(crate) fn pack_linear(weight: &[f32], outputs: usize, inputs: usize) -> Vec<f32> {
    let mut packed = vec![0f32; packed_len([inputs, outputs])];
    pack([inputs, outputs], weight, 1, inputs, &mut packed);
    packed
}

/// `W` in panels, the right factor of the input gradient.
pub(crate) fn pack_linear_backward(weight: &[f32], outputs: usize, inputs: usize) -> Vec<f32> {
    let mut packed = vec![0f32; packed_len([outputs, inputs])];
    pack([outputs, inputs], weight, inputs, 1, &mut packed);
    packed
}

/// `y = x B + bias` for the rows of `x` `[rows, inputs]`, with `B` `[inputs, outputs]` in panels.
pub(crate) fn linear(
    x: &[f32],
    packed: &[f32],
    bias: Option<&[f32]>,
    [rows, outputs, inputs]: [usize; 3],
    y: &mut [f32],
) {
    assert!(x.len() == rows * inputs && y.len() == rows * outputs, "linear: sizes");
    let a = Lhs { data: x, row: inputs, col: 1 };
    let out = Shared::new(y);
    rectangles([rows, outputs, inputs]).into_par_iter().for_each(|part| {
        let (i, j) = (part.row, part.column);
        let a = Lhs { data: &a.data[i * inputs..], ..a };
        let b = Rhs::packed(&packed[j * inputs..], inputs);
        let start = bias.map_or(Start::Zero, |bias| Start::ColumnBias(&bias[j..]));
        // SAFETY: rectangles are disjoint and within `y`.
        unsafe {
            gemm_raw(
                [part.rows, part.columns, inputs],
                a,
                b,
                start,
                out.at(i * outputs + j),
                outputs,
            )
        };
    });
}

/// A part of a matrix.
struct Rectangle {
    row: usize,
    rows: usize,
    column: usize,
    columns: usize,
}

/// Cuts `[m, n]` so that every thread has something to do, unless the whole is small.
fn rectangles([m, n, k]: [usize; 3]) -> Vec<Rectangle> {
    let threads = rayon::current_num_threads();
    let whole = threads == 1 || m * n * k < 2 * TASK;
    let columns = if whole {
        n.max(1)
    } else {
        n.div_ceil(threads).next_multiple_of(LANES).clamp(LANES, COLUMNS)
    };
    let across = n.div_ceil(columns);
    let down = if whole { 1 } else { threads.div_ceil(across.max(1)) };
    let rows = m.div_ceil(down).next_multiple_of(8);
    let mut parts = Vec::new();
    for column in (0..n).step_by(columns) {
        for row in (0..m).step_by(rows) {
            parts.push(Rectangle {
                row,
                rows: rows.min(m - row),
                column,
                columns: columns.min(n - column),
            });
        }
    }
    parts
}

/// The left factor of a 1 x 1 convolution: the weight `[c_out, c_in]` or its transpose, read in place.
#[derive(Clone, Copy)]
pub(crate) struct Mixing<'a> {
    /// `[to, from]`
    pub(crate) weight: Lhs<'a>,
    /// Input channels.
    pub(crate) from: usize,
    /// Output channels.
    pub(crate) to: usize,
}

/// `y` `[b, to, n]` from `x` `[b, from, n]`: every pixel's channels mixed.
pub(crate) fn pointwise(mix: Mixing<'_>, bias: Option<&[f32]>, x: &[f32], n: usize, y: &mut [f32]) {
    per_columns(
        x.len() / (mix.from * n).max(1),
        [mix.to, n, mix.from],
        mix.weight,
        bias,
        y,
        |sample, column, columns, packed| {
            pack([mix.from, columns], &x[sample * mix.from * n + column..], n, 1, packed);
        },
    );
}

/// `y` `[b, c_out, h', w']` from `x` `[b, c_in, h, w]` and `weight` `[c_out, c_in, side, side]`.
pub(crate) fn conv(
    weight: &[f32],
    bias: Option<&[f32]>,
    x: &[f32],
    [c_out, c_in]: [usize; 2],
    window: Window,
    y: &mut [f32],
) {
    let k = c_in * window.side * window.side;
    let n = window.out.0 * window.out.1;
    let image = window.image.0 * window.image.1;
    let a = Lhs { data: weight, row: k, col: 1 };
    per_columns(
        x.len() / (c_in * image).max(1),
        [c_out, n, k],
        a,
        bias,
        y,
        |sample, column, columns, packed| {
            unfold(
                &x[sample * c_in * image..][..c_in * image],
                window,
                column..column + columns,
                packed,
            );
        },
    );
}

/// `y[sample] = A B[sample] + bias` for `b` samples, with `B` `[k, n]` made panel by panel by
/// `fill(sample, first column, columns, panels)`.
fn per_columns(
    b: usize,
    [m, n, k]: [usize; 3],
    a: Lhs<'_>,
    bias: Option<&[f32]>,
    y: &mut [f32],
    fill: impl Fn(usize, usize, usize, &mut [f32]) + Sync,
) {
    assert!(y.len() == b * m * n, "convolution: sizes");
    let width = if m * n * k < 2 * TASK { n.max(1) } else { COLUMNS };
    let across = n.div_ceil(width);
    let threads = rayon::current_num_threads();
    let down = if b * across >= threads || m * n * k < 2 * TASK {
        1
    } else {
        threads.div_ceil(b * across).min(m.div_ceil(8))
    };
    let height = m.div_ceil(down).next_multiple_of(8);
    let out = Shared::new(y);
    (0..b * across * m.div_ceil(height)).into_par_iter().for_each(|task| {
        let (sample, column) = (task / across % b, task % across * width);
        let row = task / (across * b) * height;
        let (rows, columns) = (height.min(m - row), width.min(n - column));
        with_scratch(packed_len([k, columns]), |packed| {
            fill(sample, column, columns, packed);
            let a = Lhs { data: &a.data[row * a.row..], ..a };
            let start = bias.map_or(Start::Zero, |bias| Start::RowBias(&bias[row..]));
            // SAFETY: tasks write disjoint rectangles of the samples of `y`.
            unsafe {
                let c = out.at((sample * m + row) * n + column);
                gemm_raw([rows, columns, k], a, Rhs::packed(packed, k), start, c, n);
            }
        });
    });
}

/// What the window sees at some output pixels, as panels of `[c_in * side * side, pixels]`.
fn unfold(x: &[f32], window: Window, pixels: std::ops::Range<usize>, packed: &mut [f32]) {
    let (h, w) = window.image;
    let k = x.len() / (h * w) * window.side * window.side;
    for (panel, first) in packed.chunks_exact_mut(k * LANES).zip(pixels.clone().step_by(LANES)) {
        let mut rows = panel.chunks_exact_mut(LANES);
        for plane in x.chunks_exact(h * w) {
            for (ky, kx) in window.taps() {
                let Some(lanes) = rows.next() else { return };
                for (lane, pixel) in lanes.iter_mut().zip(first..) {
                    let at = window.source(pixel, ky, kx).filter(|_| pixel < pixels.end);
                    *lane = at.map_or(0.0, |at| plane[at]);
                }
            }
        }
    }
}

impl Window {
    fn taps(self) -> impl Iterator<Item = (usize, usize)> {
        (0..self.side).flat_map(move |ky| (0..self.side).map(move |kx| (ky, kx)))
    }

    /// Where in the image an output pixel's tap is, if it is not in the padding.
    fn source(self, pixel: usize, ky: usize, kx: usize) -> Option<usize> {
        let y = (pixel / self.out.1 * self.stride + ky).checked_sub(self.before)?;
        let x = (pixel % self.out.1 * self.stride + kx).checked_sub(self.before)?;
        (y < self.image.0 && x < self.image.1).then_some(y * self.image.1 + x)
    }
}

/// The input gradient of [`conv`]: `W^T dy`, each row of which is added where its tap had looked.
pub(crate) fn conv_backward(
    weight: &[f32],
    dy: &[f32],
    [c_out, c_in]: [usize; 2],
    window: Window,
    dx: &mut [f32],
) {
    let (taps, n) = (window.side * window.side, window.out.0 * window.out.1);
    let image = window.image.0 * window.image.1;
    // Channels of a task: enough rows for the product, and whole samples stay apart.
    let group =
        (64usize.div_ceil(taps)..=c_in).find(|group| c_in.is_multiple_of(*group)).unwrap_or(c_in);
    dx.par_chunks_mut(group * image).enumerate().for_each(|(task, dx)| {
        let (sample, first) = (task / (c_in / group), task % (c_in / group) * group);
        let rows = group * taps;
        with_scratch(packed_len([c_out, n]) + rows * n, |scratch| {
            let (packed, columns) = scratch.split_at_mut(packed_len([c_out, n]));
            pack([c_out, n], &dy[sample * c_out * n..], n, 1, packed);
            let a = Lhs { data: &weight[first * taps..], row: 1, col: c_in * taps };
            gemm([rows, n, c_out], a, Rhs::packed(packed, c_out), Start::Zero, columns, n);
            dx.fill(0.0);
            for (dx, columns) in dx.chunks_exact_mut(image).zip(columns.chunks_exact(taps * n)) {
                for ((ky, kx), column) in window.taps().zip(columns.chunks_exact(n)) {
                    for (pixel, value) in column.iter().enumerate() {
                        if let Some(at) = window.source(pixel, ky, kx) {
                            dx[at] += value;
                        }
                    }
                }
            }
        });
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The unsafe writes rest on this: rectangles cover every element once, whatever the number of threads.
    #[test]
    fn rectangles_cover_the_output_once() {
        for threads in [1, 2, 3, 8] {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            for [m, n, k] in
                [[1, 1, 1], [50, 3072, 768], [7, 33, 4000], [300, 5, 900], [1, 2000, 64]]
            {
                let mut seen = vec![0u8; m * n];
                for part in pool.install(|| rectangles([m, n, k])) {
                    assert!(part.column.is_multiple_of(LANES), "panels are whole");
                    for i in part.row..part.row + part.rows {
                        seen[i * n + part.column..][..part.columns]
                            .iter_mut()
                            .for_each(|s| *s += 1);
                    }
                }
                assert!(seen.iter().all(|&s| s == 1), "{m} x {n} x {k} on {threads} threads");
            }
        }
    }
}
