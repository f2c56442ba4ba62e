//! Attention, tile by tile (Dao et al., "FlashAttention", arXiv 2205.14135): scores exist for one tile of
//! queries and one block of keys at a time.

use rayon::prelude::*;

use super::elementwise::exp;
use super::gemm::{LANES, Lhs, Rhs, Start, gemm, pack, packed_len};
use super::scratch::{Shared, with_scratch};
use super::simd::dispatch;

/// Rows (queries, or keys in the second backward pass) of a tile.
const TILE: usize = 64;
/// Columns that a tile meets at once.
const BLOCK: usize = 256;

/// Sizes of `heads` independent problems: `n` queries, `m` keys and values of width `d`.
#[derive(Clone, Copy)]
pub(crate) struct Shape {
    /// Samples times heads.
    pub(crate) heads: usize,
    /// Queries.
    pub(crate) n: usize,
    /// Keys.
    pub(crate) m: usize,
    /// Width.
    pub(crate) d: usize,
    /// Factor of the scores.
    pub(crate) scale: f32,
    /// Whether query `i` sees keys `0..=i` only.
    pub(crate) causal: bool,
    /// Added to every query's scaled score of the last key.
    pub(crate) last: f32,
}

/// A matrix `[rows, d]` per head as a right factor, in panels over its rows' width or, transposed, over
/// its rows.
struct Packed {
    data: Vec<f32>,
    head: usize,
    panel: usize,
}

impl Packed {
    /// `B[k, j] = x[k, j]`: sums run over rows.
    fn rows(x: &[f32], rows: usize, d: usize) -> Self {
        Self::new(x, [rows, d], d, (d, 1))
    }

    /// `B[k, j] = x[j, k]`: sums run over the width.
    fn transposed(x: &[f32], rows: usize, d: usize) -> Self {
        Self::new(x, [d, rows], d, (1, d))
    }

    fn new(x: &[f32], [k, n]: [usize; 2], d: usize, (row, col): (usize, usize)) -> Self {
        let head = packed_len([k, n]);
        let mut data = vec![0f32; x.len() / (k * n) * head];
        debug_assert!(row == d || col == d);
        data.par_chunks_mut(head)
            .zip(x.par_chunks(k * n))
            .for_each(|(packed, x)| pack([k, n], x, row, col, packed));
        Self { data, head, panel: k * LANES }
    }

    /// From row `k` on.
    fn rows_from(&self, head: usize, k: usize) -> Rhs<'_> {
        Rhs {
            data: &self.data[head * self.head + k * LANES..][..self.head - k * LANES],
            panel: self.panel,
            row: LANES,
        }
    }

    /// From column `j`, a multiple of [`LANES`], on.
    fn columns_from(&self, head: usize, j: usize) -> Rhs<'_> {
        let start = j / LANES * self.panel;
        Rhs {
            data: &self.data[head * self.head + start..][..self.head - start],
            panel: self.panel,
            row: LANES,
        }
    }
}

