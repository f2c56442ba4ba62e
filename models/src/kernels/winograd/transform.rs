//! The three transforms and the matrices they are made of, for [`LANES`] tiles or kernels at once.

use super::{POINTS, ROW, SIDE, STEP};
use crate::kernels::gemm::LANES;
use crate::kernels::simd::dispatch;

dispatch! {
    /// `B^T d B` for 16 tiles side by side.
    pub(super) fn transform_tiles(pixels: &[[f32; ROW]; SIDE], points: &mut [[f32; LANES]; POINTS]) = transform_tiles_body::<LANES>;
}

dispatch! {
    /// The same for 8 tiles; the other lanes of `points` are left alone.
    pub(super) fn transform_tiles_8(pixels: &[[f32; ROW]; SIDE], points: &mut [[f32; LANES]; POINTS]) = transform_tiles_body::<8>;
}

#[inline(always)]
fn transform_tiles_body<const N: usize>(
    pixels: &[[f32; ROW]; SIDE],
    points: &mut [[f32; LANES]; POINTS],
) {
    let mut down = [[0f32; ROW]; SIDE];
    for i in 0..(N + 1) * STEP {
        let column = input_1d([
            pixels[0][i],
            pixels[1][i],
            pixels[2][i],
            pixels[3][i],
            pixels[4][i],
            pixels[5][i],
        ]);
        for (row, value) in down.iter_mut().zip(column) {
            row[i] = value;
        }
    }
    for (row, points) in down.iter().zip(points.chunks_exact_mut(SIDE)) {
        let mut phase = [[0f32; LANES + 1]; STEP];
        for t in 0..N + 1 {
            for (p, phase) in phase.iter_mut().enumerate() {
                phase[t] = row[t * STEP + p];
            }
        }
        for t in 0..N {
            let [a, b, c, d] = &phase;
            let across = input_1d([a[t], b[t], c[t], d[t], a[t + 1], b[t + 1]]);
            for (point, value) in points.iter_mut().zip(across) {
                point[t] = value;
            }
        }
    }
}

/// `B^T d`.
#[inline(always)]
fn input_1d([d0, d1, d2, d3, d4, d5]: [f32; SIDE]) -> [f32; SIDE] {
    let (even, odd) = (d4 - 4.0 * d2, d3 - 4.0 * d1);
    let (even2, odd2) = (d4 - d2, 2.0 * (d3 - d1));
    [
        4.0 * d0 - 5.0 * d2 + d4,
        even + odd,
        even - odd,
        even2 + odd2,
        even2 - odd2,
        4.0 * d1 - 5.0 * d3 + d5,
    ]
}

dispatch! {
    /// `A^T m A` plus the bias for 16 tiles, as four rows of 64 pixels.
    pub(super) fn transform_output(m: &[f32], plane: usize, bias: f32, pixels: &mut [[f32; LANES * STEP]; STEP]) = transform_output_body;
}

#[inline(always)]
fn transform_output_body(
    m: &[f32],
    plane: usize,
    bias: f32,
    pixels: &mut [[f32; LANES * STEP]; STEP],
) {
    let mut down = [[[0f32; LANES]; SIDE]; STEP];
    for column in 0..SIDE {
        let points: [&[f32; LANES]; SIDE] = std::array::from_fn(|i| {
            m[(i * SIDE + column) * plane..].first_chunk().expect("planes are followed by a gap")
        });
        for t in 0..LANES {
            let values = output_1d(points.map(|point| point[t]));
            for (down, value) in down.iter_mut().zip(values) {
                down[column][t] = value;
            }
        }
    }
    for (row, line) in down.iter().zip(pixels.iter_mut()) {
        let mut phase = [[0f32; LANES]; STEP];
        for t in 0..LANES {
            let values = output_1d(std::array::from_fn(|i| row[i][t]));
            for (phase, value) in phase.iter_mut().zip(values) {
                phase[t] = value + bias;
            }
        }
        for (t, pixels) in line.chunks_exact_mut(STEP).enumerate() {
            for (p, pixel) in pixels.iter_mut().enumerate() {
                *pixel = phase[p][t];
            }
        }
    }
}

