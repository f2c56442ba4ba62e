//! The knobs of steering: names, defaults, ranges, and what a client may do with each.
//!
//! [`KNOBS`] is the one table. The coordinator resolves and pins a job's knobs by it, and a worker reads
//! them by it again.

use fairlead_proto::v1::{EnergyWeight, SteeringMode, SteeringParams};

use crate::limits::{FieldError, MAX_CROPS};

/// Which values of a knob leave less of a concept than the policy's.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stronger {
    /// Greater ones.
    Greater,
    /// Smaller ones.
    Smaller,
    /// It has no clear order: only the policy's own value will do.
    None,
}

/// One knob.
#[derive(Debug)]
pub struct Knob {
    /// Its name in the contract and in policies files.
    pub name: &'static str,
    /// Least and greatest value.
    pub range: (f64, f64),
    /// The least value is not allowed itself.
    pub above_least: bool,
    /// What a client may do where a policy lets clients override knobs.
    pub stronger: Stronger,
    /// Its value, if it is set.
    get: fn(&SteeringParams) -> Option<f64>,
    /// Takes the value of the second where that has one.
    take: fn(&mut SteeringParams, &SteeringParams),
}

macro_rules! knob {
    ($field:ident, $range:expr, above_least: $above:expr, $stronger:ident) => {
        Knob {
            name: stringify!($field),
            range: $range,
            above_least: $above,
            stronger: Stronger::$stronger,
            get: |params| params.$field.map(f64::from),
            take: |under, over| under.$field = over.$field.or(under.$field),
        }
    };
}

/// All knobs.
///
/// A wider window, more crops, more corrections a step and more frequent questions see more and push
/// more; so do a greater `eta`, `cap` and `rerun_factor`. Neither a mode nor an amount of smoothing is
/// above another.
pub const KNOBS: [Knob; 10] = [
    Knob {
        name: "mode",
        range: (1.0, 3.0),
        above_least: false,
        stronger: Stronger::None,
        get: |params| (params.mode != UNSET_MODE).then(|| f64::from(params.mode)),
        take: |under, over| {
            if over.mode != UNSET_MODE {
                under.mode = over.mode;
            }
        },
    },
    knob!(eta, (0.0, 2.0), above_least: true, Greater),
    knob!(window_start, (0.0, 1.0), above_least: false, Greater),
    knob!(window_end, (0.0, 1.0), above_least: false, Smaller),
    knob!(inner_iterations, (1.0, 4.0), above_least: false, Greater),
    knob!(smoothing, (0.0, 2.0), above_least: false, None),
    knob!(cap, (0.0, 100.0), above_least: true, Greater),
    knob!(crops, (1.0, MAX_CROPS as f64), above_least: false, Greater),
    knob!(probe_period, (1.0, 4.0), above_least: false, Smaller),
    knob!(rerun_factor, (1.0, 4.0), above_least: false, Greater),
];

const UNSET_MODE: i32 = SteeringMode::Unspecified as i32;

/// What a knob is where nobody says.
fn defaults(mode: SteeringMode) -> SteeringParams {
    // Every knob has one: none is left to `..`.
    SteeringParams {
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
    }
}

/// The knobs of `over`, else of `under`; what neither sets stays unset.
pub fn over(under: &SteeringParams, over: &SteeringParams) -> SteeringParams {
    let mut both = *under;
    for knob in &KNOBS {
        (knob.take)(&mut both, over);
    }
    both
}