/// `y` `[heads, n, d]` and the logarithms of the sums of exponentials, `log_sums` `[heads, n]`.
pub(crate) fn attention(
    s: Shape,
    q: &[f32],
    k: &[f32],
    v: &[f32],
    y: &mut [f32],
    log_sums: &mut [f32],
) {
    let (kt, v) = (Packed::transposed(k, s.m, s.d), Packed::rows(v, s.m, s.d));
    let tiles = s.n.div_ceil(TILE);
    let (y, log_sums) = (Shared::new(y), Shared::new(log_sums));
    (0..s.heads * tiles).into_par_iter().for_each(|task| {
        let (head, first) = (task / tiles, task % tiles * TILE);
        let rows = TILE.min(s.n - first);
        let at = head * s.n + first;
        // SAFETY: each task has its own rows of both outputs.
        let (y, log_sums) = unsafe {
            (
                std::slice::from_raw_parts_mut(y.at(at * s.d), rows * s.d),
                std::slice::from_raw_parts_mut(log_sums.at(at), rows),
            )
        };
        let q = Lhs { data: &q[at * s.d..][..rows * s.d], row: s.d, col: 1 };
        let mut softmax = Online { max: [f32::NEG_INFINITY; TILE], sum: [0.0; TILE] };
        with_scratch(TILE * BLOCK, |scores| {
            for (block, columns) in s.blocks(first + rows) {
                gemm(
                    [rows, columns, s.d],
                    q,
                    kt.columns_from(head, block),
                    Start::Zero,
                    scores,
                    BLOCK,
                );
                s.add_to_last(scores, rows, (block, columns), BLOCK);
                let visible = |row: usize| s.visible(first + row, block, columns);
                softmax.add(scores, rows, columns, s.scale, visible, y, s.d);
                let p = Lhs { data: scores, row: BLOCK, col: 1 };
                let start = if block == 0 { Start::Zero } else { Start::Accumulate };
                gemm([rows, s.d, columns], p, v.rows_from(head, block), start, y, s.d);
            }
        });
        for (row, y) in y.chunks_exact_mut(s.d).enumerate() {
            let inverse = 1.0 / softmax.sum[row];
            y.iter_mut().for_each(|y| *y *= inverse);
            log_sums[row] = softmax.max[row] + softmax.sum[row].ln();
        }
    });
}

impl Shape {
    /// The blocks of keys, `(first, count)`, that the queries before `end` see.
    fn blocks(self, end: usize) -> impl Iterator<Item = (usize, usize)> {
        let keys = if self.causal { end.min(self.m) } else { self.m };
        (0..keys).step_by(BLOCK).map(move |first| (first, BLOCK.min(keys - first)))
    }

    /// Adds `last` to the scores, not scaled yet, of the last key if it is among these.
    fn add_to_last(self, scores: &mut [f32], rows: usize, keys: (usize, usize), stride: usize) {
        let (first, count) = keys;
        if self.last != 0.0 && first + count == self.m {
            for row in scores.chunks_mut(stride).take(rows) {
                row[count - 1] += self.last / self.scale;
            }
        }
    }

    /// How many of the `columns` keys from `block` on a query sees.
    fn visible(self, query: usize, block: usize, columns: usize) -> usize {
        if self.causal { (query + 1).saturating_sub(block).min(columns) } else { columns }
    }
}

/// The running softmax of a tile.
struct Online {
    max: [f32; TILE],
    sum: [f32; TILE],
}

impl Online {
    /// Turns scores into exponentials against the new maximum; what was summed before is scaled to it.
    #[expect(clippy::too_many_arguments, reason = "the loop body of `attention`")]
    fn add(
        &mut self,
        scores: &mut [f32],
        rows: usize,
        columns: usize,
        scale: f32,
        visible: impl Fn(usize) -> usize,
        y: &mut [f32],
        d: usize,
    ) {
        for (row, scores) in scores.chunks_exact_mut(BLOCK).take(rows).enumerate() {
            let (seen, hidden) = scores[..columns].split_at_mut(visible(row));
            hidden.fill(0.0);
            let (mut max, mut sum) = (self.max[row], 0.0);
            exponentials(seen, scale, &mut max, &mut sum);
            let shrink =
                if self.max[row] == f32::NEG_INFINITY { 0.0 } else { exp(self.max[row] - max) };
            if self.sum[row] > 0.0 && shrink != 1.0 {
                y[row * d..][..d].iter_mut().for_each(|y| *y *= shrink);
            }
            self.sum[row] = self.sum[row] * shrink + sum;
            self.max[row] = max;
        }
    }
}

dispatch! {
    /// `scores = exp(scale scores - max)` with the new maximum of all, and their sum.
    fn exponentials(scores: &mut [f32], scale: f32, max: &mut f32, sum: &mut f32) = exponentials_body;
}

