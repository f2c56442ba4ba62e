//! 3 x 3 convolution with stride 1 and pad 1 as Winograd F(4 x 4, 3 x 3): per 4 x 4 tile of the output 36
//! products instead of 144. Matrices from Lavin and Gray, "Fast Algorithms for Convolutional Neural
//! Networks" (arXiv 1509.09308), section 4.3.
//!
//! With the kernel flipped and transposed the same code computes the input gradient.

mod blocks;
mod transform;
mod weights;

use std::ops::Range;

use rayon::prelude::*;

use blocks::{Grid, blocks};
use transform::{scatter, transform_output, transform_tiles, transform_tiles_8};
pub(crate) use weights::{Kernels, Weights};

use super::gemm::{LANES, Lhs, Rhs, Start, gemm};
use super::scratch::{Shared, with_scratch};

/// Side of an input tile; it has `SIDE * SIDE` transformed elements.
const SIDE: usize = 6;
/// Transformed elements.
const POINTS: usize = SIDE * SIDE;
/// Side of an output tile.
const STEP: usize = 4;
/// Floats of a row of a block of tiles, with room for the overlap.
const ROW: usize = (LANES + 1) * STEP;
/// Most tiles of a unit of work: its transformed input stays near the core.
const UNIT: usize = 128;
/// Most tiles whose transformed input is shared by all threads.
const BATCH: usize = 512;
/// Floats between planes of scratch memory beyond their contents: 36 planes a power of two apart would all
/// fall into the same few lines of the cache. The output transform also reads this far past a plane.
const GAP: usize = LANES;
/// Channels of a task when threads share the transformed input.
const ROWS: usize = 8;

/// `y` `[b, c_out, h, w]` from `x` `[b, c_in, h, w]`; `bias` is per output channel.
pub(crate) fn conv3x3(
    kernels: Kernels<'_>,
    weights: Weights<'_>,
    bias: Option<&[f32]>,
    x: &[f32],
    [b, h, w]: [usize; 3],
    y: &mut [f32],
) {
    let (c_in, c_out) = (kernels.c_in, kernels.c_out);
    assert!(x.len() == b * c_in * h * w && y.len() == b * c_out * h * w, "conv3x3: sizes");
    let grid = Grid { h, w, across: w.div_ceil(STEP), down: h.div_ceil(STEP) };
    let rows = b * grid.down;
    if rows == 0 || grid.across == 0 {
        return;
    }
    let job = Job { kernels, bias, x, grid, out: Shared::new(y) };
    match weights {
        Weights::Kept(u) => {
            let share =
                (rows * grid.across).div_ceil(rayon::current_num_threads()).next_multiple_of(LANES);
            let per_unit = (share.min(UNIT) / grid.across).max(1);
            (0..rows.div_ceil(per_unit)).into_par_iter().for_each(|unit| {
                let first = unit * per_unit;
                // SAFETY: units have disjoint rows of tiles, so they write disjoint rows of pixels.
                unsafe { job.by_tiles(u, first..rows.min(first + per_unit)) }
            });
        }
        Weights::Made => {
            let per_unit = (BATCH / grid.across).max(1);
            for first in (0..rows).step_by(per_unit) {
                job.by_channels(first..rows.min(first + per_unit));
            }
        }
    }
}

/// One convolution.
#[derive(Clone, Copy)]
struct Job<'a> {
    kernels: Kernels<'a>,
    bias: Option<&'a [f32]>,
    x: &'a [f32],
    grid: Grid,
    out: Shared,
}

