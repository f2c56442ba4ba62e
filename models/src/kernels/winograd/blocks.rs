//! Where the tiles of images lie, and how they are read and written.

use std::ops::Range;

use super::{ROW, SIDE, STEP};
use crate::kernels::gemm::LANES;
use crate::kernels::scratch::Shared;

/// Where the tiles of an image are.
#[derive(Clone, Copy)]
pub(super) struct Grid {
    pub(super) h: usize,
    pub(super) w: usize,
    /// Tiles side by side.
    pub(super) across: usize,
    /// Rows of tiles in one sample.
    pub(super) down: usize,
}

/// Up to 16 neighbouring tiles that are transformed at once: whole rows of tiles when rows are short,
/// else a part of one.
pub(super) struct Block {
    /// First row of tiles, counted over all samples, and how many.
    pub(super) row: usize,
    pub(super) rows: usize,
    /// First tile in its row, and how many of each row.
    pub(super) column: usize,
    pub(super) columns: usize,
    /// Number of its first tile within the unit.
    pub(super) tile: usize,
}

/// The blocks of some rows of tiles, in order.
pub(super) fn blocks(grid: Grid, rows: Range<usize>) -> impl Iterator<Item = Block> {
    // Short rows lie side by side in a block, one spare lane apart (see `Block::load`).
    let together = ((LANES + 1) / (grid.across + 1)).max(1);
    let first = rows.start;
    rows.clone().step_by(together).flat_map(move |row| {
        let rows = together.min(rows.end - row);
        (0..grid.across).step_by(LANES).map(move |column| Block {
            row,
            rows,
            column,
            columns: LANES.min(grid.across - column),
            tile: (row - first) * grid.across + column,
        })
    })
}

impl Block {
    /// Copies the input of all tiles of one channel to where it is within the image. The rest of `pixels`
    /// is left alone: it is zero, and is the same for all channels. Tile `t` of the `r`-th row starts at
    /// `STEP * (r * (columns + 1) + t)`: one spare lane holds what the last tile overlaps.
    pub(super) fn load(
        &self,
        grid: Grid,
        plane_of: impl Fn(usize) -> usize,
        x: &[f32],
        pixels: &mut [[f32; ROW]; SIDE],
    ) {
        let width = STEP * self.columns + SIDE - STEP;
        // A line starts one pixel to the left of its first tile.
        let (skip, left) = if self.column == 0 { (1, 0) } else { (0, STEP * self.column - 1) };
        let count = (width - skip).min(grid.w - left);
        for r in 0..self.rows {
            let (sample, top) = ((self.row + r) / grid.down, (self.row + r) % grid.down * STEP);
            let plane = &x[plane_of(sample) * grid.h * grid.w..][..grid.h * grid.w];
            let start = r * (self.columns + 1) * STEP + skip;
            for (i, line) in pixels.iter_mut().enumerate() {
                if top + i >= 1 && top + i <= grid.h {
                    copy(
                        &mut line[start..start + count],
                        &plane[(top + i - 1) * grid.w + left..][..count],
                    );
                }
            }
        }
    }

    /// Writes the pixels of one output channel that are within the image.
    ///
    /// # Safety
    /// Nobody else writes these pixels.
    pub(super) unsafe fn store(
        &self,
        pixels: &[[f32; LANES * STEP]; STEP],
        grid: Grid,
        channel: usize,
        c_out: usize,
        out: Shared,
    ) {
        let left = STEP * self.column;
        let count = (STEP * self.columns).min(grid.w - left);
        for r in 0..self.rows {
            let (sample, top) = ((self.row + r) / grid.down, (self.row + r) % grid.down * STEP);
            let plane = (sample * c_out + channel) * grid.h * grid.w;
            for (i, line) in pixels.iter().enumerate().take(grid.h - top) {
                // SAFETY: row `top + i < h` and columns `left + count <= w` of a plane of the output.
                unsafe {
                    let row = out.at(plane + (top + i) * grid.w + left);
                    copy(
                        std::slice::from_raw_parts_mut(row, count),
                        &line[r * self.columns * STEP..][..count],
                    );
                }
            }
        }
    }
}

/// Copies a line; a call would cost more than the copy for the very short lines of small images.
#[inline(always)]
fn copy(to: &mut [f32], from: &[f32]) {
    match (to.as_chunks_mut::<8>(), from.as_chunks::<8>()) {
        (([to], []), ([from], [])) => *to = *from,
        _ => to.copy_from_slice(from),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The unsafe writes rest on this: the blocks of some rows hold every tile once, in order.
    #[test]
    fn blocks_hold_every_tile_once() {
        for (h, w) in [(1, 1), (8, 8), (5, 70), (33, 24), (64, 64), (9, 61)] {
            let grid = Grid { h, w, across: w.div_ceil(STEP), down: h.div_ceil(STEP) };
            let rows = 1..3 * grid.down;
            let mut seen = vec![0u8; rows.len() * grid.across];
            for block in blocks(grid, rows.clone()) {
                assert!(block.rows * (block.columns + 1) <= LANES + 1, "a block has 16 lanes");
                for r in 0..block.rows {
                    let tile = (block.row + r - rows.start) * grid.across + block.column;
                    assert_eq!(
                        tile,
                        block.tile + r * block.columns,
                        "tiles of a block are neighbours"
                    );
                    seen[tile..tile + block.columns].iter_mut().for_each(|s| *s += 1);
                }
            }
            assert!(seen.iter().all(|&s| s == 1), "{h} x {w}");
        }
    }
}
