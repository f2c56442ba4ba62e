//! The correction of one clean estimate, and how it enters the next state.
//!
//! `d = -eta * A * w(t) * rms(x0) * g / (rms(g) + 1e-8)`, where `g` is the gradient of the energy
//! on `x0`, `A` the amplitude of the open gates and `w` the window's weight. With the levels of
//! [`crate::sampler`] each mode adds a multiple of `d` to the next state:
//!
//! | mode | what is held | multiple of `d` |
//! |---|---|---|
//! | A, hold state | `x`: the prediction changes, `n -= (signal / noise) d` | `signal' - noise' signal / noise` |
//! | B, hold noise (default) | `n`: the clean estimate moves | `signal'` |
//! | C, shift state | nothing | `1` |
//!
//! For diffusion `signal = sqrt(a)`, so B adds `sqrt(a') d`; for rectified flow `signal = 1 - s`,
//! so B adds `(1 - s') d` and A `(1 - s' / s) d`: the same table.

use crate::sampler::Level;

/// How a correction enters the sampler.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mode {
    /// Mode B: hold the predicted noise, move the clean estimate.
    HoldNoise,
    /// Mode A: hold the state, change the prediction.
    HoldState,
    /// Mode C: shift the next state by the correction itself.
    ShiftState,
}

impl Mode {
    /// What `d` is multiplied by when it is added to the next state.
    pub fn coefficient(self, level: Level, next: Level) -> f32 {
        match self {
            Self::HoldNoise => next.signal,
            Self::HoldState => next.signal - next.noise * (level.signal / level.noise),
            Self::ShiftState => 1.0,
        }
    }
}

/// How hard to push.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Push {
    /// Strength, reruns' factor included.
    pub eta: f32,
    /// Amplitude A of the open gates, 0.25 to 1.
    pub amplitude: f32,
    /// The window's weight, 0 to 1.
    pub weight: f32,
    /// What is left of the cap on the sum of `rms(d) / rms(x0)`.
    pub budget: f32,
}

/// A correction of the clean estimate.
#[derive(Debug, Clone, PartialEq)]
pub struct Correction {
    /// The shift `d` of `x0`; it points along `-g`.
    pub d: Vec<f32>,
    /// `rms(d) / rms(x0)`: what it takes of the budget.
    pub relative: f32,
}

/// The correction of clean estimate `x0` whose energy has gradient `g` (already smoothed).
/// `None` if `g` is not finite: such a step is skipped and recorded.
pub fn correct(x0: &[f32], g: &[f32], push: Push) -> Option<Correction> {
    debug_assert_eq!(x0.len(), g.len());
    let size = rms(g);
    if !size.is_finite() {
        return None;
    }
    let reference = rms(x0);
    // rms of the normalised gradient: 1, but for gradients near the 1e-8.
    let unit = size / (size + 1e-8);
    let wanted = push.eta * push.amplitude * push.weight;
    let allowed = if wanted * unit > push.budget { push.budget.max(0.0) / unit } else { wanted };
    let factor = -allowed * reference / (size + 1e-8);
    Some(Correction { d: g.iter().map(|g| factor * g).collect(), relative: allowed * unit })
}

