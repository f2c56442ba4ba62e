//! A light Gaussian over the latent gradient: it takes away the pixel-scale noise that fools the
//! energy without moving the object.

/// Smooths `gradient` of shape `[c, h, w]` per channel with a Gaussian of standard deviation
/// `sigma` latent pixels, cut at 3 sigma and renormalised at the border. `sigma` 0 changes nothing.
pub fn smooth(gradient: &[f32], shape: [usize; 3], sigma: f32) -> Vec<f32> {
    let [channels, height, width] = shape;
    debug_assert_eq!(gradient.len(), channels * height * width);
    if sigma <= 0.0 {
        return gradient.to_vec();
    }
    let radius = (3.0 * sigma).ceil() as usize;
    let kernel: Vec<f32> =
        (0..=radius).map(|i| (-0.5 * (i as f32 / sigma).powi(2)).exp()).collect();
    let rows = blur(gradient, channels * height, width, 1, &kernel);
    // Columns: each channel is `width` interleaved lines of `height` values.
    let plane = height * width;
    rows.chunks_exact(plane)
        .flat_map(|channel| blur(channel, width, height, width, &kernel))
        .collect()
}

/// Blurs `lines` lines of `len` values. With `stride` 1 the lines follow one another; otherwise
/// value `i` of line `l` stands at `i * stride + l`.
fn blur(values: &[f32], lines: usize, len: usize, stride: usize, kernel: &[f32]) -> Vec<f32> {
    let at = |line: usize, i: usize| if stride == 1 { line * len + i } else { i * stride + line };
    let mut out = vec![0.0; values.len()];
    for line in 0..lines {
        for i in 0..len {
            let (mut sum, mut weight) = (0.0, 0.0);
            let low = i.saturating_sub(kernel.len() - 1);
            for j in low..(i + kernel.len()).min(len) {
                let k = kernel[i.abs_diff(j)];
                sum += k * values[at(line, j)];
                weight += k;
            }
            out[at(line, i)] = sum / weight;
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn extremes_never_grow_and_constants_stay(
            values in prop::collection::vec(-10f32..10.0, 24), sigma in 0f32..2.0,
        ) {
            let out = smooth(&values, [2, 3, 4], sigma);
            let most = |v: &[f32]| v.iter().fold(0f32, |m, x| m.max(x.abs()));
            prop_assert!(most(&out) <= most(&values) + 1e-4);
            let flat = smooth(&[3.0; 24], [2, 3, 4], sigma);
            prop_assert!(flat.iter().all(|v| (v - 3.0).abs() < 1e-5));
        }

        #[test]
        fn channels_do_not_mix_and_axes_are_alike(sigma in 0.1f32..2.0) {
            let mut impulse = vec![0.0; 2 * 25];
            impulse[12] = 1.0;
            let out = smooth(&impulse, [2, 5, 5], sigma);
            prop_assert!(out[25..].iter().all(|&v| v == 0.0));
            for y in 0..5 {
                for x in 0..5 {
                    prop_assert!((out[y * 5 + x] - out[x * 5 + y]).abs() < 1e-6);
                }
            }
        }
    }

    #[test]
    fn one_line_is_the_sampled_gaussian() {
        let out = smooth(&[0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0], [1, 1, 7], 1.0);
        // scipy.ndimage.gaussian_filter1d([0,0,0,1,0,0,0], 1, truncate=3, mode="constant"), the
        // middle value, whose kernel lies wholly inside.
        assert!((out[3] - 0.399_050_3).abs() < 1e-6, "{}", out[3]);
    }

    #[test]
    fn sigma_zero_is_the_identity() {
        let values = [1.0, -2.0, 3.5, 0.25];
        assert_eq!(smooth(&values, [1, 2, 2], 0.0), values);
    }
}
