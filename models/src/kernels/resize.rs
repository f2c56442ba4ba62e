//! Separable resizing with banded weights.

use rayon::prelude::*;

use super::scratch::with_scratch;

/// The weights of one output: those of the inputs from `first` on.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Band {
    /// First input that counts.
    pub(crate) first: usize,
    /// The weights, from there on.
    pub(crate) weights: Vec<f32>,
}

/// The transpose of a banded matrix with `inputs` columns.
pub(crate) fn transpose(bands: &[Band], inputs: usize) -> Vec<Band> {
    (0..inputs)
        .map(|input| {
            let sees = |band: &Band| input >= band.first && input < band.first + band.weights.len();
            let first = bands.iter().position(sees).unwrap_or(0);
            let end = bands.iter().rposition(sees).map_or(0, |last| last + 1);
            let weight = |band: &Band| {
                input
                    .checked_sub(band.first)
                    .and_then(|i| band.weights.get(i))
                    .copied()
                    .unwrap_or(0.0)
            };
            Band { first, weights: bands[first..end.max(first)].iter().map(weight).collect() }
        })
        .collect()
}

/// Every plane `[h, w]` of `x` as `[rows, columns]`.
pub(crate) fn separable(
    x: &[f32],
    (h, w): (usize, usize),
    rows: &[Band],
    columns: &[Band],
    y: &mut [f32],
) {
    y.par_chunks_mut(rows.len() * columns.len()).zip(x.par_chunks(h * w)).for_each(|(y, x)| {
        with_scratch(w, |line| {
            for (y, row) in y.chunks_exact_mut(columns.len()).zip(rows) {
                line.fill(0.0);
                for (weight, x) in row.weights.iter().zip(x[row.first * w..].chunks_exact(w)) {
                    for (sum, x) in line.iter_mut().zip(x) {
                        *sum += weight * x;
                    }
                }
                for (y, column) in y.iter_mut().zip(columns) {
                    *y = column
                        .weights
                        .iter()
                        .zip(&line[column.first..])
                        .map(|(weight, x)| weight * x)
                        .sum();
                }
            }
        });
    });
}
