//! Resizing of pictures in bytes, bit for bit as Pillow does it up to version 12. (Version 13 takes
//! rows or columns first as it sees fit, which changes a rounding.)

use crate::layers::{Filter, Taps};

/// Bits behind the point of a weight: Pillow's `PRECISION_BITS`.
const BITS: u32 = 32 - 8 - 2;

/// An RGB8 picture, row by row.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Picture {
    pub(crate) height: usize,
    pub(crate) width: usize,
    pub(crate) rgb: Vec<u8>,
}

impl Picture {
    /// The picture at another size: first along the rows, then along the columns, each rounded to
    /// bytes.
    pub(crate) fn resized(&self, height: usize, width: usize, filter: Filter) -> Self {
        let mut picture = self.clone();
        if width != self.width {
            picture = picture.across(width, filter);
        }
        if height != self.height {
            picture = picture.transposed().across(height, filter).transposed();
        }
        picture
    }

    /// The middle of it, `height` x `width`, with black where it is too small: transformers'
    /// `center_crop`.
    pub(crate) fn cropped(&self, height: usize, width: usize) -> Self {
        let mut rgb = vec![0; height * width * 3];
        // An odd pixel too many stays at the end; an odd one too few is filled at the start.
        let offset = |has: usize, wants: usize| match has.checked_sub(wants) {
            Some(beyond) => (beyond / 2, 0),
            None => (0, (wants - has).div_ceil(2)),
        };
        let ((top, above), (left, before)) =
            (offset(self.height, height), offset(self.width, width));
        let copied = self.width.min(width) * 3;
        for row in 0..self.height.min(height) {
            let from = ((top + row) * self.width + left) * 3;
            let to = ((above + row) * width + before) * 3;
            rgb[to..to + copied].copy_from_slice(&self.rgb[from..from + copied]);
        }
        Self { height, width, rgb }
    }

    /// Every row at another width.
    fn across(&self, width: usize, filter: Filter) -> Self {
        let taps: Vec<(usize, Vec<i64>)> =
            filter.taps(self.width, width).into_iter().map(fixed).collect();
        let mut rgb = Vec::with_capacity(self.height * width * 3);
        for row in self.rgb.chunks_exact(self.width * 3) {
            for (first, weights) in &taps {
                let seen = &row[first * 3..];
                for channel in 0..3 {
                    let pixels = seen[channel..].iter().step_by(3);
                    let sum: i64 = weights.iter().zip(pixels).map(|(w, &p)| w * i64::from(p)).sum();
                    rgb.push(((sum + (1 << (BITS - 1))) >> BITS).clamp(0, 255) as u8);
                }
            }
        }
        Self { height: self.height, width, rgb }
    }

    fn transposed(&self) -> Self {
        let mut rgb = Vec::with_capacity(self.rgb.len());
        for column in 0..self.width {
            for row in 0..self.height {
                let at = (row * self.width + column) * 3;
                rgb.extend_from_slice(&self.rgb[at..at + 3]);
            }
        }
        Self { height: self.width, width: self.height, rgb }
    }
}

/// Weights as whole numbers of `2^-BITS`, rounded away from zero at the half.
fn fixed(taps: Taps) -> (usize, Vec<i64>) {
    let whole = |weight: f64| (weight * f64::from(1u32 << BITS)).round() as i64;
    (taps.first, taps.weights.into_iter().map(whole).collect())
}
