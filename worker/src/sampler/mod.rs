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

mod config;
mod ddim;
mod flow_euler;

use std::path::Path;

pub use config::SchedulerConfig;
pub use ddim::Ddim;
pub use flow_euler::{FlowConfig, FlowEuler};

use crate::{Error, error::Result};

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
    /// [`Error::Request`] on `steps` if the model has no such schedule.
    fn schedule(&self, steps: u32) -> Result<Vec<Step>>;

    /// Clean estimate and next state of one image's latent `x` under `prediction`.
    fn advance(&self, step: &Step, x: &[f32], prediction: &[f32]) -> Advance;
}

/// A sampler and what the caller should know about the choice.
pub struct Chosen {
    /// The sampler.
    pub sampler: Box<dyn Sampler>,
    /// Where the folder's file was not taken as it stands.
    pub notices: Vec<String>,
}

/// What to do with a folder's scheduler class.
struct Row {
    class: &'static str,
    /// Values that an absent key takes in this class, where they differ from DDIM's.
    defaults: config::Defaults,
}

/// Scheduler classes whose training noise schedule DDIM can sample from, with diffusers' own
/// defaults of each. A new sampler is one file and a column here.
const TABLE: &[Row] = {
    use config::{Defaults, Spacing};
    const MULTISTEP: Defaults =
        Defaults { clip_sample: false, set_alpha_to_one: false, spacing: Spacing::Linspace };
    &[
        Row { class: "DDIMScheduler", defaults: Defaults::DDIM },
        Row { class: "DDPMScheduler", defaults: Defaults::DDIM },
        Row {
            class: "PNDMScheduler",
            defaults: Defaults {
                clip_sample: false,
                set_alpha_to_one: false,
                spacing: Spacing::Leading,
            },
        },
        Row { class: "EulerDiscreteScheduler", defaults: MULTISTEP },
        Row { class: "EulerAncestralDiscreteScheduler", defaults: MULTISTEP },
        Row { class: "LMSDiscreteScheduler", defaults: MULTISTEP },
        Row { class: "DPMSolverMultistepScheduler", defaults: MULTISTEP },
        Row { class: "DPMSolverSinglestepScheduler", defaults: MULTISTEP },
        Row { class: "UniPCMultistepScheduler", defaults: MULTISTEP },
    ]
};

/// The scheduler class of rectified flows.
const FLOW_CLASS: &str = "FlowMatchEulerDiscreteScheduler";

/// Reads `scheduler_config.json` of a diffusion model in `dir` and chooses the sampler for its class.
///
/// # Errors
/// [`Error::Folder`] names the file and the setting that cannot be honoured.
pub fn from_folder(dir: &Path) -> Result<Chosen> {
    read(dir, |_| Vec::new())
}

/// The same for a `StableDiffusionPipeline`, which corrects outdated scheduler files when it is made:
/// `steps_offset` is 1 and latents are not clamped, whatever the file says.
///
/// # Errors
/// As [`from_folder`].
pub fn for_stable_diffusion(dir: &Path) -> Result<Chosen> {
    read(dir, |config| {
        let mut notices = Vec::new();
        if config.steps_offset != 1 {
            notices
                .push(format!("the scheduler's steps_offset {} is read as 1", config.steps_offset));
            config.steps_offset = 1;
        }
        if config.clip.take().is_some() {
            notices.push("the scheduler's clip_sample is read as false".to_owned());
        }
        notices
    })
}

/// The same for a model that is a rectified flow.
///
/// # Errors
/// As [`from_folder`].
pub fn for_flow(dir: &Path) -> Result<Chosen> {
    read_text(dir, choose_flow)
}

/// Changes a configuration and says what it changed.
type Adjust = fn(&mut SchedulerConfig) -> Vec<String>;

fn read(dir: &Path, adjust: Adjust) -> Result<Chosen> {
    read_text(dir, |text| choose(text, adjust))
}

fn read_text(dir: &Path, choose: impl Fn(&str) -> Result<Chosen, String>) -> Result<Chosen> {
    let path = dir.join("scheduler_config.json");
    let refuse = |reason: String| Error::Folder { path: path.clone(), reason };
    let text = std::fs::read_to_string(&path)
        .map_err(|error| refuse(format!("{error}; a diffusers pipeline folder has this file")))?;
    choose(&text).map_err(refuse)
}

/// Chooses the sampler for the text of a `scheduler_config.json`.
pub(crate) fn choose(text: &str, adjust: Adjust) -> Result<Chosen, String> {
    let class = config::class_name(text)?;
    let row = TABLE.iter().find(|row| row.class == class).ok_or_else(|| {
        unsupported(&class, &TABLE.iter().map(|row| row.class).collect::<Vec<_>>().join(", "))
    })?;
    let mut config = SchedulerConfig::parse(text, row.defaults)?;
    let mut notices = adjust(&mut config);
    if class != "DDIMScheduler" {
        notices.push(format!(
            "the model's scheduler is {class}; its noise schedule was sampled with DDIM"
        ));
    }
    Ok(Chosen { sampler: Box::new(Ddim::new(config)?), notices })
}

fn choose_flow(text: &str) -> Result<Chosen, String> {
    let class = config::class_name(text)?;
    if class != FLOW_CLASS {
        return Err(unsupported(&class, FLOW_CLASS));
    }
    let sampler = Box::new(FlowEuler::new(FlowConfig::parse(text)?));
    Ok(Chosen { sampler, notices: Vec::new() })
}

