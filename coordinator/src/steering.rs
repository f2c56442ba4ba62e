//! Knobs of steering: ranges, defaults and how a client's overrides meet the policy's values.

use std::ops::RangeInclusive;

use fairlead_proto::v1::{SteeringMode, SteeringParams};
use serde::Deserialize;

/// `[policies.NAME.steering]` of the policies file.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "snake_case")]
pub(crate) struct SteeringFile {
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

/// The knobs of `over`, else of `under`; what neither sets stays unset.
pub(crate) fn over(under: &SteeringParams, over: &SteeringParams) -> SteeringParams {
    let mode =
        if over.mode == i32::from(SteeringMode::Unspecified) { under.mode } else { over.mode };
    SteeringParams {
        mode,
        eta: over.eta.or(under.eta),
        window_start: over.window_start.or(under.window_start),
        window_end: over.window_end.or(under.window_end),
        inner_iterations: over.inner_iterations.or(under.inner_iterations),
        smoothing: over.smoothing.or(under.smoothing),
        cap: over.cap.or(under.cap),
        crops: over.crops.or(under.crops),
        probe_period: over.probe_period.or(under.probe_period),
        rerun_factor: over.rerun_factor.or(under.rerun_factor),
    }
}

/// The knobs of `overrides`, else of `policy`, else the defaults: every field is set and in range.
/// On an error the text names the knob, its value and its range.
pub(crate) fn resolve(
    policy: &SteeringParams,
    overrides: Option<&SteeringParams>,
) -> Result<SteeringParams, String> {
    let chosen = overrides.map_or(*policy, |overrides| over(policy, overrides));
    let mode = match mode_of(&chosen)? {
        SteeringMode::Unspecified => SteeringMode::HoldNoise,
        mode => mode,
    };
    let defaults = SteeringParams {
        mode: mode.into(),
        eta: Some(if mode == SteeringMode::ShiftState { 0.15 } else { 0.3 }),
        window_start: Some(1.0),
        window_end: Some(0.6),
        inner_iterations: Some(1),
        smoothing: Some(1.0),
        cap: Some(3.0),
        crops: Some(4),
        probe_period: Some(1),
        rerun_factor: Some(2.0),
    };
    let resolved = over(&defaults, &chosen);
    check(&resolved)?;
    Ok(resolved)
}

/// Whether a client asked for anything.
pub(crate) fn is_unset(params: &SteeringParams) -> bool {
    *params == SteeringParams::default()
}

fn mode_of(params: &SteeringParams) -> Result<SteeringMode, String> {
    SteeringMode::try_from(params.mode).map_err(|_| {
        format!("mode {} is unknown; use HOLD_NOISE, HOLD_STATE or SHIFT_STATE", params.mode)
    })
}

fn check(params: &SteeringParams) -> Result<(), String> {
    positive("eta", params.eta(), 2.0)?;
    between("window_start", params.window_start(), 0.0..=1.0)?;
    between("window_end", params.window_end(), 0.0..=1.0)?;
    if params.window_start() < params.window_end() {
        return Err(format!(
            "window_start {} lies below window_end {}; sampling runs from 1 down to 0, so the \
             window starts at the higher time",
            params.window_start(),
            params.window_end()
        ));
    }
    between("inner_iterations", params.inner_iterations(), 1..=4)?;
    between("smoothing", params.smoothing(), 0.0..=2.0)?;
    positive("cap", params.cap(), 100.0)?;
    between("crops", params.crops(), 1..=8)?;
    between("probe_period", params.probe_period(), 1..=4)?;
    between("rerun_factor", params.rerun_factor(), 1.0..=4.0)
}

fn between<T: PartialOrd + std::fmt::Display>(
    name: &str,
    value: T,
    range: RangeInclusive<T>,
) -> Result<(), String> {
    if range.contains(&value) {
        return Ok(());
    }
    Err(format!("{name} is {value}; it must be from {} to {}", range.start(), range.end()))
}

fn positive(name: &str, value: f32, max: f32) -> Result<(), String> {
    if value > 0.0 && value <= max {
        return Ok(());
    }
    Err(format!("{name} is {value}; it must be above 0 and at most {max}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn over(change: impl FnOnce(&mut SteeringParams)) -> Result<SteeringParams, String> {
        let mut params = SteeringParams::default();
        change(&mut params);
        resolve(&SteeringParams { eta: Some(0.5), ..Default::default() }, Some(&params))
    }

    #[test]
    fn override_beats_policy_beats_default() {
        let resolved = over(|p| p.crops = Some(2)).expect("in range");
        assert_eq!((resolved.eta(), resolved.crops(), resolved.cap()), (0.5, 2, 3.0));
        assert_eq!(resolved.mode(), SteeringMode::HoldNoise);
        let shifted =
            SteeringParams { mode: SteeringMode::ShiftState.into(), ..Default::default() };
        assert_eq!(resolve(&shifted, None).expect("in range").eta(), 0.15);
    }

    #[test]
    fn values_out_of_range_are_named_with_their_range() {
        type Set = fn(&mut SteeringParams);
        let cases: [(Set, &str); 11] = [
            (|p| p.eta = Some(0.0), "eta is 0; it must be above 0 and at most 2"),
            (|p| p.eta = Some(f32::NAN), "eta is NaN"),
            (|p| p.window_start = Some(1.5), "window_start is 1.5; it must be from 0 to 1"),
            (|p| p.window_start = Some(0.5), "window_start 0.5 lies below window_end 0.6"),
            (|p| p.inner_iterations = Some(5), "inner_iterations is 5; it must be from 1 to 4"),
            (|p| p.smoothing = Some(-1.0), "smoothing is -1"),
            (|p| p.cap = Some(f32::INFINITY), "cap is inf"),
            (|p| p.crops = Some(9), "crops is 9; it must be from 1 to 8"),
            (|p| p.probe_period = Some(0), "probe_period is 0"),
            (|p| p.rerun_factor = Some(0.5), "rerun_factor is 0.5; it must be from 1 to 4"),
            (|p| p.mode = 9, "mode 9 is unknown"),
        ];
        for (change, expected) in cases {
            let problem = over(change).expect_err(expected);
            assert!(problem.starts_with(expected), "{problem}");
        }
    }
}
