//! `scheduler_config.json` as diffusers writes it.

use serde::Deserialize;

use super::Prediction;

/// How the noise schedule of training was made.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum BetaSchedule {
    /// Evenly spaced betas.
    Linear,
    /// Betas whose roots are evenly spaced.
    ScaledLinear,
    /// The cosine schedule of improved DDPM, betas capped at 0.999.
    #[serde(rename = "squaredcos_cap_v2")]
    SquaredCosCapV2,
}

/// Which of the training steps are visited.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Spacing {
    /// Both ends of training time.
    Linspace,
    /// Multiples of `T / steps` from 0, plus `steps_offset`.
    Leading,
    /// Backwards from `T - 1`.
    Trailing,
}

/// Values of absent keys that differ between scheduler classes.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Defaults {
    pub(crate) clip_sample: bool,
    pub(crate) set_alpha_to_one: bool,
    pub(crate) spacing: Spacing,
}

impl Defaults {
    pub(crate) const DDIM: Self =
        Self { clip_sample: true, set_alpha_to_one: true, spacing: Spacing::Leading };
}

/// Training steps of no known model come near; a bound keeps a corrupt file from asking for absurd memory.
pub(crate) const MAX_TRAIN_TIMESTEPS: u32 = 1 << 16;

/// A validated scheduler configuration.
#[derive(Debug, Clone)]
pub struct SchedulerConfig {
    pub(crate) train_timesteps: u32,
    pub(crate) beta_start: f64,
    pub(crate) beta_end: f64,
    pub(crate) beta_schedule: BetaSchedule,
    pub(crate) trained_betas: Option<Vec<f32>>,
    /// Clean estimates are clamped to this magnitude, if set.
    pub(crate) clip: Option<f32>,
    pub(crate) set_alpha_to_one: bool,
    pub(crate) steps_offset: u32,
    pub(crate) prediction: Prediction,
    pub(crate) spacing: Spacing,
    pub(crate) zero_snr: bool,
}

#[derive(Deserialize)]
struct File {
    #[serde(default = "thousand")]
    num_train_timesteps: u32,
    #[serde(default = "beta_start")]
    beta_start: f64,
    #[serde(default = "beta_end")]
    beta_end: f64,
    beta_schedule: Option<BetaSchedule>,
    trained_betas: Option<Vec<f32>>,
    clip_sample: Option<bool>,
    #[serde(default = "one")]
    clip_sample_range: f32,
    set_alpha_to_one: Option<bool>,
    #[serde(default)]
    steps_offset: u32,
    prediction_type: Option<String>,
    #[serde(default)]
    thresholding: bool,
    timestep_spacing: Option<Spacing>,
    #[serde(default)]
    rescale_betas_zero_snr: bool,
}

fn thousand() -> u32 {
    1000
}

fn beta_start() -> f64 {
    1e-4
}

fn beta_end() -> f64 {
    0.02
}

fn one() -> f32 {
    1.0
}

/// Refuses what no model was trained with.
pub(crate) fn check_train_timesteps(number: u32) -> Result<(), String> {
    if (1..=MAX_TRAIN_TIMESTEPS).contains(&number) {
        return Ok(());
    }
    Err(format!("num_train_timesteps is {number}; it must be from 1 to {MAX_TRAIN_TIMESTEPS}"))
}

/// The value of `_class_name`.
pub(crate) fn class_name(text: &str) -> Result<String, String> {
    #[derive(Deserialize)]
    struct Class {
        #[serde(rename = "_class_name")]
        class: Option<String>,
    }
    let class: Class = serde_json::from_str(text).map_err(|e| format!("not valid JSON: {e}"))?;
    class.class.ok_or_else(|| "has no `_class_name`; write the scheduler's diffusers class".into())
}

impl SchedulerConfig {
    /// Parses the file, absent keys taking `defaults`.
    pub(crate) fn parse(text: &str, defaults: Defaults) -> Result<Self, String> {
        let file: File = serde_json::from_str(text).map_err(|e| format!("not understood: {e}"))?;
        let prediction = match file.prediction_type.as_deref() {
            None | Some("epsilon") => Prediction::Epsilon,
            Some("v_prediction") => Prediction::V,
            Some(other) => {
                return Err(format!(
                    "prediction_type `{other}` is not supported; supported are epsilon, \
                     v_prediction"
                ));
            }
        };
        if file.thresholding {
            return Err(
                "thresholding: true is for pixel models; a latent model must not set it".to_owned()
            );
        }
        if file.rescale_betas_zero_snr && prediction == Prediction::Epsilon {
            return Err("rescale_betas_zero_snr with prediction_type epsilon divides by zero at \
                        the first step; such a model needs v_prediction"
                .to_owned());
        }
        let train_timesteps = file
            .trained_betas
            .as_ref()
            .map_or(file.num_train_timesteps, |betas| betas.len() as u32);
        if train_timesteps != file.num_train_timesteps {
            return Err(format!(
                "num_train_timesteps is {}, trained_betas has {train_timesteps}; they must agree",
                file.num_train_timesteps
            ));
        }
        check_train_timesteps(train_timesteps)?;
        if file.steps_offset >= train_timesteps {
            return Err(format!(
                "steps_offset is {}; it must be below num_train_timesteps {train_timesteps}",
                file.steps_offset
            ));
        }
        let clip = file.clip_sample.unwrap_or(defaults.clip_sample);
        if clip && file.clip_sample_range <= 0.0 {
            let range = file.clip_sample_range;
            return Err(format!("clip_sample_range is {range}; it must be above 0"));
        }
        Ok(Self {
            train_timesteps,
            beta_start: file.beta_start,
            beta_end: file.beta_end,
            beta_schedule: file.beta_schedule.unwrap_or(BetaSchedule::Linear),
            trained_betas: file.trained_betas,
            clip: clip.then_some(file.clip_sample_range),
            set_alpha_to_one: file.set_alpha_to_one.unwrap_or(defaults.set_alpha_to_one),
            steps_offset: file.steps_offset,
            prediction,
            spacing: file.timestep_spacing.unwrap_or(defaults.spacing),
            zero_snr: file.rescale_betas_zero_snr,
        })
    }
}
