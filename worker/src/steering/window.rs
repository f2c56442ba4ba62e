//! When steering happens, and how strongly.

/// Training time as a fraction, from `start` (early, noisy) down to `end`.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Window {
    /// Steering begins at this `t / T`.
    pub start: f32,
    /// Steering ends at this `t / T`; at or below `start`. A window of one time holds the step at that
    /// very time alone.
    pub end: f32,
}

impl Window {
    /// Whether `time` lies inside, both ends included.
    pub fn contains(&self, time: f32) -> bool {
        (self.end..=self.start).contains(&time)
    }

    /// The weight `w(t)`: 1 inside the window, falling along half a cosine to 0 over its last
    /// fifth; 0 outside.
    pub fn weight(&self, time: f32) -> f32 {
        if !self.contains(time) {
            return 0.0;
        }
        let ramp = 0.2 * (self.start - self.end);
        // A window of one time has no room to fall in.
        let rest = if ramp > 0.0 { ((time - self.end) / ramp).min(1.0) } else { 1.0 };
        0.5 * (1.0 - (std::f32::consts::PI * rest).cos())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn weights_stay_in_the_unit_interval_and_never_rise_over_time(
            end in 0f32..0.8, width in 0.01f32..0.2, time in 0f32..1.0, later in 0f32..0.2,
        ) {
            let window = Window { start: end + width, end };
            let weight = window.weight(time);
            prop_assert!((0.0..=1.0).contains(&weight));
            prop_assert_eq!(window.contains(time) || weight == 0.0, true);
            if window.contains(time) {
                prop_assert!(window.weight(time - later) <= weight + 1e-6);
            }
        }
    }

    #[test]
    fn the_last_fifth_is_a_cosine_ramp() {
        let window = Window { start: 1.0, end: 0.5 };
        assert_eq!(window.weight(1.0), 1.0);
        assert!((window.weight(0.6) - 1.0).abs() < 1e-6);
        assert!((window.weight(0.55) - 0.5).abs() < 1e-5);
        assert_eq!(window.weight(0.5), 0.0);
        assert_eq!(window.weight(0.49), 0.0);
    }

    #[test]
    fn a_window_of_one_time_pushes_there_alone() {
        let window = Window { start: 0.5, end: 0.5 };
        assert_eq!((window.weight(0.5), window.weight(0.51), window.weight(0.49)), (1.0, 0.0, 0.0));
    }
}
