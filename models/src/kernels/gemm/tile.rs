//! The innermost loops: one tile of the product in registers.

use super::LANES;
use crate::kernels::simd::Level;

/// Most rows, and the columns, of a tile that is written through a buffer.
const BUFFER: (usize, usize) = (6, LANES);

/// Rows, and panels of columns, of the register tile.
pub(super) fn tile_shape(level: Level) -> (usize, usize) {
    match level {
        #[cfg(target_arch = "x86_64")]
        Level::Avx512 => (8, 3),
        #[cfg(target_arch = "x86_64")]
        Level::Avx2 => (6, 1),
        Level::Baseline => (4, 1),
    }
}

/// Whether the level stores parts of a panel.
fn masks_stores(level: Level) -> bool {
    match level {
        #[cfg(target_arch = "x86_64")]
        Level::Avx512 => true,
        #[cfg(target_arch = "x86_64")]
        Level::Avx2 => false,
        Level::Baseline => false,
    }
}

/// One register tile of the product.
pub(super) struct Tile {
    pub(super) level: Level,
    pub(super) rows: usize,
    pub(super) columns: usize,
    pub(super) depth: usize,
    pub(super) a: *const f32,
    pub(super) a_strides: (usize, usize),
    pub(super) b: *const f32,
    pub(super) b_strides: (usize, usize),
}

impl Tile {
    /// Adds the tile to `C`, or writes it when `fresh`. A tile with a part of a panel goes through a buffer
    /// unless the level can leave out columns.
    ///
    /// # Safety
    /// `a`, `b` and `c` are valid for the tile; of `c` only `rows` x `columns`.
    pub(super) unsafe fn run(&self, c: *mut f32, stride: usize, fresh: bool) {
        if self.columns.is_multiple_of(LANES) || masks_stores(self.level) {
            // SAFETY: promised by the caller.
            return unsafe { self.whole(c, stride, fresh) };
        }
        let mut buffer = [0f32; BUFFER.0 * BUFFER.1];
        let width = BUFFER.1;
        // SAFETY: the buffer holds the largest tile, and only `rows` x `columns` of `c` are touched.
        unsafe {
            for i in 0..self.rows {
                std::ptr::copy_nonoverlapping(
                    c.add(i * stride),
                    buffer.as_mut_ptr().add(i * width),
                    self.columns,
                );
            }
            self.whole(buffer.as_mut_ptr(), width, fresh);
            for i in 0..self.rows {
                std::ptr::copy_nonoverlapping(
                    buffer.as_ptr().add(i * width),
                    c.add(i * stride),
                    self.columns,
                );
            }
        }
    }

    /// # Safety
    /// As [`Tile::run`], with all columns of the last panel unless the level masks its stores.
    unsafe fn whole(&self, c: *mut f32, stride: usize, fresh: bool) {
        macro_rules! by_rows {
            ($kernel:ident, $panels:literal, [$($rows:literal)*]) => {
                match self.rows {
                    // SAFETY: the level was detected, the pointers are the caller's promise.
                    $($rows => unsafe { $kernel::<$rows, $panels>(self, c, stride, fresh) },)*
                    rows => unreachable!("a tile of {rows} rows"),
                }
            };
        }
        match (self.level, self.columns.div_ceil(LANES)) {
            #[cfg(target_arch = "x86_64")]
            (Level::Avx512, 3) => by_rows!(tile_avx512, 3, [1 2 3 4 5 6 7 8]),
            #[cfg(target_arch = "x86_64")]
            (Level::Avx512, 2) => by_rows!(tile_avx512, 2, [1 2 3 4 5 6 7 8]),
            #[cfg(target_arch = "x86_64")]
            (Level::Avx512, _) => by_rows!(tile_avx512, 1, [1 2 3 4 5 6 7 8]),
            #[cfg(target_arch = "x86_64")]
            (Level::Avx2, _) => by_rows!(tile_avx2, 1, [1 2 3 4 5 6]),
            (Level::Baseline, _) => by_rows!(tile_baseline, 1, [1 2 3 4]),
        }
    }
}