/// The knobs of `params`, else the defaults: every knob is set and in range.
///
/// # Errors
/// [`FieldError`] names the knob, its value and its range.
pub fn resolve(params: &SteeringParams) -> Result<SteeringParams, FieldError> {
    let mode = SteeringMode::try_from(params.mode).map_err(|_| {
        let problem = format!("is {}; use HOLD_NOISE, HOLD_STATE or SHIFT_STATE", params.mode);
        FieldError::new("mode", problem)
    })?;
    let mode = if mode == SteeringMode::Unspecified { SteeringMode::HoldNoise } else { mode };
    let resolved = over(&defaults(mode), params);
    for knob in &KNOBS {
        knob.check(&resolved)?;
    }
    let (start, end) = (resolved.window_start(), resolved.window_end());
    if start < end {
        let problem = format!(
            "is {start}, below window_end {end}; sampling runs from 1 down to 0, so the window starts \
             at the higher time"
        );
        return Err(FieldError::new("window_start", problem));
    }
    Ok(resolved)
}

/// How far the knobs that a client asks for may differ from its policy's.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Leave {
    /// Not at all.
    None,
    /// They may be stronger.
    Stronger,
    /// They may be anything in range. For policies that steer nothing.
    Any,
}

/// The knobs of the policy `own` with what a client asks for in `asked`, all resolved.
///
/// # Errors
/// [`FieldError`] names the knob, the value asked for and the policy's.
pub fn overridden(
    own: &SteeringParams,
    asked: &SteeringParams,
    leave: Leave,
) -> Result<SteeringParams, FieldError> {
    let own = resolve(own)?;
    let resolved = resolve(&over(&own, asked))?;
    for knob in &KNOBS {
        knob.check_override(&own, &resolved, leave)?;
    }
    Ok(resolved)
}

impl Knob {
    fn value(&self, params: &SteeringParams) -> f64 {
        (self.get)(params).unwrap_or(f64::NAN)
    }

    fn check(&self, params: &SteeringParams) -> Result<(), FieldError> {
        let (value, (least, greatest)) = (self.value(params), self.range);
        let is_low = if self.above_least { value <= least } else { value < least };
        if value <= greatest && !is_low {
            return Ok(());
        }
        let allowed = match self.above_least {
            true => format!("above {least} and at most {greatest}"),
            false => format!("from {least} to {greatest}"),
        };
        Err(FieldError::new(self.name, format!("is {}; it must be {allowed}", self.text(params))))
    }

    fn check_override(
        &self,
        policy: &SteeringParams,
        asked: &SteeringParams,
        leave: Leave,
    ) -> Result<(), FieldError> {
        let (own, value) = (self.value(policy), self.value(asked));
        let (is_allowed, allowed) = match (leave, self.stronger) {
            (Leave::Any, _) => return Ok(()),
            (Leave::None, _) => (value == own, "the policy does not allow overrides"),
            (Leave::Stronger, Stronger::Greater) => (value >= own, "a client may raise it only"),
            (Leave::Stronger, Stronger::Smaller) => (value <= own, "a client may lower it only"),
            (Leave::Stronger, Stronger::None) => (value == own, "a client may not change it"),
        };
        if is_allowed {
            return Ok(());
        }
        let (value, own) = (self.text(asked), self.text(policy));
        Err(FieldError::new(self.name, format!("is {value} and the policy's is {own}; {allowed}")))
    }

    /// Its value, for people.
    fn text(&self, params: &SteeringParams) -> String {
        match (self.name, SteeringMode::try_from(params.mode)) {
            ("mode", Ok(mode)) => {
                mode.as_str_name().trim_start_matches("STEERING_MODE_").to_owned()
            }
            // Through f32, which most knobs are: 0.3 and not 0.30000001192092896.
            _ => (self.value(params) as f32).to_string(),
        }
    }
}

/// Checks the factor of an energy's gradient.
///
/// # Errors
/// [`FieldError`] unless it is finite and above 0.
pub fn check_weight(weight: &EnergyWeight) -> Result<(), FieldError> {
    let EnergyWeight { energy, weight } = weight;
    if *weight > 0.0 && weight.is_finite() {
        return Ok(());
    }
    let problem = format!("is {weight} for energy `{energy}`; it must be above 0");
    Err(FieldError::new("weights", problem))
}

#[cfg(test)]
mod tests;
