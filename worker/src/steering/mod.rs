//! Steering: pure functions from an energy's gradient to a correction of the clean estimate.

mod correction;
mod smoothing;
mod window;

#[cfg(test)]
mod toy;

use fairlead_common::steering;
use fairlead_proto::v1::{SteeringMode, SteeringParams};

pub use correction::{Correction, Mode, Push, correct, rms};
pub use smoothing::smooth;
pub use window::Window;

use crate::error::Result;

/// The knobs of steering, every default filled in and every range checked.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Knobs {
    /// How the correction enters the sampler.
    pub mode: Mode,
    /// Strength of one correction relative to `rms(x0)`.
    pub eta: f32,
    /// When steering happens.
    pub window: Window,
    /// Corrections per step, 1 to 4.
    pub inner_iterations: u32,
    /// Standard deviation of the Gaussian over the latent gradient, in latent pixels, 0 to 2.
    pub smoothing: f32,
    /// Upper bound of the sum over steps of `rms(d) / rms(x0)`.
    pub cap: f32,
    /// Crops the energy node makes, 1 to 8.
    pub crops: u32,
    /// Steps between two questions while every gate is closed, 1 to 4.
    pub probe_period: u32,
    /// Factor on `eta` and `cap` of each rerun over the attempt before it, 1 to 4.
    pub rerun_factor: f32,
}

impl Knobs {
    /// Reads the knobs of a policy.
    ///
    /// # Errors
    /// [`Error::Request`] names the knob and its range.
    pub fn from_params(params: &SteeringParams) -> Result<Self> {
        let knobs = steering::resolve(params)?;
        let mode = match knobs.mode() {
            SteeringMode::Unspecified | SteeringMode::HoldNoise => Mode::HoldNoise,
            SteeringMode::HoldState => Mode::HoldState,
            SteeringMode::ShiftState => Mode::ShiftState,
        };
        Ok(Self {
            mode,
            eta: knobs.eta(),
            window: Window { start: knobs.window_start(), end: knobs.window_end() },
            inner_iterations: knobs.inner_iterations(),
            smoothing: knobs.smoothing(),
            cap: knobs.cap(),
            crops: knobs.crops(),
            probe_period: knobs.probe_period(),
            rerun_factor: knobs.rerun_factor(),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Error;

    #[test]
    fn a_knob_out_of_range_is_named() {
        let bad = [
            (SteeringParams { eta: Some(0.0), ..Default::default() }, "eta"),
            (SteeringParams { window_end: Some(1.1), ..Default::default() }, "window_end"),
            (SteeringParams { window_start: Some(0.5), ..Default::default() }, "window_start"),
        ];
        for (params, name) in bad {
            match Knobs::from_params(&params) {
                Err(Error::Request { field, .. }) => assert_eq!(field, name),
                other => panic!("{name}: {other:?}"),
            }
        }
    }
}
