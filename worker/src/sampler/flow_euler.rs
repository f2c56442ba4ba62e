//! Euler's method on a rectified flow, step for step as diffusers' `FlowMatchEulerDiscreteScheduler`
//! computes it.

use std::ops::RangeInclusive;

use fairlead_models::ConfigFile;

use super::{
    Advance, Level, Prediction, Sampler, Step,
    config::{SOLVERS, train_timesteps},
};
use crate::{Error, error::Result};

/// Shifts that leave each of a thousand steps a sigma of its own. Published models have 1 to 17.
const SHIFTS: RangeInclusive<f64> = 0.1..=100.0;

/// The settings that are honoured; those that would change the schedule otherwise are refused.
#[derive(Debug, Clone, PartialEq)]
pub struct FlowConfig {
    train_timesteps: u32,
    /// Moves sigmas towards noise: `s -> shift s / (1 + (shift - 1) s)`.
    shift: f64,
}

/// Settings that would change the schedule.
const REFUSED: [&str; 6] = [
    "use_dynamic_shifting",
    "invert_sigmas",
    "stochastic_sampling",
    "use_karras_sigmas",
    "use_exponential_sigmas",
    "use_beta_sigmas",
];
/// Settings of the refused ones and of other solvers.
const HARMLESS: [&str; 12] = [
    "base_image_seq_len",
    "beta_end",
    "beta_schedule",
    "beta_start",
    "clip_sample",
    "max_image_seq_len",
    "set_alpha_to_one",
    "shift",
    "steps_offset",
    "timestep_spacing",
    "trained_betas",
    "upscale_mode",
];

impl FlowConfig {
    /// Reads `scheduler_config.json`; `shift` is what the class calls the shift.
    pub(crate) fn parse(fields: &ConfigFile, shift: &str) -> Result<Self, fairlead_models::Error> {
        let fixed = "false or absent: only a fixed shift";
        for field in REFUSED {
            if fields.flag(field, false)? {
                return Err(fields.unsupported(field, fixed));
            }
        }
        if fields.number("shift_terminal", 0.0)? != 0.0 {
            return Err(fields.unsupported("shift_terminal", "null: only a fixed shift"));
        }
        if fields.get("scale_factors").is_some() {
            return Err(fields.unsupported("scale_factors", "null: all steps have one size"));
        }
        let value = fields.number(shift, 1.0)?;
        if !SHIFTS.contains(&value) {
            let (least, most) = (SHIFTS.start(), SHIFTS.end());
            return Err(fields.unsupported(shift, format!("{least} to {most}")));
        }
        let config = Self { train_timesteps: train_timesteps(fields)?, shift: value };
        fields.finish(&[&HARMLESS[..], &SOLVERS].concat())?;
        Ok(config)
    }
}

/// The Euler sampler of one scheduler configuration.
#[derive(Debug, Clone)]
pub struct FlowEuler {
    config: FlowConfig,
}

impl FlowEuler {
    pub(crate) fn new(config: FlowConfig) -> Self {
        Self { config }
    }

    /// Sigma of each step: equally spaced between the shifted ends of training, then shifted again.
    fn sigmas(&self, steps: u32) -> Vec<f32> {
        let FlowConfig { train_timesteps, shift } = self.config;
        let total = f64::from(train_timesteps);
        // The ends are f32, as the scheduler keeps its training sigmas.
        let end = |sigma: f32| {
            let (shift, less) = (shift as f32, (shift - 1.0) as f32);
            f64::from(shift * sigma / (1.0 + less * sigma)) * total
        };
        let (first, last) = (end(1.0), end(1.0 / train_timesteps as f32));
        let width = if steps > 1 { (last - first) / f64::from(steps - 1) } else { 0.0 };
        (0..steps)
            .map(|i| {
                // numpy.linspace ends on its last value itself.
                let is_last = steps > 1 && i == steps - 1;
                let t = if is_last { last } else { first + f64::from(i) * width };
                let sigma = t / total;
                // The ends' rounding would lead some shifts beyond pure noise: 1.32 by one in the last place.
                ((shift * sigma / (1.0 + (shift - 1.0) * sigma)) as f32).min(1.0)
            })
            .collect()
    }
}