/// Root mean square, summed in f64. Not finite if any value is not.
pub fn rms(values: &[f32]) -> f32 {
    let sum: f64 = values.iter().map(|&v| f64::from(v) * f64::from(v)).sum();
    (sum / values.len() as f64).sqrt() as f32
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sampler::Prediction;
    use proptest::prelude::*;

    fn vector() -> impl Strategy<Value = Vec<f32>> {
        prop::collection::vec(-4f32..4.0, 6)
    }

    fn push(eta: f32, budget: f32) -> Push {
        Push { eta, amplitude: 1.0, weight: 1.0, budget }
    }

    /// DDIM from an explicit clean and noise estimate.
    fn next(level: Level, x0: f32, n: f32) -> f32 {
        level.signal * x0 + level.noise * n
    }

    proptest! {
        #[test]
        fn the_correction_points_along_minus_g_and_has_the_asked_size(
            x0 in vector(), g in vector(), eta in 0.01f32..1.0,
        ) {
            prop_assume!(rms(&g) > 1e-2 && rms(&x0) > 1e-2);
            let correction = correct(&x0, &g, push(eta, 10.0)).expect("g is finite");
            let dot: f64 = correction.d.iter().zip(&g).map(|(d, g)| f64::from(d * g)).sum();
            let cosine = dot / 6.0 / f64::from(rms(&correction.d) * rms(&g));
            prop_assert!((cosine + 1.0).abs() < 1e-4, "{cosine}");
            prop_assert!((rms(&correction.d) / rms(&x0) - eta).abs() < 1e-4);
            prop_assert!((correction.relative - eta).abs() < 1e-4);
        }

        #[test]
        fn the_cap_is_never_exceeded(
            x0 in vector(), gradients in prop::collection::vec(vector(), 1..20),
            eta in 0.01f32..2.0, cap in 0f32..3.0,
        ) {
            let (mut spent, mut moved) = (0f32, 0f32);
            for g in &gradients {
                let correction = correct(&x0, g, push(eta, cap - spent)).expect("g is finite");
                spent += correction.relative;
                moved += rms(&correction.d);
            }
            prop_assert!(spent <= cap + 1e-4, "{spent} of {cap}");
            prop_assert!(moved <= (cap + 1e-3) * rms(&x0) + 1e-5);
        }

        /// Each mode's multiple of d is what the sampler does to a corrected estimate.
        #[test]
        fn modes_are_the_formulas_of_the_method(
            a in 0.02f32..0.9, gain in 0.001f32..0.09, x in -3f32..3.0, e in -3f32..3.0,
            d in -1f32..1.0,
        ) {
            let (level, to) = (Level::diffusion(a), Level::diffusion(a + gain));
            let x0 = Prediction::Epsilon.clean_estimate(level, &[x], &[e])[0];
            let base = next(to, x0, e);
            let b = next(to, x0 + d, e) - base;
            prop_assert!((Mode::HoldNoise.coefficient(level, to) * d - b).abs() < 1e-4);
            // Mode A: e -= sqrt(a / (1 - a)) d, the state held.
            let changed = e - (a / (1.0 - a)).sqrt() * d;
            let moved = Prediction::Epsilon.clean_estimate(level, &[x], &[changed])[0];
            prop_assert!((moved - (x0 + d)).abs() < 1e-4);
            let by_a = next(to, moved, changed) - base;
            prop_assert!((Mode::HoldState.coefficient(level, to) * d - by_a).abs() < 1e-4);
            prop_assert_eq!(Mode::ShiftState.coefficient(level, to), 1.0);
        }

        /// In v the same correction is v' = v - (signal / noise) noise-share: the multiples agree.
        #[test]
        fn v_prediction_takes_the_same_multiples(
            a in 0.02f32..0.9, gain in 0.001f32..0.09, x in -3f32..3.0, v in -3f32..3.0,
            d in -1f32..1.0,
        ) {
            let (level, to) = (Level::diffusion(a), Level::diffusion(a + gain));
            let estimate = |v: f32| (
                Prediction::V.clean_estimate(level, &[x], &[v])[0],
                Prediction::V.noise_estimate(level, &[x], &[v])[0],
            );
            let (x0, n) = estimate(v);
            // Holding x, x0 moves by d when v moves by -d / noise.
            let (moved, changed) = estimate(v - d / level.noise);
            prop_assert!((moved - (x0 + d)).abs() < 1e-4);
            let by_a = next(to, moved, changed) - next(to, x0, n);
            prop_assert!((Mode::HoldState.coefficient(level, to) * d - by_a).abs() < 1e-3);
        }

        /// The same for a rectified flow: holding x, `v -= d / s`; holding the noise, x0 moves alone.
        #[test]
        fn flow_takes_the_same_multiples(
            s in 0.1f32..1.0, share in 0f32..0.99, x in -3f32..3.0, v in -3f32..3.0, d in -1f32..1.0,
        ) {
            let (level, to) = (Level::flow(s), Level::flow(s * share));
            let euler = |v: f32| x + (to.noise - level.noise) * v;
            let by_a = euler(v - d / s) - euler(v);
            prop_assert!((Mode::HoldState.coefficient(level, to) * d - by_a).abs() < 1e-3);
            let x0 = Prediction::Flow.clean_estimate(level, &[x], &[v])[0];
            let n = Prediction::Flow.noise_estimate(level, &[x], &[v])[0];
            let by_b = next(to, x0 + d, n) - euler(v);
            prop_assert!((Mode::HoldNoise.coefficient(level, to) * d - by_b).abs() < 1e-3);
        }

        /// All modes move the next state towards d, none further than C.
        #[test]
        fn modes_agree_in_direction(a in 0.001f32..0.99, gain in 0.001f32..0.01) {
            let (level, to) = (Level::diffusion(a), Level::diffusion((a + gain).min(1.0)));
            let multiple = |mode: Mode| mode.coefficient(level, to);
            let (a, b, c) =
                (multiple(Mode::HoldState), multiple(Mode::HoldNoise), multiple(Mode::ShiftState));
            prop_assert!(0.0 < a && a < b && b <= c, "{a} {b} {c}");
        }
    }

    #[test]
    fn the_last_step_is_alike_in_every_mode() {
        let (level, last) = (Level::diffusion(0.9), Level::diffusion(1.0));
        for mode in [Mode::HoldNoise, Mode::HoldState, Mode::ShiftState] {
            assert_eq!(mode.coefficient(level, last), 1.0);
        }
    }

    #[test]
    fn a_gradient_that_is_not_finite_is_skipped() {
        assert_eq!(correct(&[1.0, 2.0], &[f32::NAN, 0.0], push(0.3, 3.0)), None);
        assert_eq!(correct(&[1.0, 2.0], &[f32::INFINITY, 0.0], push(0.3, 3.0)), None);
    }

    #[test]
    fn amplitude_and_weight_scale_the_push() {
        let g = [1.0, -1.0];
        let full = correct(&[1.0, 1.0], &g, push(0.4, 3.0)).expect("finite");
        let part = Push { amplitude: 0.5, weight: 0.5, ..push(0.4, 3.0) };
        let quarter = correct(&[1.0, 1.0], &g, part).expect("finite");
        assert!((quarter.d[0] * 4.0 - full.d[0]).abs() < 1e-6 && full.d[0] < 0.0);
    }
}
