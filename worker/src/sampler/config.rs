//! `scheduler_config.json` as diffusers writes it.

use fairlead_models::{ConfigFile, Error};
use serde_json::Value;

use super::Prediction;

/// How the noise schedule of training was made.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum BetaSchedule {
    /// Evenly spaced betas.
    Linear,
    /// Betas whose roots are evenly spaced.
    ScaledLinear,
    /// The cosine schedule of improved DDPM, betas capped at 0.999.
    SquaredCosCapV2,
}

/// Which of the training steps are visited.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Spacing {
    /// Both ends of training time.
    Linspace,
    /// Multiples of `T / steps` from 0, plus `steps_offset`.
    Leading,
    /// Backwards from `T - 1`.
    Trailing,
}

/// Names of the schedules in files.
const SCHEDULES: [(&str, BetaSchedule); 3] = [
    ("linear", BetaSchedule::Linear),
    ("scaled_linear", BetaSchedule::ScaledLinear),
    ("squaredcos_cap_v2", BetaSchedule::SquaredCosCapV2),
];
/// Names of the spacings in files.
const SPACINGS: [(&str, Spacing); 3] = [
    ("linspace", Spacing::Linspace),
    ("leading", Spacing::Leading),
    ("trailing", Spacing::Trailing),
];

/// Values of absent keys that differ between scheduler classes.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Defaults {
    pub(crate) beta_start: f64,
    pub(crate) beta_end: f64,
    pub(crate) beta_schedule: BetaSchedule,
    pub(crate) clip_sample: bool,
    pub(crate) set_alpha_to_one: bool,
    pub(crate) spacing: Spacing,
}

impl Defaults {
    pub(crate) const DDIM: Self = Self {
        beta_start: 1e-4,
        beta_end: 0.02,
        beta_schedule: BetaSchedule::Linear,
        clip_sample: true,
        set_alpha_to_one: true,
        spacing: Spacing::Leading,
    };
}

/// Training steps of no known model come near; a bound keeps a corrupt file from asking for absurd memory.
pub(crate) const MAX_TRAIN_TIMESTEPS: usize = 1 << 16;

/// Keys of other solvers than those here: they say how a solver goes through the noise schedule,
/// not what the schedule is.
pub(super) const SOLVERS: [&str; 32] = [
    "algorithm_type",
    "corrector_order",
    "disable_corrector",
    "dynamic_thresholding_ratio",
    "euler_at_final",
    "final_sigmas_type",
    "flow_shift",
    "interpolation_type",
    "lambda_min_clipped",
    "lower_order_final",
    "noise_sampler_seed",
    "original_inference_steps",
    "predict_x0",
    "predictor_order",
    "rho",
    "sample_max_value",
    "sigma_max",
    "sigma_min",
    "skip_prk_steps",
    "solver_order",
    "solver_p",
    "solver_type",
    "tau_func",
    "time_shift_type",
    "timestep_scaling",
    "use_beta_sigmas",
    "use_exponential_sigmas",
    "use_karras_sigmas",
    "use_lu_lambdas",
    "clip_sample_range",
    "base_shift",
    "max_shift",
];

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

/// The training steps, refusing what no model was trained with.
pub(super) fn train_timesteps(fields: &ConfigFile) -> Result<u32, Error> {
    let number = fields.size("num_train_timesteps", 1000)?;
    if number <= MAX_TRAIN_TIMESTEPS {
        return Ok(number as u32);
    }
    Err(fields.unsupported("num_train_timesteps", format!("1 to {MAX_TRAIN_TIMESTEPS}")))
}

impl SchedulerConfig {
    /// Reads the file, absent keys taking `defaults`.
    pub(crate) fn parse(fields: &ConfigFile, defaults: Defaults) -> Result<Self, Error> {
        let train_timesteps = train_timesteps(fields)?;
        let prediction = prediction(fields)?;
        let zero_snr = fields.flag("rescale_betas_zero_snr", false)?;
        if zero_snr && prediction == Prediction::Epsilon {
            let wanted = "false with prediction_type epsilon, which divides by zero at the first step; \
                          such a model needs v_prediction";
            return Err(fields.unsupported("rescale_betas_zero_snr", wanted));
        }
        refuse_unsound(fields)?;
        let steps_offset = match fields.get("steps_offset") {
            None => 0,
            Some(value) => value
                .as_u64()
                .filter(|&offset| offset < u64::from(train_timesteps))
                .ok_or_else(|| {
                    let wanted = format!("less than num_train_timesteps {train_timesteps}");
                    fields.unsupported("steps_offset", wanted)
                })? as u32,
        };
        let clips = fields.flag("clip_sample", defaults.clip_sample)?;
        let clip = clips.then(|| fields.positive("clip_sample_range", 1.0)).transpose()?;
        let config = Self {
            train_timesteps,
            beta_start: fields.number("beta_start", defaults.beta_start)?,
            beta_end: fields.number("beta_end", defaults.beta_end)?,
            beta_schedule: named(fields, "beta_schedule", &SCHEDULES, defaults.beta_schedule)?,
            trained_betas: fields.numbers("trained_betas", train_timesteps as usize)?,
            clip: clip.map(|range| range as f32),
            set_alpha_to_one: fields.flag("set_alpha_to_one", defaults.set_alpha_to_one)?,
            steps_offset,
            prediction,
            spacing: named(fields, "timestep_spacing", &SPACINGS, defaults.spacing)?,
            zero_snr,
        };
        fields.finish(&SOLVERS)?;
        Ok(config)
    }
}

/// What the denoiser predicts.
fn prediction(fields: &ConfigFile) -> Result<Prediction, Error> {
    match fields.get("prediction_type").map(Value::as_str) {
        None | Some(Some("epsilon")) => Ok(Prediction::Epsilon),
        Some(Some("v_prediction")) => Ok(Prediction::V),
        Some(Some("flow_prediction")) => {
            let wanted = "epsilon, v_prediction; a rectified flow is not served in this pipeline";
            Err(fields.unsupported("prediction_type", wanted))
        }
        Some(_) => Err(fields.unsupported("prediction_type", "epsilon, v_prediction")),
    }
}

/// Refuses settings under which DDIM would sample another process than the one that the model
/// learned.
fn refuse_unsound(fields: &ConfigFile) -> Result<(), Error> {
    for (field, why) in [
        ("thresholding", "it is for pixel models; a latent model must not set it"),
        ("use_flow_sigmas", "this pipeline samples diffusion, not a rectified flow"),
        ("use_dynamic_shifting", "the schedule of diffusion is not shifted"),
    ] {
        if fields.flag(field, false)? {
            return Err(fields.unsupported(field, format!("false: {why}")));
        }
    }
    let variances = ["fixed_small", "fixed_small_log", "fixed_large", "fixed_large_log"];
    fields.choice("variance_type", &variances)?;
    fields.choice("timestep_type", &["discrete"])?;
    Ok(())
}

/// One of the values of a table by its name.
fn named<T: Copy>(
    fields: &ConfigFile,
    field: &str,
    table: &[(&str, T)],
    absent: T,
) -> Result<T, Error> {
    let Some(value) = fields.get(field) else { return Ok(absent) };
    let found = table.iter().find(|(name, _)| value.as_str() == Some(name));
    found.map(|(_, value)| *value).ok_or_else(|| {
        let names: Vec<&str> = table.iter().map(|(name, _)| *name).collect();
        fields.unsupported(field, names.join(", "))
    })
}
