//! Crops: the views of an image that its score is made from.
//!
//! Crop 0 is the whole image, so nothing escapes by lying at the edge; every further crop is a
//! window of 60 to 100 % of each side at a random place, resized back to the model's input. The
//! score of an image is the smooth maximum over its crops,
//! `ln(mean_i exp(beta s_i)) / beta` with `beta` = 0.4 times the energy's steepness (20 for
//! cosines):
//!
//! - it falls only if the score falls under *every* framing, so a gate is not closed by a pattern
//!   aimed at one alignment of the model's patches, nor by making one view say "no" loudly, as a
//!   mean would be;
//! - it is soft enough that all crops share the gradient and that its spread over benign images
//!   does not grow with their number as a maximum's does.
//!
//! On 1,500 held-out Emojiland scenes, an early checkpoint, 4 crops: mean AUROC 0.991 (whole image
//! alone 0.990, mean 0.989, maximum 0.991), scenes with a target above the gate of 1 % of benign
//! ones 0.72 (0.62, 0.71, 0.67).
//!
//! Windows depend on the seed and the crop's index alone: fewer crops are a prefix of more.

use candle_core::Tensor;
pub(crate) use fairlead_common::limits::MAX_CROPS;
use fairlead_models::layers::{Filter, resize, resize_backward};

use crate::{random::SplitMix64, scorer::ScorerError};

/// Smallest share of a side that a window covers.
const SMALLEST: f32 = 0.6;

/// `beta` as a multiple of the energy's steepness.
const SHARPNESS: f32 = 0.4;

/// Crops are mostly enlarged; bilinear does not overshoot the range of the pixels.
const FILTER: Filter = Filter::BilinearAntialias;

/// Part of an image, in pixels; never empty, never outside.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Window {
    pub(crate) top: usize,
    pub(crate) left: usize,
    pub(crate) height: usize,
    pub(crate) width: usize,
}

/// The windows of `count` crops of a `height` x `width` image.
pub(crate) fn windows(seed: u64, count: u32, height: usize, width: usize) -> Vec<Window> {
    let mut random = SplitMix64::new(seed);
    let whole = Window { top: 0, left: 0, height, width };
    let mut part = || {
        let share = SMALLEST + (1.0 - SMALLEST) * random.unit();
        let side = |full: usize| ((full as f32 * share).round() as usize).clamp(1, full);
        let (h, w) = (side(height), side(width));
        let (top, left) = (random.below(height - h + 1), random.below(width - w + 1));
        Window { top, left, height: h, width: w }
    };
    (0..count).map(|crop| if crop == 0 { whole } else { part() }).collect()
}

/// The crops of `image` `[1, 3, h, w]`: `[windows, 3, h, w]`.
pub(crate) fn cut(image: &Tensor, windows: &[Window]) -> Result<Tensor, ScorerError> {
    let (_, _, height, width) = image.dims4()?;
    let crops = windows
        .iter()
        .map(|window| {
            if (window.height, window.width) == (height, width) {
                return Ok(image.clone());
            }
            let part = image
                .narrow(2, window.top, window.height)?
                .narrow(3, window.left, window.width)?
                .contiguous()?;
            Ok(resize(&part, height, width, FILTER)?)
        })
        .collect::<Result<Vec<_>, ScorerError>>()?;
    Ok(Tensor::cat(&crops, 0)?)
}

/// The transpose of [`cut`]: a gradient on the crops `[windows, 3, h, w]`, pulled back to the
/// image `[1, 3, h, w]`.
pub(crate) fn cut_backward(crops: &Tensor, windows: &[Window]) -> Result<Tensor, ScorerError> {
    let (_, _, height, width) = crops.dims4()?;
    let mut sum = Tensor::zeros((1, 3, height, width), crops.dtype(), crops.device())?;
    for (index, window) in windows.iter().enumerate() {
        let crop = crops.narrow(0, index, 1)?.contiguous()?;
        let part = if (window.height, window.width) == (height, width) {
            crop
        } else {
            let Window { top, left, height: h, width: w } = *window;
            resize_backward(&crop, h, w, FILTER)?
                .pad_with_zeros(2, top, height - top - h)?
                .pad_with_zeros(3, left, width - left - w)?
        };
        sum = (sum + part)?;
    }
    Ok(sum)
}

