//! Matrix product with one fixed order of summation.
//!
//! `C[i, j] = start + sum over k of A[i, k] B[k, j]`, where every element of `C` is summed in the order of `k`
//! with fused multiply-adds, in blocks of [`DEPTH`]. Its bits therefore depend on row `i` and column `j` alone,
//! and not on how many rows, columns, samples or threads there are. (The `gemm` crate picks another
//! order for other numbers of columns, which would make an image depend on its batch.)

mod tile;

use tile::{Tile, tile_shape};

use super::simd::Level;

/// Columns of a panel of `B`.
pub(crate) const LANES: usize = 16;
/// Terms summed in registers before they are added to `C`: three panels of this depth fit in a 48 KiB cache.
const DEPTH: usize = 192;
/// The left factor, read in place: element `(i, k)` is at `i * row + k * col`.
#[derive(Clone, Copy)]
pub(crate) struct Lhs<'a> {
    /// The elements.
    pub(crate) data: &'a [f32],
    /// Distance between rows.
    pub(crate) row: usize,
    /// Distance between columns.
    pub(crate) col: usize,
}

/// The right factor in panels of [`LANES`] columns: element `(k, j)` is at
/// `j / LANES * panel + k * row + j % LANES`. The last panel is complete; what its spare columns hold
/// does not matter.
#[derive(Clone, Copy)]
pub(crate) struct Rhs<'a> {
    /// The elements.
    pub(crate) data: &'a [f32],
    /// Distance between panels.
    pub(crate) panel: usize,
    /// Distance between rows.
    pub(crate) row: usize,
}

impl<'a> Rhs<'a> {
    /// Panels stored one after another, `[panels, k, LANES]`.
    pub(crate) fn packed(data: &'a [f32], k: usize) -> Self {
        Self { data, panel: k * LANES, row: LANES }
    }
}

