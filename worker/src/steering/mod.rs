//! Steering: pure functions from an energy's gradient to a correction of the clean estimate.

mod correction;
mod smoothing;
mod window;

#[cfg(test)]
mod toy;

use fairlead_proto::v1::{SteeringMode, SteeringParams};

pub use correction::{Correction, Mode, Push, correct, rms};
pub use smoothing::smooth;
pub use window::Window;

use crate::{Error, error::Result};

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
        let mode = match params.mode() {
            SteeringMode::Unspecified | SteeringMode::HoldNoise => Mode::HoldNoise,
            SteeringMode::HoldState => Mode::HoldState,
            SteeringMode::ShiftState => Mode::ShiftState,
        };
        let default_eta = if mode == Mode::ShiftState { 0.15 } else { 0.3 };
        let start = within("steering.window_start", params.window_start.unwrap_or(1.0), 0.0, 1.0)?;
        let end = within("steering.window_end", params.window_end.unwrap_or(0.6), 0.0, 1.0)?;
        if start <= end {
            return Err(Error::request(
                "steering.window_start",
                format!("{start} is not above window_end {end}; time runs from 1 down to 0"),
            ));
        }
        let eta = within("steering.eta", params.eta.unwrap_or(default_eta), 0.0, 2.0)?;
        if eta == 0.0 {
            return Err(Error::request("steering.eta", "0 corrects nothing; allowed is (0, 2]"));
        }
        Ok(Self {
            mode,
            eta,
            window: Window { start, end },
            inner_iterations: count("steering.inner_iterations", params.inner_iterations, 1, 4)?,
            smoothing: within("steering.smoothing", params.smoothing.unwrap_or(1.0), 0.0, 2.0)?,
            cap: within("steering.cap", params.cap.unwrap_or(3.0), 0.0, f32::MAX)?,
            crops: count("steering.crops", params.crops, 4, 8)?,
            probe_period: count("steering.probe_period", params.probe_period, 1, 4)?,
            rerun_factor: within(
                "steering.rerun_factor",
                params.rerun_factor.unwrap_or(2.0),
                1.0,
                4.0,
            )?,
        })
    }
}

fn within(field: &'static str, value: f32, low: f32, high: f32) -> Result<f32> {
    if value.is_finite() && (low..=high).contains(&value) {
        Ok(value)
    } else {
        Err(Error::request(field, format!("{value}; allowed is {low} to {high}")))
    }
}

fn count(field: &'static str, value: Option<u32>, default: u32, most: u32) -> Result<u32> {
    match value.unwrap_or(default) {
        value if (1..=most).contains(&value) => Ok(value),
        value => Err(Error::request(field, format!("{value}; allowed is 1 to {most}"))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn defaults_are_those_of_the_method() {
        let knobs = Knobs::from_params(&SteeringParams::default()).expect("defaults are valid");
        assert_eq!((knobs.mode, knobs.eta, knobs.cap), (Mode::HoldNoise, 0.3, 3.0));
        assert_eq!(knobs.window, Window { start: 1.0, end: 0.6 });
        assert_eq!((knobs.inner_iterations, knobs.crops, knobs.probe_period), (1, 4, 1));
        assert_eq!(knobs.rerun_factor, 2.0);
        let params = SteeringParams { mode: SteeringMode::ShiftState.into(), ..Default::default() };
        assert_eq!(Knobs::from_params(&params).expect("valid").eta, 0.15);
    }

    #[test]
    fn a_knob_out_of_range_is_named() {
        let bad = [
            (SteeringParams { eta: Some(0.0), ..Default::default() }, "steering.eta"),
            (SteeringParams { eta: Some(f32::NAN), ..Default::default() }, "steering.eta"),
            (SteeringParams { eta: Some(2.1), ..Default::default() }, "steering.eta"),
            (
                SteeringParams { window_end: Some(1.0), ..Default::default() },
                "steering.window_start",
            ),
            (
                SteeringParams { window_end: Some(-0.1), ..Default::default() },
                "steering.window_end",
            ),
            (SteeringParams { smoothing: Some(3.0), ..Default::default() }, "steering.smoothing"),
            (
                SteeringParams { inner_iterations: Some(5), ..Default::default() },
                "steering.inner_iterations",
            ),
            (
                SteeringParams { probe_period: Some(0), ..Default::default() },
                "steering.probe_period",
            ),
            (SteeringParams { crops: Some(9), ..Default::default() }, "steering.crops"),
            (
                SteeringParams { rerun_factor: Some(0.9), ..Default::default() },
                "steering.rerun_factor",
            ),
        ];
        for (params, name) in bad {
            match Knobs::from_params(&params) {
                Err(Error::Request { field, .. }) => assert_eq!(field, name),
                other => panic!("{name}: {other:?}"),
            }
        }
    }
}