/// # Safety
/// AVX-512F is there and the tile's pointers are valid.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f")]
unsafe fn tile_avx512<const R: usize, const P: usize>(
    t: &Tile,
    c: *mut f32,
    stride: usize,
    fresh: bool,
) {
    use std::arch::x86_64::{
        _mm512_fmadd_ps, _mm512_loadu_ps, _mm512_mask_storeu_ps, _mm512_maskz_loadu_ps,
        _mm512_set1_ps, _mm512_setzero_ps,
    };
    let mut sums = [[_mm512_setzero_ps(); P]; R];
    let mut masks = [u16::MAX; P];
    masks[P - 1] >>= P * LANES - t.columns;
    // SAFETY: all addresses are within the tile, promised by the caller; masked lanes are not touched.
    unsafe {
        if !fresh {
            for (i, row) in sums.iter_mut().enumerate() {
                for (p, sum) in row.iter_mut().enumerate() {
                    *sum = _mm512_maskz_loadu_ps(masks[p], c.add(i * stride + p * LANES));
                }
            }
        }
        let (mut a, mut b) = (t.a, t.b);
        for _ in 0..t.depth {
            let mut right = [_mm512_setzero_ps(); P];
            for (p, right) in right.iter_mut().enumerate() {
                *right = _mm512_loadu_ps(b.add(p * t.b_strides.0));
            }
            for (i, row) in sums.iter_mut().enumerate() {
                let left = _mm512_set1_ps(*a.add(i * t.a_strides.0));
                for (sum, right) in row.iter_mut().zip(right) {
                    *sum = _mm512_fmadd_ps(left, right, *sum);
                }
            }
            a = a.wrapping_add(t.a_strides.1);
            b = b.wrapping_add(t.b_strides.1);
        }
        for (i, row) in sums.iter().enumerate() {
            for (p, sum) in row.iter().enumerate() {
                _mm512_mask_storeu_ps(c.add(i * stride + p * LANES), masks[p], *sum);
            }
        }
    }
}

/// # Safety
/// AVX2 and FMA are there and the tile's pointers are valid.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma")]
unsafe fn tile_avx2<const R: usize, const P: usize>(
    t: &Tile,
    c: *mut f32,
    stride: usize,
    fresh: bool,
) {
    use std::arch::x86_64::{
        _mm256_fmadd_ps, _mm256_loadu_ps, _mm256_set1_ps, _mm256_setzero_ps, _mm256_storeu_ps,
    };
    const HALF: usize = LANES / 2;
    let mut sums = [[[_mm256_setzero_ps(); 2]; P]; R];
    // SAFETY: all addresses are within the tile, promised by the caller.
    unsafe {
        if !fresh {
            for (i, row) in sums.iter_mut().enumerate() {
                for (p, sum) in row.as_flattened_mut().iter_mut().enumerate() {
                    *sum = _mm256_loadu_ps(c.add(i * stride + p * HALF));
                }
            }
        }
        let (mut a, mut b) = (t.a, t.b);
        for _ in 0..t.depth {
            for p in 0..P {
                let panel = b.add(p * t.b_strides.0);
                let (low, high) = (_mm256_loadu_ps(panel), _mm256_loadu_ps(panel.add(HALF)));
                for (i, row) in sums.iter_mut().enumerate() {
                    let left = _mm256_set1_ps(*a.add(i * t.a_strides.0));
                    row[p][0] = _mm256_fmadd_ps(left, low, row[p][0]);
                    row[p][1] = _mm256_fmadd_ps(left, high, row[p][1]);
                }
            }
            a = a.wrapping_add(t.a_strides.1);
            b = b.wrapping_add(t.b_strides.1);
        }
        for (i, row) in sums.iter().enumerate() {
            for (p, sum) in row.as_flattened().iter().enumerate() {
                _mm256_storeu_ps(c.add(i * stride + p * HALF), *sum);
            }
        }
    }
}

/// # Safety
/// The tile's pointers are valid.
unsafe fn tile_baseline<const R: usize, const P: usize>(
    t: &Tile,
    c: *mut f32,
    stride: usize,
    fresh: bool,
) {
    let mut sums = [[[0f32; LANES]; P]; R];
    // SAFETY: all addresses are within the tile, promised by the caller.
    unsafe {
        if !fresh {
            for (i, row) in sums.iter_mut().enumerate() {
                for (p, sum) in row.as_flattened_mut().iter_mut().enumerate() {
                    *sum = *c.add(i * stride + p);
                }
            }
        }
        let (mut a, mut b) = (t.a, t.b);
        for _ in 0..t.depth {
            for p in 0..P {
                let right = *b.add(p * t.b_strides.0).cast::<[f32; LANES]>();
                for (i, row) in sums.iter_mut().enumerate() {
                    let left = *a.add(i * t.a_strides.0);
                    for (sum, right) in row[p].iter_mut().zip(right) {
                        *sum = multiply_add(left, right, *sum);
                    }
                }
            }
            a = a.wrapping_add(t.a_strides.1);
            b = b.wrapping_add(t.b_strides.1);
        }
        for (i, row) in sums.iter().enumerate() {
            for (p, sum) in row.as_flattened().iter().enumerate() {
                *c.add(i * stride + p) = *sum;
            }
        }
    }
}

/// Fused where the target has it; without hardware, `mul_add` is a slow library call.
pub(super) fn multiply_add(a: f32, b: f32, c: f32) -> f32 {
    if cfg!(any(target_arch = "aarch64", target_feature = "fma")) {
        a.mul_add(b, c)
    } else {
        a * b + c
    }
}