impl Job<'_> {
    /// The three phases for some rows of tiles, counted over all samples, on one thread.
    ///
    /// # Safety
    /// Nobody else writes the pixels of these rows of tiles.
    unsafe fn by_tiles(&self, u: &[f32], rows: Range<usize>) {
        let (c_in, c_out) = (self.kernels.c_in, self.kernels.c_out);
        let columns = (rows.len() * self.grid.across).next_multiple_of(LANES);
        let (v_plane, m_plane) = (c_in * columns + GAP, c_out * columns + GAP);
        with_scratch(POINTS * (v_plane + m_plane), |scratch| {
            let (v, m) = scratch.split_at_mut(POINTS * v_plane);
            // SAFETY: `v` is this thread's alone.
            unsafe { self.transform_input(rows.clone(), 0..c_in, Shared::new(v), v_plane) };
            let planes = v.chunks_exact(v_plane).zip(m.chunks_exact_mut(m_plane));
            for ((v, m), u) in planes.zip(u.chunks_exact(c_out * c_in)) {
                let (a, b) = (Lhs { data: u, row: c_in, col: 1 }, Rhs::packed(v, c_in));
                gemm([c_out, columns, c_in], a, b, Start::Zero, m, columns);
            }
            // SAFETY: passed on.
            unsafe { self.transform_output(rows, 0..c_out, m, columns) };
        });
    }

    /// The same on all threads, which share the transformed input and each make the weights of a few
    /// output channels.
    fn by_channels(&self, rows: Range<usize>) {
        let (c_in, c_out) = (self.kernels.c_in, self.kernels.c_out);
        let columns = (rows.len() * self.grid.across).next_multiple_of(LANES);
        let v_plane = c_in * columns + GAP;
        with_scratch(POINTS * v_plane, |v| {
            let shared = Shared::new(v);
            (0..c_in.div_ceil(ROWS)).into_par_iter().for_each(|block| {
                let channels = block * ROWS..c_in.min((block + 1) * ROWS);
                // SAFETY: tasks have disjoint channels, and `v` lives until all are done.
                unsafe { self.transform_input(rows.clone(), channels, shared, v_plane) };
            });
            let v = &*v;
            (0..c_out.div_ceil(ROWS)).into_par_iter().for_each(|block| {
                let channels = block * ROWS..c_out.min((block + 1) * ROWS);
                let (u_plane, m_plane) =
                    (channels.len() * c_in + GAP, channels.len() * columns + GAP);
                with_scratch(POINTS * (u_plane + m_plane), |scratch| {
                    let (u, m) = scratch.split_at_mut(POINTS * u_plane);
                    self.kernels.transform_rows(channels.clone(), u_plane, u);
                    let planes = v.chunks_exact(v_plane).zip(m.chunks_exact_mut(m_plane));
                    for ((v, m), u) in planes.zip(u.chunks_exact(u_plane)) {
                        let (a, b) = (Lhs { data: u, row: c_in, col: 1 }, Rhs::packed(v, c_in));
                        gemm([channels.len(), columns, c_in], a, b, Start::Zero, m, columns);
                    }
                    // SAFETY: tasks write disjoint channels.
                    unsafe { self.transform_output(rows.clone(), channels, m, columns) };
                });
            });
        });
    }

    /// `B^T d B` of some channels into panels `[36][tiles / 16][c_in][16]`.
    ///
    /// # Safety
    /// `v` holds 36 planes, and nobody else touches the elements of these channels.
    unsafe fn transform_input(
        &self,
        rows: Range<usize>,
        channels: Range<usize>,
        v: Shared,
        v_plane: usize,
    ) {
        let c_in = self.kernels.c_in;
        let mut points = [[0f32; LANES]; POINTS];
        let blank = [[0f32; ROW]; SIDE];
        let mut blocks: Vec<_> = blocks(self.grid, rows).map(|block| (block, blank)).collect();
        for channel in channels {
            for (block, pixels) in &mut blocks {
                block.load(self.grid, |sample| sample * c_in + channel, self.x, pixels);
                if block.rows * (block.columns + 1) <= 9 {
                    transform_tiles_8(pixels, &mut points);
                } else {
                    transform_tiles(pixels, &mut points);
                }
                for r in 0..block.rows {
                    let (mut tile, mut lane) =
                        (block.tile + r * block.columns, r * (block.columns + 1));
                    let end = lane + block.columns;
                    while lane < end {
                        let count = (LANES - tile % LANES).min(end - lane);
                        let to = (tile / LANES * c_in + channel) * LANES + tile % LANES;
                        // SAFETY: `tile` is within the panels of a plane, and `count` within its lanes.
                        unsafe { scatter(&points, lane, count, v.at(to), v_plane) };
                        tile += count;
                        lane += count;
                    }
                }
            }
        }
    }

    /// `A^T m A` of some channels, `m` `[36, channels, columns]`, into the output.
    ///
    /// # Safety
    /// Nobody else writes the pixels of these tiles and channels.
    unsafe fn transform_output(
        &self,
        rows: Range<usize>,
        channels: Range<usize>,
        m: &[f32],
        columns: usize,
    ) {
        let plane = channels.len() * columns + GAP;
        let mut pixels = [[0f32; LANES * STEP]; STEP];
        for (i, channel) in channels.enumerate() {
            let bias = self.bias.map_or(0.0, |bias| bias[channel]);
            for block in blocks(self.grid, rows.clone()) {
                transform_output(&m[i * columns + block.tile..], plane, bias, &mut pixels);
                // SAFETY: passed on.
                unsafe { block.store(&pixels, self.grid, channel, self.kernels.c_out, self.out) };
            }
        }
    }
}