/// `A^T m`.
#[inline(always)]
fn output_1d([m0, m1, m2, m3, m4, m5]: [f32; SIDE]) -> [f32; STEP] {
    let (sum, difference) = (m1 + m2, m1 - m2);
    let (sum2, difference2) = (m3 + m4, m3 - m4);
    [
        m0 + sum + sum2,
        difference + 2.0 * difference2,
        sum + 4.0 * sum2,
        difference + 8.0 * difference2 + m5,
    ]
}

dispatch! {
    /// `G g G^T` for 16 kernels.
    pub(super) fn transform_kernels(g: &[[f32; LANES]; 9], u: &mut [[f32; LANES]; POINTS]) = transform_kernels_body;
}

#[inline(always)]
fn transform_kernels_body(g: &[[f32; LANES]; 9], u: &mut [[f32; LANES]; POINTS]) {
    let mut down = [[[0f32; LANES]; 3]; SIDE];
    for column in 0..3 {
        for lane in 0..LANES {
            let values = kernel_1d([g[column][lane], g[3 + column][lane], g[6 + column][lane]]);
            for (down, value) in down.iter_mut().zip(values) {
                down[column][lane] = value;
            }
        }
    }
    for (row, u) in down.iter().zip(u.chunks_exact_mut(SIDE)) {
        for lane in 0..LANES {
            let values = kernel_1d([row[0][lane], row[1][lane], row[2][lane]]);
            for (u, value) in u.iter_mut().zip(values) {
                u[lane] = value;
            }
        }
    }
}

/// `G g`.
#[inline(always)]
fn kernel_1d([g0, g1, g2]: [f32; 3]) -> [f32; SIDE] {
    let ends = (g0 + g2) * (-1.0 / 6.0);
    let near = g0 * (1.0 / 24.0) + g2 * (1.0 / 6.0);
    let (middle, middle2) = (g1 * (1.0 / 6.0), g1 * (1.0 / 12.0));
    [g0 * 0.25, ends - middle, ends + middle, near + middle2, near - middle2, g2]
}

dispatch! {
    /// Writes `count` lanes from `lane` on of every point, planes `plane` apart.
    ///
    /// # Safety
    /// `to` and the same place in the other 35 planes are valid for `count` floats.
    pub(super) unsafe fn scatter(points: &[[f32; LANES]; POINTS], lane: usize, count: usize, to: *mut f32, plane: usize) = scatter_body;
}

/// # Safety
/// As [`scatter`].
#[inline(always)]
unsafe fn scatter_body(
    points: &[[f32; LANES]; POINTS],
    lane: usize,
    count: usize,
    to: *mut f32,
    plane: usize,
) {
    // SAFETY: promised by the caller.
    unsafe {
        match count {
            LANES => scatter_exactly::<LANES>(points, lane, to, plane),
            8 => scatter_exactly::<8>(points, lane, to, plane),
            4 => scatter_exactly::<4>(points, lane, to, plane),
            2 => scatter_exactly::<2>(points, lane, to, plane),
            _ => (0..count).for_each(|l| scatter_exactly::<1>(points, lane + l, to.add(l), plane)),
        }
    }
}

/// # Safety
/// As [`scatter`], with `N` lanes.
#[inline(always)]
unsafe fn scatter_exactly<const N: usize>(
    points: &[[f32; LANES]; POINTS],
    lane: usize,
    to: *mut f32,
    plane: usize,
) {
    for (i, values) in points.iter().enumerate() {
        let lanes: &[f32; N] = values[lane..].first_chunk().expect("`lane + N` is at most 16");
        // SAFETY: promised by the caller.
        unsafe { to.add(i * plane).cast::<[f32; N]>().write_unaligned(*lanes) };
    }
}
