//! Shares with their intervals.

use serde::Serialize;

/// Standard normal quantile of a two-sided 95 % interval.
const Z95: f64 = 1.959_963_985;

/// `hits` of `total`.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub(crate) struct Share {
    pub(crate) hits: usize,
    pub(crate) total: usize,
}

impl Share {
    pub(crate) fn of(outcomes: impl Iterator<Item = bool>) -> Self {
        outcomes.fold(Self { hits: 0, total: 0 }, |share, hit| Self {
            hits: share.hits + usize::from(hit),
            total: share.total + 1,
        })
    }

    /// Wilson's score interval at 95 % (Wilson 1927), as fractions.
    pub(crate) fn wilson(&self) -> (f64, f64) {
        if self.total == 0 {
            return (0.0, 1.0);
        }
        let (n, p) = (self.total as f64, self.hits as f64 / self.total as f64);
        let scale = 1.0 + Z95 * Z95 / n;
        let center = p + Z95 * Z95 / (2.0 * n);
        let half = Z95 * (p * (1.0 - p) / n + Z95 * Z95 / (4.0 * n * n)).sqrt();
        (((center - half) / scale).max(0.0), ((center + half) / scale).min(1.0))
    }

    /// "6.6 % [3.9, 10.9] (13 of 198)".
    pub(crate) fn text(&self) -> String {
        if self.total == 0 {
            return "none".to_owned();
        }
        let (low, high) = self.wilson();
        format!(
            "{:.1} % [{:.1}, {:.1}] ({} of {})",
            100.0 * self.hits as f64 / self.total as f64,
            100.0 * low,
            100.0 * high,
            self.hits,
            self.total
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// Values of statsmodels' `proportion_confint(k, n, method="wilson")`.
    #[test]
    fn wilson_intervals_agree_with_statsmodels() {
        for (hits, total, low, high) in [
            (0, 10, 0.0, 0.277_533),
            (5, 200, 0.010_725, 0.057_178),
            (197, 200, 0.956_834, 0.994_886),
        ] {
            let (a, b) = Share { hits, total }.wilson();
            assert!((a - low).abs() < 1e-5 && (b - high).abs() < 1e-5, "{hits}/{total}: {a} {b}");
        }
    }

    proptest! {
        #[test]
        fn intervals_hold_the_share(total in 1usize..5000, part in 0.0f64..=1.0) {
            let hits = (total as f64 * part) as usize;
            let (low, high) = Share { hits, total }.wilson();
            let p = hits as f64 / total as f64;
            prop_assert!(0.0 <= low && low <= p + 1e-12 && p <= high + 1e-12 && high <= 1.0);
        }
    }
}
