//! Structural similarity of two pictures.

use crate::sheet::Picture;

/// Standard deviation of the Gaussian window, and how far it reaches.
const SIGMA: f64 = 1.5;
const RADIUS: isize = 5;

/// Mean SSIM (Wang, Bovik, Sheikh and Simoncelli 2004) over the pixels and channels of two pictures of one
/// size: Gaussian window, K1 = 0.01, K2 = 0.03, mirrored borders that are left out of the mean. 1 for
/// equal pictures. None if the sizes differ or are too small for the window.
pub(crate) fn ssim(a: &Picture, b: &Picture) -> Option<f64> {
    let (width, height) = (a.width, a.height);
    let least = 2 * RADIUS as usize + 1;
    if (b.width, b.height) != (width, height) || width < least || height < least {
        return None;
    }
    let channel = |picture: &Picture, c: usize| -> Vec<f64> {
        picture.rgb.iter().skip(c).step_by(3).map(|&value| f64::from(value)).collect()
    };
    let sums: f64 = (0..3).map(|c| plane(&channel(a, c), &channel(b, c), width, height)).sum();
    Some(sums / 3.0)
}

fn plane(x: &[f64], y: &[f64], width: usize, height: usize) -> f64 {
    let (c1, c2) = ((0.01f64 * 255.0).powi(2), (0.03f64 * 255.0).powi(2));
    let blur = |values: Vec<f64>| gaussian(&values, width, height);
    let product = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| a * b).collect::<Vec<_>>();
    let (mx, my) = (blur(x.to_vec()), blur(y.to_vec()));
    let (xx, yy, xy) = (blur(product(x, x)), blur(product(y, y)), blur(product(x, y)));
    let at = |i: usize| {
        let (vx, vy) = (xx[i] - mx[i] * mx[i], yy[i] - my[i] * my[i]);
        let vxy = xy[i] - mx[i] * my[i];
        (2.0 * mx[i] * my[i] + c1) * (2.0 * vxy + c2)
            / ((mx[i] * mx[i] + my[i] * my[i] + c1) * (vx + vy + c2))
    };
    let border = RADIUS as usize;
    let rows = border..height - border;
    let inner = rows.flat_map(|row| (border..width - border).map(move |col| row * width + col));
    let (sum, count) = inner.fold((0.0, 0usize), |(sum, count), i| (sum + at(i), count + 1));
    sum / count as f64
}

/// A separable Gaussian with mirrored borders.
fn gaussian(values: &[f64], width: usize, height: usize) -> Vec<f64> {
    let raw: Vec<f64> =
        (-RADIUS..=RADIUS).map(|d| (-0.5 * (d as f64 / SIGMA).powi(2)).exp()).collect();
    let total: f64 = raw.iter().sum();
    let mirror = |i: isize, n: usize| {
        let n = n as isize;
        let i = if i < 0 { -1 - i } else { i };
        (if i >= n { 2 * n - 1 - i } else { i }) as usize
    };
    let pass = |values: &[f64], along: bool| -> Vec<f64> {
        let value = |row: usize, col: usize| {
            let taps = raw.iter().zip(-RADIUS..=RADIUS);
            taps.map(|(weight, d)| {
                let (row, col) = match along {
                    true => (row, mirror(col as isize + d, width)),
                    false => (mirror(row as isize + d, height), col),
                };
                weight * values[row * width + col]
            })
            .sum::<f64>()
                / total
        };
        (0..height)
            .flat_map(|row| (0..width).map(move |col| (row, col)))
            .map(|(r, c)| value(r, c))
            .collect()
    };
    pass(&pass(values, true), false)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// `value(i) = (i * factor + i * i * 7) mod 256`, the picture of the reference values.
    fn picture(factor: usize, width: usize, height: usize) -> Picture {
        let rgb = (0..3 * width * height).map(|i| ((i * factor + i * i * 7) % 256) as u8).collect();
        Picture { width, height, rgb }
    }

    /// skimage.metrics.structural_similarity(a, b, channel_axis=2, gaussian_weights=True, sigma=1.5,
    /// use_sample_covariance=False, data_range=255) of the same pictures.
    #[test]
    fn it_agrees_with_scikit_image() {
        for ((factor, other), (width, height), expected) in REFERENCE {
            let found = ssim(&picture(factor, width, height), &picture(other, width, height));
            let found = found.expect("they are of one size");
            assert!((found - expected).abs() < 1e-6, "{found} instead of {expected}");
        }
    }

    #[test]
    fn equal_pictures_are_one_and_other_sizes_are_none() {
        let a = picture(3, 20, 14);
        assert!((ssim(&a, &picture(3, 20, 14)).expect("alike") - 1.0).abs() < 1e-12);
        assert_eq!(ssim(&a, &picture(3, 14, 20)), None);
        assert_eq!(ssim(&picture(3, 10, 30), &picture(3, 10, 30)), None);
    }

    type Reference = ((usize, usize), (usize, usize), f64);
    const REFERENCE: [Reference; 4] = [
        ((3, 4), (32, 32), -0.026496169),
        ((3, 11), (20, 14), 0.024541372),
        ((5, 5), (16, 40), 1.000000000),
        ((1, 130), (33, 17), 0.018935252),
    ];
}