#[inline(always)]
fn exponentials_body(scores: &mut [f32], scale: f32, max: &mut f32, sum: &mut f32) {
    let mut lanes = [*max; LANES];
    for scores in scores.chunks_mut(LANES) {
        for (lane, score) in lanes.iter_mut().zip(scores) {
            *score *= scale;
            *lane = if *score > *lane { *score } else { *lane };
        }
    }
    *max = lanes.iter().fold(*max, |max, lane| if *lane > max { *lane } else { max });
    let mut sums = [0f32; LANES];
    for scores in scores.chunks_mut(LANES) {
        for (lane, score) in sums.iter_mut().zip(scores) {
            *score = exp(*score - *max);
            *lane += *score;
        }
    }
    *sum = sums.iter().sum();
}

/// What a backward pass reads, each `[heads, rows, d]` but `log_sums` `[heads, n]`.
#[derive(Clone, Copy)]
pub(crate) struct Saved<'a> {
    /// Queries.
    pub(crate) q: &'a [f32],
    /// Keys.
    pub(crate) k: &'a [f32],
    /// Values.
    pub(crate) v: &'a [f32],
    /// The output.
    pub(crate) y: &'a [f32],
    /// From [`attention`].
    pub(crate) log_sums: &'a [f32],
}

/// Gradients with respect to queries, keys and values.
///
/// With `P` the probabilities and `c` the row sums of `dy y`: `dS = P (dy v^T - c) scale`, `dq = dS k`,
/// `dk = dS^T q`, `dv = P^T dy`. Tiles of queries give `dq`; tiles of keys give `dk` and `dv`, for which
/// the scores are computed once more, so that no two tasks add to the same numbers.
pub(crate) fn attention_backward(
    s: Shape,
    saved: Saved<'_>,
    dy: &[f32],
    dq: &mut [f32],
    dk: &mut [f32],
    dv: &mut [f32],
) {
    let parts = Parts {
        s,
        saved,
        dy,
        centres: dy
            .chunks_exact(s.d)
            .zip(saved.y.chunks_exact(s.d))
            .map(|(dy, y)| dot(dy, y))
            .collect(),
        kt: Packed::transposed(saved.k, s.m, s.d),
        vt: Packed::transposed(saved.v, s.m, s.d),
    };
    parts.queries(dq);
    parts.keys(dk, dv);
}

fn dot(a: &[f32], b: &[f32]) -> f32 {
    let mut lanes = [0f32; LANES];
    for (a, b) in a.chunks(LANES).zip(b.chunks(LANES)) {
        for ((lane, a), b) in lanes.iter_mut().zip(a).zip(b) {
            *lane += a * b;
        }
    }
    lanes.iter().sum()
}

/// What both backward passes share.
struct Parts<'a> {
    s: Shape,
    saved: Saved<'a>,
    dy: &'a [f32],
    centres: Vec<f32>,
    kt: Packed,
    vt: Packed,
}