impl Sampler for FlowEuler {
    fn name(&self) -> &'static str {
        "flow-euler"
    }

    fn train_timesteps(&self) -> u32 {
        self.config.train_timesteps
    }

    fn schedule(&self, steps: u32) -> Result<Vec<Step>> {
        let total = self.config.train_timesteps;
        if steps == 0 || steps > total {
            return Err(Error::request(
                "steps",
                format!("{steps}; this model allows 1 to {total}"),
            ));
        }
        let mut sigmas = self.sigmas(steps);
        sigmas.push(0.0);
        Ok(sigmas
            .windows(2)
            .map(|pair| Step {
                timestep: pair[0] * total as f32,
                time: pair[0],
                level: Level::flow(pair[0]),
                next: Level::flow(pair[1]),
            })
            .collect())
    }

    fn advance(&self, step: &Step, x: &[f32], prediction: &[f32]) -> Advance {
        let clean = Prediction::Flow.clean_estimate(step.level, x, prediction);
        // `signal' x0 + noise' n` of the table, as one move along the velocity.
        let dt = step.next.noise - step.level.noise;
        let next = x.iter().zip(prediction).map(|(&x, &v)| x + dt * v).collect();
        Advance { clean, next }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sampler(extra: &str) -> Result<FlowEuler, String> {
        let fields = ConfigFile::parse("scheduler_config.json".as_ref(), &format!("{{{extra}}}"));
        let config = fields.and_then(|fields| FlowConfig::parse(&fields, "shift"));
        config.map(FlowEuler::new).map_err(|error| error.to_string())
    }

    #[test]
    fn sigmas_fall_from_one_to_zero_whatever_the_shift() {
        for shift in ["0.1", "0.5", "1.0", "1.32", "3.0", "100"] {
            let sampler = sampler(&format!(r#""shift": {shift}"#)).expect("it is supported");
            for count in [20, 1000] {
                let steps = sampler.schedule(count).expect("a schedule");
                let (time, timestep) = (steps[0].time, steps[0].timestep);
                match shift {
                    // The rounding of its ends leads to a little less.
                    "0.1" => assert!((0.999_99..1.0).contains(&time), "{time}, {timestep}"),
                    _ => assert_eq!((time, timestep), (1.0, 1000.0), "{shift}"),
                }
                let last = steps.last().expect("it has steps");
                assert_eq!(last.next, Level { signal: 1.0, noise: 0.0 });
                assert!(steps.iter().all(|step| step.next.noise < step.level.noise));
                assert!(steps.windows(2).all(|pair| pair[0].next == pair[1].level));
            }
        }
    }

    #[test]
    fn the_two_ways_to_the_next_state_agree() {
        let sampler = sampler(r#""shift": 3.0"#).expect("it is supported");
        for step in sampler.schedule(7).expect("a schedule") {
            let (x, v) = ([0.7], [-2.0]);
            let advance = sampler.advance(&step, &x, &v);
            let noise = Prediction::Flow.noise_estimate(step.level, &x, &v)[0];
            let next = step.next.signal * advance.clean[0] + step.next.noise * noise;
            assert!((next - advance.next[0]).abs() < 1e-5);
        }
    }

    #[test]
    fn what_cannot_be_honoured_is_refused_by_name() {
        for name in ["use_dynamic_shifting", "stochastic_sampling", "use_karras_sigmas"] {
            let message = sampler(&format!(r#""{name}": true"#)).expect_err("it is refused");
            assert!(message.contains(name), "{message}");
        }
        for (extra, name) in [
            (r#""shift_terminal": 0.1"#, "shift_terminal"),
            (r#""shift": 0"#, "shift is 0"),
            (r#""shift": 1e38"#, "shift is 1e"),
            (r#""num_train_timesteps": 0"#, "num_train_timesteps"),
        ] {
            let message = sampler(extra).expect_err("it is refused");
            assert!(message.contains(name), "{message}");
        }
        let sampler = sampler("").expect("everything has a default");
        for steps in [0, 1001] {
            assert!(
                sampler.schedule(steps).expect_err("refused").to_string().contains("1 to 1000")
            );
        }
    }
}
