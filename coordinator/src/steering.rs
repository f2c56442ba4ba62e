//! Knobs of steering as a policies file writes them. Names, ranges and defaults are
//! [`fairlead_common::steering`]'s.

use std::collections::BTreeSet;

use fairlead_proto::v1::{SteeringMode, SteeringParams};
use serde::Deserialize;

/// `[policies.NAME.steering]` of the policies file.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "snake_case")]
pub(crate) struct SteeringFile {
    /// Generators by name that the knobs are for.
    pub(crate) generators: Option<BTreeSet<String>>,
    mode: Option<ModeName>,
    eta: Option<f32>,
    window_start: Option<f32>,
    window_end: Option<f32>,
    inner_iterations: Option<u32>,
    smoothing: Option<f32>,
    cap: Option<f32>,
    crops: Option<u32>,
    probe_period: Option<u32>,
    rerun_factor: Option<f32>,
}

#[derive(Debug, Clone, Copy, Deserialize)]
#[serde(rename_all = "kebab-case")]
enum ModeName {
    HoldNoise,
    HoldState,
    ShiftState,
}

impl From<SteeringFile> for SteeringParams {
    fn from(file: SteeringFile) -> Self {
        let mode = match file.mode {
            None => SteeringMode::Unspecified,
            Some(ModeName::HoldNoise) => SteeringMode::HoldNoise,
            Some(ModeName::HoldState) => SteeringMode::HoldState,
            Some(ModeName::ShiftState) => SteeringMode::ShiftState,
        };
        Self {
            mode: mode.into(),
            eta: file.eta,
            window_start: file.window_start,
            window_end: file.window_end,
            inner_iterations: file.inner_iterations,
            smoothing: file.smoothing,
            cap: file.cap,
            crops: file.crops,
            probe_period: file.probe_period,
            rerun_factor: file.rerun_factor,
        }
    }
}