impl Parts<'_> {
    /// `P` and `dS` `[rows, columns]`, in rows of `stride`, of some queries and keys.
    fn probabilities(
        &self,
        head: usize,
        (query, rows): (usize, usize),
        (key, columns): (usize, usize),
        stride: usize,
        p: &mut [f32],
        ds: &mut [f32],
    ) {
        let (s, at) = (self.s, head * self.s.n + query);
        let size = [rows, columns, s.d];
        for (x, b, out) in [(self.saved.q, &self.kt, &mut *p), (self.dy, &self.vt, &mut *ds)] {
            let a = Lhs { data: &x[at * s.d..][..rows * s.d], row: s.d, col: 1 };
            gemm(size, a, b.columns_from(head, key), Start::Zero, out, stride);
        }
        s.add_to_last(p, rows, (key, columns), stride);
        let lines = p.chunks_mut(stride).zip(ds.chunks_mut(stride)).take(rows);
        for (row, (p, ds)) in lines.enumerate() {
            let seen = s.visible(query + row, key, columns);
            slopes(
                &mut p[..seen],
                &mut ds[..seen],
                s.scale,
                self.saved.log_sums[at + row],
                self.centres[at + row],
            );
            p[seen..columns].fill(0.0);
            ds[seen..columns].fill(0.0);
        }
    }

    fn queries(&self, dq: &mut [f32]) {
        let s = self.s;
        let k = Packed::rows(self.saved.k, s.m, s.d);
        let tiles = s.n.div_ceil(TILE);
        let dq = Shared::new(dq);
        (0..s.heads * tiles).into_par_iter().for_each(|task| {
            let (head, first) = (task / tiles, task % tiles * TILE);
            let rows = TILE.min(s.n - first);
            // SAFETY: each task has its own rows of the output.
            let dq = unsafe {
                std::slice::from_raw_parts_mut(dq.at((head * s.n + first) * s.d), rows * s.d)
            };
            with_scratch(2 * TILE * BLOCK, |scratch| {
                let (p, ds) = scratch.split_at_mut(TILE * BLOCK);
                for (block, columns) in s.blocks(first + rows) {
                    self.probabilities(head, (first, rows), (block, columns), BLOCK, p, ds);
                    let start = if block == 0 { Start::Zero } else { Start::Accumulate };
                    let ds = Lhs { data: ds, row: BLOCK, col: 1 };
                    gemm([rows, s.d, columns], ds, k.rows_from(head, block), start, dq, s.d);
                }
            });
        });
    }

    fn keys(&self, dk: &mut [f32], dv: &mut [f32]) {
        let s = self.s;
        let (q, dy) = (Packed::rows(self.saved.q, s.n, s.d), Packed::rows(self.dy, s.n, s.d));
        let tiles = s.m.div_ceil(TILE);
        let (dk, dv) = (Shared::new(dk), Shared::new(dv));
        (0..s.heads * tiles).into_par_iter().for_each(|task| {
            let (head, first) = (task / tiles, task % tiles * TILE);
            let columns = TILE.min(s.m - first);
            let at = (head * s.m + first) * s.d;
            // SAFETY: each task has its own rows of both outputs.
            let (dk, dv) = unsafe {
                (
                    std::slice::from_raw_parts_mut(dk.at(at), columns * s.d),
                    std::slice::from_raw_parts_mut(dv.at(at), columns * s.d),
                )
            };
            with_scratch(2 * BLOCK * TILE, |scratch| {
                let (p, ds) = scratch.split_at_mut(BLOCK * TILE);
                dk.fill(0.0);
                dv.fill(0.0);
                let start = if s.causal { first / BLOCK * BLOCK } else { 0 };
                for query in (start..s.n).step_by(BLOCK) {
                    let rows = BLOCK.min(s.n - query);
                    self.probabilities(head, (query, rows), (first, columns), TILE, p, ds);
                    let size = [columns, s.d, rows];
                    let transposed = |data| Lhs { data, row: 1, col: TILE };
                    gemm(
                        size,
                        transposed(p),
                        dy.rows_from(head, query),
                        Start::Accumulate,
                        dv,
                        s.d,
                    );
                    gemm(
                        size,
                        transposed(ds),
                        q.rows_from(head, query),
                        Start::Accumulate,
                        dk,
                        s.d,
                    );
                }
            });
        });
    }
}

dispatch! {
    /// `p = exp(scale p - log_sum)`, `ds = p (ds - centre) scale`.
    fn slopes(p: &mut [f32], ds: &mut [f32], scale: f32, log_sum: f32, centre: f32) = slopes_body;
}

#[inline(always)]
fn slopes_body(p: &mut [f32], ds: &mut [f32], scale: f32, log_sum: f32, centre: f32) {
    for (p, ds) in p.iter_mut().zip(ds) {
        *p = exp(*p * scale - log_sum);
        *ds = *p * (*ds - centre) * scale;
    }
}
