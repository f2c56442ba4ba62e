//! Samplers: how a prediction becomes a clean estimate and the next state.
//!
//! Every process sampled here writes a state as `x = signal * x0 + noise * n`. Diffusion has
//! `signal = sqrt(a)`, `noise = sqrt(1 - a)` with `a` the cumulative alpha; rectified flow has
//! `signal = 1 - s`, `noise = s`. With the pair in hand the formulas of prediction and steering
//! need no further case:
//!
//! | prediction `p` | clean estimate `x0` | noise estimate `n` |
//! |---|---|---|
//! | epsilon | `(x - noise p) / signal` | `p` |
//! | v | `signal x - noise p` | `signal p + noise x` |
//! | flow | `x - noise p` | `x + signal p` |
//!
//! A new prediction is one variant of [`Prediction`] and one row of each match below.

mod choice;
mod config;
mod ddim;
mod flow_euler;

#[cfg(test)]
pub(crate) use choice::tests::choose;
pub use choice::{Chosen, flow_from_folder, for_flow, for_stable_diffusion, from_folder};
pub use config::SchedulerConfig;
pub use ddim::Ddim;
pub use flow_euler::{FlowConfig, FlowEuler};

use crate::error::Result;

/// Signal and noise coefficient of a state, `x = signal * x0 + noise * n`.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Level {
    /// Coefficient of the clean image, 0 to 1.
    pub signal: f32,
    /// Coefficient of the noise, 0 to 1.
    pub noise: f32,
}

impl Level {
    /// The level of a diffusion process at cumulative alpha `a`, both roots in f32 as diffusers
    /// takes them.
    pub fn diffusion(a: f32) -> Self {
        Self { signal: a.sqrt(), noise: (1.0 - a).sqrt() }
    }

    /// The level of a rectified flow at `sigma`, 1 for pure noise, after the shift.
    pub fn flow(sigma: f32) -> Self {
        Self { signal: 1.0 - sigma, noise: sigma }
    }
}

/// What the denoiser predicts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Prediction {
    /// The noise.
    Epsilon,
    /// The velocity of Salimans and Ho (2022), `sqrt(a) n - sqrt(1 - a) x0`.
    V,
    /// The velocity of a rectified flow (Liu et al. 2022), `n - x0`.
    Flow,
}

impl Prediction {
    /// Clean estimate from state `x` and prediction `p`, elementwise.
    pub fn clean_estimate(self, level: Level, x: &[f32], p: &[f32]) -> Vec<f32> {
        let Level { signal, noise } = level;
        match self {
            Self::Epsilon => zip(x, p, |x, p| (x - noise * p) / signal),
            Self::V => zip(x, p, |x, p| signal * x - noise * p),
            Self::Flow => zip(x, p, |x, p| x - noise * p),
        }
    }

    /// Noise estimate from state `x` and prediction `p`, elementwise.
    pub fn noise_estimate(self, level: Level, x: &[f32], p: &[f32]) -> Vec<f32> {
        let Level { signal, noise } = level;
        match self {
            Self::Epsilon => p.to_vec(),
            Self::V => zip(x, p, |x, p| signal * p + noise * x),
            Self::Flow => zip(x, p, |x, p| x + signal * p),
        }
    }
}

fn zip(x: &[f32], y: &[f32], f: impl Fn(f32, f32) -> f32) -> Vec<f32> {
    debug_assert_eq!(x.len(), y.len());
    x.iter().zip(y).map(|(&x, &y)| f(x, y)).collect()
}

/// One step of a schedule.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Step {
    /// What the denoiser is told: the training step, 0 to T.
    pub timestep: f32,
    /// Training time as a fraction `t / T`; in a flow the shifted sigma.
    pub time: f32,
    /// Level of the state before the step.
    pub level: Level,
    /// Level of the state after the step.
    pub next: Level,
}

/// What a sampler makes of one prediction.
#[derive(Debug, Clone, PartialEq)]
pub struct Advance {
    /// Clean estimate `x0`.
    pub clean: Vec<f32>,
    /// The next state, uncorrected.
    pub next: Vec<f32>,
}

/// A sampler bound to a model's scheduler configuration. It is pure: one state in, one out, each
/// image by itself, so nothing depends on the batch.
pub trait Sampler: Send + Sync {
    /// Name in calibrations and records, e.g. "ddim".
    fn name(&self) -> &'static str;

    /// Training steps T.
    fn train_timesteps(&self) -> u32;

    /// The steps from pure noise to the image.
    ///
    /// # Errors
    /// [`Error::Request`](crate::Error::Request) on `steps` if the model has no such schedule.
    fn schedule(&self, steps: u32) -> Result<Vec<Step>>;

    /// Clean estimate and next state of one image's latent `x` under `prediction`.
    fn advance(&self, step: &Step, x: &[f32], prediction: &[f32]) -> Advance;
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        /// Whatever is predicted, the two estimates explain the state they came from.
        #[test]
        fn estimates_recompose_the_state(
            a in 0.01f32..0.99, x in -3f32..3.0, p in -3f32..3.0, kind in 0..3,
        ) {
            let (prediction, level) = match kind {
                0 => (Prediction::Epsilon, Level::diffusion(a)),
                1 => (Prediction::V, Level::diffusion(a)),
                _ => (Prediction::Flow, Level::flow(a)),
            };
            let clean = prediction.clean_estimate(level, &[x], &[p])[0];
            let noise = prediction.noise_estimate(level, &[x], &[p])[0];
            prop_assert!((level.signal * clean + level.noise * noise - x).abs() < 1e-5);
        }
    }
}
