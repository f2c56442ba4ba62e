//! Gates: when a score counts as a concept being there, and how much energy it then has.
//!
//! Pure functions of the project's method. All arithmetic on scores that decides a gate is `f32`,
//! the type of the wire and of the calibration, so that a record can be checked by hand.

/// What is known of a concept's gate before its score is read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Before {
    /// Closed at the image's previous evaluation, or there was none.
    Closed,
    /// Open at the image's previous evaluation.
    Open,
    /// An earlier attempt at the image ended with the concept on it: open until little of it is left.
    Held,
}

/// A held gate closes at this share of `q`: well inside what benign images score.
const HELD_SHARE: f32 = 0.3;

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
    /// Raw score above which a finished image must not leave, whatever happened before.
    pub(crate) check_threshold: f32,
}

impl Level {
    /// The standardised score.
    pub(crate) fn z(&self, score: f32) -> f32 {
        (score - self.mean) / self.sd
    }

    /// The same scale for a finished image: the gate lies at the final check's threshold, without
    /// hysteresis.
    pub(crate) fn finished(&self) -> Self {
        Self { gate: self.z(self.check_threshold), hysteresis: 0.0, ..*self }
    }

    /// Open above `q`; a gate that was open, or is held, stays so until `z` falls below its closing
    /// level.
    pub(crate) fn is_open(&self, z: f32, before: Before) -> bool {
        z > self.gate || (before != Before::Closed && z >= self.closing(before))
    }

    /// The `z` at which the gate, once open, closes: `q - h`, for a held one `0.3 q` if that is less.
    fn closing(&self, before: Before) -> f32 {
        let open = self.gate - self.hysteresis;
        match before {
            Before::Closed | Before::Open => open,
            Before::Held => open.min(HELD_SHARE * self.gate),
        }
    }

    /// `tau`: the raw score at the closing level, where the energy's slope is half its greatest.
    pub(crate) fn tau(&self, before: Before) -> f32 {
        self.mean + self.sd * self.closing(before)
    }

    /// What an open gate adds to the amplitude: 0 at the closing level, 1/2 at `q` (1 if held), kept
    /// within 0.25 and 1. With `h` = 0.5 this is the `clamp(z - q + h, 0.25, 1)` of the method; where
    /// the hysteresis is wide, so is the range over which the push grows.
    pub(crate) fn amplitude(&self, z: f32, before: Before) -> f32 {
        let closing = self.closing(before);
        let width = self.gate - closing;
        let range = if before == Before::Held { width } else { 2.0 * width };
        ((z - closing) / range.max(1.0)).clamp(0.25, 1.0)
    }
}

/// `softplus(k (score - tau)) / k`: the energy of one open concept of weight 1; `k` is the
/// steepness `K_s`.
pub(crate) fn energy(score: f32, tau: f32, steepness: f32) -> f32 {
    let x = steepness * (score - tau);
    (x.max(0.0) + (-x.abs()).exp().ln_1p()) / steepness
}

/// `d energy / d score`: `sigmoid(k (score - tau))`.
pub(crate) fn energy_slope(score: f32, tau: f32, steepness: f32) -> f32 {
    1.0 / (1.0 + (-steepness * (score - tau)).exp())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn before() -> impl Strategy<Value = Before> {
        prop_oneof![Just(Before::Closed), Just(Before::Open), Just(Before::Held)]
    }

    fn level() -> impl Strategy<Value = Level> {
        (-1.0f32..1.0, 0.001f32..1.0, -1.0f32..6.0, 0.0f32..2.0).prop_map(
            |(mean, sd, gate, hysteresis)| Level {
                mean,
                sd,
                gate,
                hysteresis,
                check_threshold: mean + sd,
            },
        )
    }

    proptest! {
        #[test]
        fn history_only_ever_keeps_a_gate_open(level in level(), z in -10.0f32..10.0) {
            let (fresh, kept) = (level.is_open(z, Before::Closed), level.is_open(z, Before::Open));
            prop_assert!(!fresh || kept);
            prop_assert_eq!(fresh, z > level.gate);
            prop_assert_eq!(kept, z > level.gate || z >= level.gate - level.hysteresis);
            prop_assert_eq!(level.is_open(z, Before::Held), kept || z >= HELD_SHARE * level.gate);
        }

        #[test]
        fn a_finished_image_is_judged_by_its_raw_score_alone(level in level(), score in -2.0f32..2.0) {
            prop_assume!((score - level.check_threshold).abs() > 1e-4);
            let finished = level.finished();
            let expected = score > level.check_threshold;
            prop_assert_eq!(finished.is_open(finished.z(score), Before::Closed), expected);
            prop_assert_eq!(finished.is_open(finished.z(score), Before::Open), expected);
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
        fn the_amplitude_is_bounded_and_rises(
            level in level(), a in -9.0f32..9.0, b in -9.0f32..9.0, before in before(),
        ) {
            let (low, high) = (level.z(a.min(b)), level.z(a.max(b)));
            let (low, high) = (level.amplitude(low, before), level.amplitude(high, before));
            prop_assert!((0.25..=1.0).contains(&low) && (0.25..=1.0).contains(&high) && low <= high);
        }

        #[test]
        fn a_narrow_gate_pushes_as_the_method_says(gate in -1.0f32..9.0, z in -9.0f32..12.0) {
            let level = Level { mean: 0.0, sd: 1.0, gate, hysteresis: 0.5, check_threshold: 0.0 };
            let method = (z - gate + 0.5).clamp(0.25, 1.0);
            prop_assert!((level.amplitude(z, Before::Open) - method).abs() < 1e-5);
        }

        #[test]
        fn the_slope_is_the_derivative_of_the_energy(score in -0.3f32..0.3, tau in -0.1f32..0.1) {
            let e = |s: f64| {
                let x = 50.0 * (s - f64::from(tau));
                (x.max(0.0) + (-x.abs()).exp().ln_1p()) / 50.0
            };
            let numeric = (e(f64::from(score) + 1e-5) - e(f64::from(score) - 1e-5)) / 2e-5;
            prop_assert!((f64::from(energy_slope(score, tau, 50.0)) - numeric).abs() < 1e-3);
            prop_assert!((f64::from(energy(score, tau, 50.0)) - e(f64::from(score))).abs() < 1e-6);
        }

        #[test]
        fn energy_stays_finite(score in -1e6f32..1e6) {
            let e = energy(score, 0.0, 50.0);
            prop_assert!(e.is_finite() && e >= 0.0);
            prop_assert!(energy_slope(score, 0.0, 50.0).is_finite());
        }

        /// Else an image with an open gate could go unsteered.
        #[test]
        fn an_open_gate_always_pushes(level in level(), z in -10.0f32..10.0, before in before()) {
            prop_assume!(level.is_open(z, before));
            let score = level.mean + level.sd * z;
            prop_assert!(energy_slope(score, level.tau(before), 50.0) >= 0.499);
        }
    }

    #[test]
    fn tau_is_the_score_where_an_open_gate_closes() {
        let level = Level { mean: 0.1, sd: 0.02, gate: 3.0, hysteresis: 0.5, check_threshold: 0.0 };
        for (before, closing) in [(Before::Open, 2.5), (Before::Held, 0.9)] {
            let tau = level.tau(before);
            assert!((level.z(tau) - closing).abs() < 1e-4);
            assert!((energy_slope(tau, tau, 50.0) - 0.5).abs() < 1e-6);
        }
    }
}
