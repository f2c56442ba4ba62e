//! DDIM without added noise (Song et al. 2020, eta 0), step for step as diffusers'
//! `DDIMScheduler` computes it.

use fairlead_models::ConfigFile;

use super::{
    Advance, Level, Sampler, SchedulerConfig, Step,
    config::{BetaSchedule, Spacing},
};
use crate::{Error, error::Result};

/// The DDIM sampler of one scheduler configuration.
#[derive(Debug, Clone)]
pub struct Ddim {
    config: SchedulerConfig,
    /// Cumulative alpha of each training step.
    alphas: Vec<f32>,
}

impl Ddim {
    /// Builds the noise schedule of `config`, which was read from `fields`.
    pub(crate) fn new(config: SchedulerConfig, fields: &ConfigFile) -> Result<Self> {
        let mut alphas = cumulative_alphas(&betas(&config));
        if config.zero_snr {
            alphas = zero_terminal_snr(&alphas);
        }
        // Only the last alpha may be zero, and only where zero SNR was asked for.
        let positive = alphas.len() - usize::from(config.zero_snr);
        if !alphas[..positive].iter().all(|&alpha| alpha > 0.0 && alpha <= 1.0) {
            let reason = "the betas leave the range [0, 1); check beta_start, beta_end and \
                          trained_betas";
            return Err(Error::Folder { path: fields.path().into(), reason: reason.into() });
        }
        Ok(Self { config, alphas })
    }

    /// Training steps to visit, from noise to image.
    fn timesteps(&self, steps: u32) -> Vec<u32> {
        let (total, n) = (self.config.train_timesteps, steps);
        match self.config.spacing {
            Spacing::Leading => {
                let ratio = total / n;
                (0..n).rev().map(|i| i * ratio + self.config.steps_offset).collect()
            }
            Spacing::Linspace => {
                let width = f64::from(total - 1) / f64::from((n - 1).max(1));
                (0..n).rev().map(|i| (f64::from(i) * width).round_ties_even() as u32).collect()
            }
            Spacing::Trailing => {
                // numpy.arange(T, 0, -ratio): the increment is the rounded difference of the
                // first two values.
                let first = f64::from(total);
                let increment = (first - first / f64::from(n)) - first;
                (0..n)
                    .map(|i| (first + f64::from(i) * increment).round_ties_even() as u32)
                    .map(|t| t.saturating_sub(1))
                    .collect()
            }
        }
    }
}

impl Sampler for Ddim {
    fn name(&self) -> &'static str {
        "ddim"
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
        let timesteps = self.timesteps(steps);
        if timesteps[0] >= total {
            return Err(Error::request(
                "steps",
                format!(
                    "{steps} steps with the model's steps_offset {} begin after its last training \
                     step {}; ask for fewer",
                    self.config.steps_offset,
                    total - 1
                ),
            ));
        }
        let last = if self.config.set_alpha_to_one { 1.0 } else { self.alphas[0] };
        let stride = total / steps;
        Ok(timesteps
            .into_iter()
            .map(|t| Step {
                timestep: t as f32,
                time: t as f32 / total as f32,
                level: Level::diffusion(self.alphas[t as usize]),
                next: Level::diffusion(
                    t.checked_sub(stride).map_or(last, |previous| self.alphas[previous as usize]),
                ),
            })
            .collect())
    }

    fn advance(&self, step: &Step, x: &[f32], prediction: &[f32]) -> Advance {
        let mut clean = self.config.prediction.clean_estimate(step.level, x, prediction);
        if let Some(range) = self.config.clip {
            clean.iter_mut().for_each(|value| *value = value.clamp(-range, range));
        }
        let noise = self.config.prediction.noise_estimate(step.level, x, prediction);
        let Level { signal, noise: sigma } = step.next;
        let next = clean.iter().zip(&noise).map(|(&x0, &n)| signal * x0 + sigma * n).collect();
        Advance { clean, next }
    }
}

/// Betas in f32, as torch makes them.
fn betas(config: &SchedulerConfig) -> Vec<f32> {
    if let Some(betas) = &config.trained_betas {
        return betas.clone();
    }
    let total = config.train_timesteps;
    match config.beta_schedule {
        BetaSchedule::Linear => linspace(config.beta_start, config.beta_end, total),
        BetaSchedule::ScaledLinear => {
            let roots = linspace(config.beta_start.sqrt(), config.beta_end.sqrt(), total);
            roots.into_iter().map(|root| root * root).collect()
        }
        BetaSchedule::SquaredCosCapV2 => {
            let alpha_bar =
                |t: f64| ((t + 0.008) / 1.008 * std::f64::consts::PI / 2.0).cos().powi(2);
            (0..total)
                .map(|i| {
                    let (from, to) =
                        (f64::from(i) / f64::from(total), f64::from(i + 1) / f64::from(total));
                    (1.0 - alpha_bar(to) / alpha_bar(from)).min(0.999) as f32
                })
                .collect()
        }
    }
}

/// `torch.linspace` in f32: from both ends towards the middle.
fn linspace(start: f64, end: f64, n: u32) -> Vec<f32> {
    let (start, end) = (start as f32, end as f32);
    let step = if n > 1 { (end - start) / (n - 1) as f32 } else { 0.0 };
    (0..n)
        .map(|i| {
            if i < n / 2 || n == 1 {
                start + step * i as f32
            } else {
                end - step * (n - 1 - i) as f32
            }
        })
        .collect()
}

/// `torch.cumprod(1 - betas)`: a running product in f64, each value rounded to f32.
fn cumulative_alphas(betas: &[f32]) -> Vec<f32> {
    betas
        .iter()
        .scan(1f64, |product, &beta| {
            *product *= f64::from(1.0 - beta);
            Some(*product as f32)
        })
        .collect()
}

/// Shifts and scales the roots so that the last is zero and the first unchanged, then goes through
/// betas again, as diffusers does (Lin et al. 2023, algorithm 1).
fn zero_terminal_snr(alphas: &[f32]) -> Vec<f32> {
    let roots: Vec<f32> = alphas.iter().map(|alpha| alpha.sqrt()).collect();
    let (first, last) = (roots[0], roots[roots.len() - 1]);
    let scale = first / (first - last);
    let rescaled: Vec<f32> = roots
        .iter()
        .map(|root| {
            let root = (root - last) * scale;
            root * root
        })
        .collect();
    let previous = std::iter::once(1.0).chain(rescaled.iter().copied());
    let betas: Vec<f32> =
        rescaled.iter().zip(previous).map(|(now, then)| 1.0 - now / then).collect();
    cumulative_alphas(&betas)
}
