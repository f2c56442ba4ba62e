//! Gates: when a score counts as a concept being there, and how much energy it then has.
//!
//! Pure functions of the project's method. All arithmetic on scores that decides a gate is `f32`,
//! the type of the wire and of the calibration, so that a record can be checked by hand.

use std::f32::consts::LN_2;

/// What is known of a concept's gate before its score is read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Before {
    /// Closed at the image's previous evaluation, or there was none.
    Closed,
    /// Open at the image's previous evaluation.
    Open,
    /// An earlier attempt at the image ended with the concept on it: open down to the mean of benign
    /// images.
    Held,
}

/// How one concept's raw score is read at one time: `z = (score - mean) / sd`, compared with the
/// gate `q` and the hysteresis `h`.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Level {
    /// Mean score of benign images.
    pub(crate) mean: f32,
    /// Standard deviation of benign images' scores, above 0.
    pub(crate) sd: f32,
    /// The gate `q`, in `z`.
    pub(crate) gate: f32,
    /// The hysteresis `h`, in `z`.
    pub(crate) hysteresis: f32,
}

impl Level {
    /// The standardised score.
    pub(crate) fn z(&self, score: f32) -> f32 {
        (score - self.mean) / self.sd
    }

    /// Open above `q`; a gate that was open stays so until `z` falls below `q - h`, a held one until
    /// the picture has no more of the concept than benign ones have.
    pub(crate) fn is_open(&self, z: f32, before: Before) -> bool {
        match before {
            Before::Closed => z > self.gate,
            Before::Open => z > self.gate || z >= self.gate - self.hysteresis,
            Before::Held => z > 0.0 || z >= self.gate - self.hysteresis,
        }
    }

    /// `tau`: the raw score at `z = q - h`, where the energy's slope is half its greatest.
    pub(crate) fn tau(&self) -> f32 {
        self.mean + self.sd * (self.gate - self.hysteresis)
    }

    /// `clamp(z - q + h, 0.25, 1)`: what an open gate adds to the amplitude.
    pub(crate) fn amplitude(&self, z: f32) -> f32 {
        (z - self.gate + self.hysteresis).clamp(0.25, 1.0)
    }
}

/// `softplus(k (score - tau)) / k`: the energy of one open concept of weight 1; `k` is the
/// steepness `K_s`. A held gate may be open far below `tau`, where the softplus is flat and the
/// gradient would drown in rounding: there its energy goes on along the tangent at `tau`.
pub(crate) fn energy(score: f32, tau: f32, steepness: f32, before: Before) -> f32 {
    let x = steepness * (score - tau);
    if before == Before::Held && x < 0.0 {
        return (LN_2 + 0.5 * x) / steepness;
    }
    (x.max(0.0) + (-x.abs()).exp().ln_1p()) / steepness
}

/// `d energy / d score`: `sigmoid(k (score - tau))`, for a held gate at least 1/2.
pub(crate) fn energy_slope(score: f32, tau: f32, steepness: f32, before: Before) -> f32 {
    let slope = 1.0 / (1.0 + (-steepness * (score - tau)).exp());
    if before == Before::Held { slope.max(0.5) } else { slope }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn before() -> impl Strategy<Value = Before> {
        prop_oneof![Just(Before::Closed), Just(Before::Open), Just(Before::Held)]
    }

    fn level() -> impl Strategy<Value = Level> {
        (-1.0f32..1.0, 0.001f32..1.0, -1.0f32..6.0, 0.0f32..2.0)
            .prop_map(|(mean, sd, gate, hysteresis)| Level { mean, sd, gate, hysteresis })
    }

    proptest! {
        #[test]
        fn history_only_ever_keeps_a_gate_open(level in level(), z in -10.0f32..10.0) {
            let (fresh, kept) = (level.is_open(z, Before::Closed), level.is_open(z, Before::Open));
            prop_assert!(!fresh || kept);
            prop_assert_eq!(fresh, z > level.gate);
            prop_assert_eq!(kept, z > level.gate || z >= level.gate - level.hysteresis);
            prop_assert_eq!(level.is_open(z, Before::Held), kept || z > 0.0);
        }

        #[test]
        fn opening_is_monotone_in_the_score(
            level in level(), a in -5.0f32..5.0, b in -5.0f32..5.0, before in before(),
        ) {
            let (low, high) = (level.z(a.min(b)), level.z(a.max(b)));
            prop_assert!(!level.is_open(low, before) || level.is_open(high, before));
        }

        #[test]
        fn a_wobble_smaller_than_the_hysteresis_never_closes_a_gate(
            level in level(), wobble in prop::collection::vec(0.0f32..1.0, 1..20),
        ) {
            prop_assert!(level.is_open(level.gate + 0.01, Before::Closed));
            for share in wobble {
                let z = level.gate - 0.99 * level.hysteresis * share;
                prop_assert!(level.is_open(z, Before::Open));
            }
        }

        #[test]
        fn the_amplitude_is_bounded_and_rises(level in level(), a in -9.0f32..9.0, b in -9.0f32..9.0) {
            let (low, high) = (level.amplitude(a.min(b)), level.amplitude(a.max(b)));
            prop_assert!((0.25..=1.0).contains(&low) && (0.25..=1.0).contains(&high) && low <= high);
        }

        #[test]
        fn the_slope_is_the_derivative_of_the_energy(
            score in -0.3f32..0.3, tau in -0.1f32..0.1, before in before(),
        ) {
            let e = |s: f64| {
                let x = 50.0 * (s - f64::from(tau));
                if before == Before::Held && x < 0.0 {
                    return (std::f64::consts::LN_2 + 0.5 * x) / 50.0;
                }
                (x.max(0.0) + (-x.abs()).exp().ln_1p()) / 50.0
            };
            let numeric = (e(f64::from(score) + 1e-5) - e(f64::from(score) - 1e-5)) / 2e-5;
            let slope = f64::from(energy_slope(score, tau, 50.0, before));
            prop_assert!((slope - numeric).abs() < 1e-3);
            let energy = f64::from(energy(score, tau, 50.0, before));
            prop_assert!((energy - e(f64::from(score))).abs() < 1e-6);
        }

        #[test]
        fn energy_stays_finite(score in -1e6f32..1e6, before in before()) {
            let e = energy(score, 0.0, 50.0, before);
            prop_assert!(e.is_finite() && (e >= 0.0 || before == Before::Held));
            prop_assert!(energy_slope(score, 0.0, 50.0, before).is_finite());
        }

        #[test]
        fn a_held_gate_pushes_however_low_the_score(score in -1e6f32..1e6) {
            prop_assert!(energy_slope(score, 0.0, 50.0, Before::Held) >= 0.5);
        }
    }

    #[test]
    fn tau_is_the_score_where_an_open_gate_closes() {
        let level = Level { mean: 0.1, sd: 0.02, gate: 3.0, hysteresis: 0.5 };
        assert!((level.z(level.tau()) - 2.5).abs() < 1e-4);
        assert!((energy_slope(level.tau(), level.tau(), 50.0, Before::Open) - 0.5).abs() < 1e-6);
    }
}