/// The score of an image from those of its crops, and its derivative by each of them.
pub(crate) fn combine(scores: &[f32], steepness: f32) -> (f32, Vec<f32>) {
    let beta = SHARPNESS * steepness;
    let greatest = scores.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let weights = scores.iter().map(|score| (beta * (score - greatest)).exp()).collect::<Vec<_>>();
    let sum: f32 = weights.iter().sum();
    let score = greatest + (sum / scores.len() as f32).ln() / beta;
    (score, weights.iter().map(|weight| weight / sum).collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::Device;
    use proptest::prelude::*;

    fn noise(seed: u64, n: usize, h: usize, w: usize) -> Tensor {
        let mut random = SplitMix64::new(seed);
        let values = (0..n * 3 * h * w).map(|_| random.unit() - 0.5).collect::<Vec<_>>();
        Tensor::from_vec(values, (n, 3, h, w), &Device::Cpu).expect("shape and length agree")
    }

    fn dot(a: &Tensor, b: &Tensor) -> f64 {
        let values = |t: &Tensor| t.flatten_all().and_then(|t| t.to_vec1::<f32>()).expect("f32");
        values(a).iter().zip(values(b)).map(|(&x, y)| f64::from(x) * f64::from(y)).sum()
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        #[test]
        fn windows_lie_inside_and_are_large(
            seed: u64, count in 1u32..=MAX_CROPS, h in 1usize..300, w in 1usize..300,
        ) {
            let all = windows(seed, count, h, w);
            prop_assert_eq!(all.len(), count as usize);
            prop_assert_eq!(all[0], Window { top: 0, left: 0, height: h, width: w });
            for window in &all {
                prop_assert!(window.top + window.height <= h && window.left + window.width <= w);
                prop_assert!(window.height as f32 >= 0.6 * h as f32 - 0.5);
                prop_assert!(window.width as f32 >= 0.6 * w as f32 - 0.5);
            }
            prop_assert_eq!(&windows(seed, MAX_CROPS, h, w)[..count as usize], &all[..]);
        }

        #[test]
        fn backward_is_the_transpose_of_forward(
            seed: u64, count in 1u32..=4, h in 4usize..20, w in 4usize..20,
        ) {
            let windows = windows(seed, count, h, w);
            let image = noise(seed, 1, h, w);
            let slopes = noise(seed ^ 1, count as usize, h, w);
            let forward = dot(&cut(&image, &windows).expect("cut"), &slopes);
            let backward = dot(&image, &cut_backward(&slopes, &windows).expect("pulled back"));
            prop_assert!((forward - backward).abs() < 1e-3 * (1.0 + forward.abs()));
        }
    }

    proptest! {
        #[test]
        fn the_combined_score_lies_between_mean_and_maximum(
            scores in prop::collection::vec(-0.5f32..0.5, 1..=8),
        ) {
            let (score, weights) = combine(&scores, 50.0);
            let mean = scores.iter().sum::<f32>() / scores.len() as f32;
            let greatest = scores.iter().copied().fold(f32::NEG_INFINITY, f32::max);
            prop_assert!(score >= mean - 1e-5 && score <= greatest + 1e-5);
            prop_assert!((weights.iter().sum::<f32>() - 1.0).abs() < 1e-5);
            for (k, weight) in weights.iter().enumerate() {
                let at = |step: f32| {
                    let mut moved = scores.clone();
                    moved[k] += step;
                    combine(&moved, 50.0).0
                };
                let numeric = (at(5e-3) - at(-5e-3)) / 1e-2;
                prop_assert!((numeric - weight).abs() < 2e-3, "{} {}", numeric, weight);
            }
        }
    }

    #[test]
    fn a_single_crop_is_its_own_score_and_nonsense_stays_nonsense() {
        assert_eq!(combine(&[0.25], 50.0), (0.25, vec![1.0]));
        assert!(!combine(&[0.1, f32::NAN], 50.0).0.is_finite());
        assert!(!combine(&[0.1, f32::INFINITY], 50.0).0.is_finite());
    }

    #[test]
    fn seeds_differ_and_repeat() {
        assert_eq!(windows(5, 4, 32, 32), windows(5, 4, 32, 32));
        assert_ne!(windows(5, 4, 32, 32), windows(6, 4, 32, 32));
    }

    #[test]
    fn crop_zero_is_the_image_itself() {
        let image = noise(3, 1, 9, 7);
        let crops = cut(&image, &windows(1, 3, 9, 7)).expect("cut");
        assert_eq!(crops.dims(), [3, 3, 9, 7]);
        let first = crops.narrow(0, 0, 1).expect("crop 0");
        assert_eq!(
            dot(&(first - &image).expect("same shape"), &Tensor::ones_like(&image).expect("ones")),
            0.0
        );
    }
}