/// What the sums start from.
#[derive(Clone, Copy)]
pub(crate) enum Start<'a> {
    /// Nothing.
    Zero,
    /// What `C` holds.
    Accumulate,
    /// One number for each row.
    RowBias(&'a [f32]),
    /// One number for each column.
    ColumnBias(&'a [f32]),
}

/// `C = start + A B` with `C` `[m, n]` in rows `stride` apart.
pub(crate) fn gemm(
    [m, n, k]: [usize; 3],
    a: Lhs<'_>,
    b: Rhs<'_>,
    start: Start<'_>,
    c: &mut [f32],
    stride: usize,
) {
    if m == 0 || n == 0 {
        return;
    }
    assert!(n <= stride && (m - 1) * stride + n <= c.len(), "gemm: C is too small");
    // SAFETY: the rows of `C` are within the slice, which nobody else writes.
    unsafe { gemm_raw([m, n, k], a, b, start, c.as_mut_ptr(), stride) }
}

/// [`gemm`] on a part of an output that other threads write elsewhere.
///
/// # Safety
/// `c + i * stride + j` is valid for every `i < m`, `j < n`, and nobody else touches these elements.
pub(crate) unsafe fn gemm_raw(
    size: [usize; 3],
    a: Lhs<'_>,
    b: Rhs<'_>,
    start: Start<'_>,
    c: *mut f32,
    stride: usize,
) {
    // SAFETY: passed on to the caller; the level was detected.
    unsafe { gemm_at(Level::detect(), size, a, b, start, c, stride) }
}

/// [`gemm_raw`] with the instructions of a level.
///
/// # Safety
/// As [`gemm_raw`], and this machine has the level.
unsafe fn gemm_at(
    level: Level,
    [m, n, k]: [usize; 3],
    a: Lhs<'_>,
    b: Rhs<'_>,
    start: Start<'_>,
    c: *mut f32,
    stride: usize,
) {
    let panels = n.div_ceil(LANES);
    if m == 0 || n == 0 {
        return;
    }
    if k == 0 {
        // SAFETY: passed on to the caller.
        unsafe { begin(start, 0..m, 0..n, c, stride) };
        return;
    }
    assert!((m - 1) * a.row + (k - 1) * a.col < a.data.len(), "gemm: A is too small");
    assert!(
        (panels - 1) * b.panel + (k - 1) * b.row + LANES <= b.data.len(),
        "gemm: B is too small"
    );
    let (rows, width) = tile_shape(level);
    let mut j = 0;
    while j < n {
        // Two and two panels are faster than three and one.
        let width = if (n - j).div_ceil(LANES) == 4 { width.min(2) } else { width };
        let columns = (n - j).min(width * LANES);
        for k0 in (0..k).step_by(DEPTH) {
            let depth = (k - k0).min(DEPTH);
            for i in (0..m).step_by(rows) {
                let height = (m - i).min(rows);
                let tile = Tile {
                    level,
                    rows: height,
                    columns,
                    depth,
                    a: a.data[i * a.row + k0 * a.col..].as_ptr(),
                    a_strides: (a.row, a.col),
                    b: b.data[j / LANES * b.panel + k0 * b.row..].as_ptr(),
                    b_strides: (b.panel, b.row),
                };
                let fresh = k0 == 0 && matches!(start, Start::Zero);
                // SAFETY: the tile is within the bounds that were asserted, `C` is the caller's promise.
                unsafe {
                    if k0 == 0 && !fresh {
                        begin(start, i..i + height, j..j + columns, c, stride);
                    }
                    tile.run(c.add(i * stride + j), stride, fresh);
                }
            }
        }
        j += columns;
    }
}

/// Writes the start value of a part of `C`.
///
/// # Safety
/// The part is valid, and nobody else touches it.
unsafe fn begin(
    start: Start<'_>,
    rows: std::ops::Range<usize>,
    columns: std::ops::Range<usize>,
    c: *mut f32,
    stride: usize,
) {
    for i in rows {
        // SAFETY: promised by the caller.
        let row = unsafe {
            std::slice::from_raw_parts_mut(c.add(i * stride + columns.start), columns.len())
        };
        match start {
            Start::Zero => row.fill(0.0),
            Start::Accumulate => {}
            Start::RowBias(bias) => row.fill(bias[i]),
            Start::ColumnBias(bias) => row.copy_from_slice(&bias[columns.clone()]),
        }
    }
}

/// Copies `B` `[k, n]`, element `(k, j)` at `k * row + j * col`, into panels `[n / LANES, k, LANES]`, with
/// zeros in the spare columns.
pub(crate) fn pack([k, n]: [usize; 2], data: &[f32], row: usize, col: usize, packed: &mut [f32]) {
    for (p, panel) in packed.chunks_exact_mut(k * LANES).take(n.div_ceil(LANES)).enumerate() {
        let columns = (n - p * LANES).min(LANES);
        for (i, lanes) in panel.chunks_exact_mut(LANES).enumerate() {
            let source = &data[i * row + p * LANES * col..];
            if col == 1 && columns == LANES {
                lanes.copy_from_slice(&source[..LANES]);
                continue;
            }
            for (j, lane) in lanes.iter_mut().enumerate() {
                *lane = if j < columns { source[j * col] } else { 0.0 };
            }
        }
    }
}

/// Floats that [`pack`] writes.
pub(crate) fn packed_len([k, n]: [usize; 2]) -> usize {
    n.div_ceil(LANES) * LANES * k
}

#[cfg(test)]
mod tests {
    use super::tile::multiply_add;
    use super::*;

    fn numbers(n: usize, seed: u32) -> Vec<f32> {
        let mut state = seed;
        (0..n)
            .map(|_| {
                state = state.wrapping_mul(1664525).wrapping_add(1013904223);
                (state >> 8) as f32 / (1 << 23) as f32 - 1.0
            })
            .collect()
    }

    /// Every level that this machine has gives the same bits as sums in the order of `k`.
    #[test]
    fn sums_in_order_of_k() {
        for [m, n, k] in [[1, 1, 1], [9, 50, 200], [3, 33, 7], [17, 16, 400], [8, 97, 193]] {
            let (a, b, bias) = (numbers(m * k, 1), numbers(k * n, 2), numbers(n, 3));
            let mut packed = vec![0.0; packed_len([k, n])];
            pack([k, n], &b, n, 1, &mut packed);
            let (lhs, rhs) = (Lhs { data: &a, row: k, col: 1 }, Rhs::packed(&packed, k));
            for level in Level::available() {
                let mut c = vec![f32::NAN; m * n];
                let start = Start::ColumnBias(&bias);
                // SAFETY: `c` is `[m, n]`, and the level is there.
                unsafe { gemm_at(level, [m, n, k], lhs, rhs, start, c.as_mut_ptr(), n) };
                for (at, value) in c.iter().enumerate() {
                    let (i, j) = (at / n, at % n);
                    let sum = (0..k).fold(bias[j], |sum, p| {
                        let (x, y) = (a[i * k + p], b[p * n + j]);
                        if level == Level::Baseline {
                            multiply_add(x, y, sum)
                        } else {
                            x.mul_add(y, sum)
                        }
                    });
                    assert_eq!(
                        value.to_bits(),
                        sum.to_bits(),
                        "{level:?}: {m} x {n} x {k} at {i}, {j}"
                    );
                }
            }
        }
    }

    #[test]
    fn transposed_factor_and_accumulation() {
        let (m, n, k) = (5, 20, 11);
        let (a, b) = (numbers(m * k, 4), numbers(k * n, 5));
        let mut transposed = vec![0.0; m * k];
        for i in 0..m {
            for p in 0..k {
                transposed[p * m + i] = a[i * k + p];
            }
        }
        let mut packed = vec![0.0; packed_len([k, n])];
        pack([k, n], &b, n, 1, &mut packed);
        let rhs = Rhs::packed(&packed, k);
        let (mut once, mut twice) = (vec![0.0; m * n], vec![1.0; m * n]);
        gemm([m, n, k], Lhs { data: &a, row: k, col: 1 }, rhs, Start::Zero, &mut once, n);
        gemm(
            [m, n, k],
            Lhs { data: &transposed, row: 1, col: m },
            rhs,
            Start::Accumulate,
            &mut twice,
            n,
        );
        for (x, y) in once.iter().zip(&twice) {
            assert!((x + 1.0 - y).abs() < 1e-5);
        }
    }
}