fn unsupported(class: &str, known: &str) -> String {
    format!("scheduler class `{class}` is not supported for this pipeline; supported are {known}")
}

#[cfg(test)]
mod tests {
    use super::*;
    use fairlead_fuzz::{bounded_by, fuzz, spoiled_text};
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

    fn refusal(text: &str) -> String {
        choose(text, |_| Vec::new()).err().expect("it is refused")
    }

    #[test]
    fn a_pndm_folder_is_sampled_with_ddim_and_says_so() {
        // Stable Diffusion 1.5's file.
        let text = r#"{"_class_name": "PNDMScheduler", "_diffusers_version": "0.6.0",
            "beta_end": 0.012, "beta_schedule": "scaled_linear", "beta_start": 0.00085,
            "num_train_timesteps": 1000, "set_alpha_to_one": false, "skip_prk_steps": true,
            "steps_offset": 1, "trained_betas": null, "clip_sample": false}"#;
        let chosen = choose(text, |_| Vec::new()).expect("it is supported");
        assert_eq!(chosen.sampler.name(), "ddim");
        assert!(chosen.notices[0].contains("PNDMScheduler"), "{:?}", chosen.notices);
        let steps = chosen.sampler.schedule(20).expect("a schedule");
        assert_eq!((steps[0].timestep, steps[19].timestep), (951.0, 1.0));
    }

    #[test]
    fn outdated_files_are_read_as_the_pipeline_reads_them() {
        // An early file: neither key is there, so that DDIM itself would clamp and start at 0.
        let folder = tempfile::tempdir().expect("a folder");
        let text = r#"{"_class_name": "DDIMScheduler", "beta_schedule": "scaled_linear"}"#;
        std::fs::write(folder.path().join("scheduler_config.json"), text).expect("it is written");
        let last = |chosen: &Chosen| chosen.sampler.schedule(20).expect("a schedule")[19].timestep;
        let bare = from_folder(folder.path()).expect("it is supported");
        assert_eq!((last(&bare), bare.notices.len()), (0.0, 0));
        let pipeline = for_stable_diffusion(folder.path()).expect("it is supported");
        assert_eq!((last(&pipeline), pipeline.notices.len()), (1.0, 2));
        let step = pipeline.sampler.schedule(20).expect("a schedule")[0];
        let clean = pipeline.sampler.advance(&step, &[9.0], &[0.0]).clean;
        assert!(clean[0] > 9.0, "not clamped: {clean:?}");
    }

    #[test]
    fn what_cannot_be_honoured_is_refused_by_name() {
        let message = refusal(r#"{"_class_name": "FlowMatchEulerDiscreteScheduler"}"#);
        assert!(
            message.contains("FlowMatchEuler") && message.contains("DDIMScheduler"),
            "{message}"
        );
        let ddim =
            |extra: &str| refusal(&format!(r#"{{"_class_name": "DDIMScheduler", {extra}}}"#));
        assert!(ddim(r#""thresholding": true"#).contains("thresholding"));
        assert!(ddim(r#""rescale_betas_zero_snr": true"#).contains("v_prediction"));
        assert!(ddim(r#""prediction_type": "sample""#).contains("prediction_type"));
        assert!(ddim(r#""beta_schedule": "sigmoid""#).contains("sigmoid"));
        assert!(ddim(r#""timestep_spacing": "even""#).contains("even"));
        assert!(ddim(r#""num_train_timesteps": 0"#).contains("num_train_timesteps"));
        let long = ddim(r#""num_train_timesteps": 4000000000"#);
        assert!(long.contains("num_train_timesteps is 4000000000"), "{long}");
        let offset = ddim(r#""steps_offset": 4294967295"#);
        assert!(offset.contains("steps_offset is 4294967295"), "{offset}");
        assert!(ddim(r#""clip_sample_range": -1.0"#).contains("clip_sample_range is -1"));
        assert!(refusal("{").contains("JSON"));
        assert!(refusal("{}").contains("_class_name"));
    }

    /// Betas and alphas of the longest schedule, some of them at once.
    const MAX_SCHEDULE: usize = 32 * config::MAX_TRAIN_TIMESTEPS as usize;

    /// Steps through what a scheduler's file says, if it says something sound.
    fn step_through(length: usize, choose: impl FnOnce() -> Result<Chosen, String>) {
        let Ok(chosen) = bounded_by(MAX_SCHEDULE + 64 * length, choose) else { return };
        for steps in [1, 20] {
            let Ok(schedule) = chosen.sampler.schedule(steps) else { continue };
            assert_eq!(schedule.len(), steps as usize);
            for step in schedule {
                assert!((0.0..=1.0).contains(&step.time), "{step:?}");
                chosen.sampler.advance(&step, &[0.5], &[-0.5]);
            }
        }
    }

    #[test]
    fn spoiled_scheduler_files_are_sound_or_refused() {
        let file = |model: &str| {
            let assets = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../assets");
            let path = assets.join(model).join("scheduler/scheduler_config.json");
            std::fs::read_to_string(path).expect("it ships with the project")
        };
        let ddim = file("emojiland-sd").replace("\"clip_sample\": false", "\"clip_sample\": true");
        fuzz(spoiled_text(&ddim), |text| {
            step_through(text.len(), || choose(&text, |_| Vec::new()));
        });
        fuzz(spoiled_text(&file("emojiland-sd3")), |text| {
            step_through(text.len(), || choose_flow(&text));
        });
    }
}
