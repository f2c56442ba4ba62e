//! Which sampler a folder's scheduler gets, and what its users are told of the choice.

use std::path::Path;

use fairlead_models::{ConfigFile, ModelFolder, PipelineFolder};

use super::{
    Ddim, FlowConfig, FlowEuler, Sampler, SchedulerConfig,
    config::{BetaSchedule, Defaults, Spacing},
};
use crate::{Error, error::Result};

const FILE: &str = "scheduler_config.json";

/// A sampler and what the caller should know about the choice.
pub struct Chosen {
    /// The sampler.
    pub sampler: Box<dyn Sampler>,
    /// Where the folder's file was not taken as it stands.
    pub notices: Vec<String>,
}

/// A scheduler class of diffusers for which DDIM can stand in: it samples the same noise schedule.
struct Row {
    class: &'static str,
    /// Values that an absent key takes in this class.
    defaults: Defaults,
    /// What else to know when DDIM stands in for it.
    remark: &'static str,
}

const fn row(class: &'static str, defaults: Defaults) -> Row {
    Row { class, defaults, remark: "" }
}

/// For models that were distilled to few steps.
const DISTILLED: &str = "; such a model wants few steps and little guidance, such as 8 and 1";

/// diffusers' `KarrasDiffusionSchedulers`, which any Stable Diffusion pipeline may have, and the
/// others of the same noise schedule, with diffusers' own defaults of each. The one that is not
/// here, `EDMEulerScheduler`, has a parametrisation of its own. A new sampler is one file and a
/// column here.
const TABLE: &[Row] = {
    const DDIM: Defaults = Defaults::DDIM;
    const PNDM: Defaults = Defaults { clip_sample: false, set_alpha_to_one: false, ..DDIM };
    /// Samplers in sigmas.
    const SIGMAS: Defaults = Defaults { spacing: Spacing::Linspace, ..PNDM };
    /// Those with Stable Diffusion's betas.
    const SD_SIGMAS: Defaults = Defaults { beta_start: 0.00085, beta_end: 0.012, ..SIGMAS };
    const DISTILLED_SD: Defaults = Defaults {
        beta_start: 0.00085,
        beta_end: 0.012,
        beta_schedule: BetaSchedule::ScaledLinear,
        clip_sample: false,
        ..DDIM
    };
    &[
        row("DDIMScheduler", DDIM),
        row("DDIMParallelScheduler", DDIM),
        row("DDPMScheduler", DDIM),
        row("DDPMParallelScheduler", DDIM),
        row("PNDMScheduler", PNDM),
        row("LMSDiscreteScheduler", SIGMAS),
        row("EulerDiscreteScheduler", SIGMAS),
        row("EulerAncestralDiscreteScheduler", SIGMAS),
        row("HeunDiscreteScheduler", SD_SIGMAS),
        row("KDPM2DiscreteScheduler", SD_SIGMAS),
        row("KDPM2AncestralDiscreteScheduler", SD_SIGMAS),
        row("DPMSolverMultistepScheduler", SIGMAS),
        row("DPMSolverSinglestepScheduler", SIGMAS),
        row("DPMSolverSDEScheduler", SD_SIGMAS),
        row("DEISMultistepScheduler", SIGMAS),
        row("UniPCMultistepScheduler", SIGMAS),
        row("SASolverScheduler", SIGMAS),
        Row { class: "LCMScheduler", defaults: DISTILLED_SD, remark: DISTILLED },
        Row { class: "TCDScheduler", defaults: DISTILLED_SD, remark: DISTILLED },
    ]
};

/// How a scheduler class of diffusers says that it samples a rectified flow.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Flow {
    /// By its class.
    Class,
    /// By `use_flow_sigmas` and `prediction_type`.
    Settings,
}

/// Scheduler classes that sample rectified flows and for which Euler's method can stand in.
const FLOWS: [(&str, Flow); 8] = [
    ("FlowMatchEulerDiscreteScheduler", Flow::Class),
    ("FlowMatchHeunDiscreteScheduler", Flow::Class),
    ("FlowMatchLCMScheduler", Flow::Class),
    ("DPMSolverMultistepScheduler", Flow::Settings),
    ("DPMSolverSinglestepScheduler", Flow::Settings),
    ("DEISMultistepScheduler", Flow::Settings),
    ("UniPCMultistepScheduler", Flow::Settings),
    ("SASolverScheduler", Flow::Settings),
];

/// Reads `scheduler_config.json` of a diffusion model in `dir` and chooses the sampler for its
/// class.
///
/// # Errors
/// [`Error::Model`] or [`Error::Folder`] name the file and the setting that cannot be honoured.
pub fn from_folder(dir: &Path) -> Result<Chosen> {
    choose(&ModelFolder::new(dir).config(FILE)?, None, |_| Vec::new())
}

/// The same for a `StableDiffusionPipeline`, which corrects outdated scheduler files when it is
/// made: `steps_offset` is 1 and latents are not clamped, whatever the file says.
///
/// # Errors
/// As [`from_folder`], and if the pipeline has no scheduler.
pub fn for_stable_diffusion(pipeline: &PipelineFolder) -> Result<Chosen> {
    let fields = pipeline.component(SCHEDULER)?.config(FILE)?;
    choose(&fields, pipeline.component_class(SCHEDULER), |config| {
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

/// Reads `scheduler_config.json` of a rectified flow in `dir`.
///
/// # Errors
/// As [`from_folder`].
pub fn flow_from_folder(dir: &Path) -> Result<Chosen> {
    choose_flow(&ModelFolder::new(dir).config(FILE)?, None)
}

/// The same for a pipeline that is a rectified flow.
///
/// # Errors
/// As [`for_stable_diffusion`].
pub fn for_flow(pipeline: &PipelineFolder) -> Result<Chosen> {
    let fields = pipeline.component(SCHEDULER)?.config(FILE)?;
    choose_flow(&fields, pipeline.component_class(SCHEDULER))
}

/// The component of a pipeline.
const SCHEDULER: &str = "scheduler";

/// Changes a configuration and says what it changed.
type Adjust = fn(&mut SchedulerConfig) -> Vec<String>;

/// Chooses the sampler of a diffusion model by its scheduler's file and the class that its pipeline
/// lists.
fn choose(fields: &ConfigFile, listed: Option<&str>, adjust: Adjust) -> Result<Chosen> {
    let (class, mut notices) = class(fields, listed)?;
    let Some(row) = TABLE.iter().find(|row| row.class == class) else {
        let known = TABLE.iter().map(|row| row.class).collect::<Vec<_>>().join(", ");
        return Err(unsupported(fields, &class, &known));
    };
    let mut config = SchedulerConfig::parse(fields, row.defaults)?;
    notices.extend(adjust(&mut config));
    if class != "DDIMScheduler" {
        notices.push(format!(
            "the model's scheduler is {class}; its noise schedule was sampled with DDIM instead{}",
            row.remark
        ));
    }
    Ok(Chosen { sampler: Box::new(Ddim::new(config, fields)?), notices })
}

/// Chooses the sampler of a rectified flow.
fn choose_flow(fields: &ConfigFile, listed: Option<&str>) -> Result<Chosen> {
    let (class, mut notices) = class(fields, listed)?;
    let Some((_, flow)) = FLOWS.iter().find(|(known, _)| *known == class) else {
        let known = FLOWS.map(|(known, _)| known).join(", ");
        return Err(unsupported(fields, &class, &known));
    };
    let config = match flow {
        Flow::Class => FlowConfig::parse(fields, "shift")?,
        Flow::Settings => {
            if !fields.flag("use_flow_sigmas", false)? {
                let wanted = "true for a rectified flow, with prediction_type flow_prediction";
                return Err(fields.unsupported("use_flow_sigmas", wanted).into());
            }
            if fields.get("prediction_type").and_then(|kind| kind.as_str()) != Some(FLOW_PREDICTION)
            {
                return Err(fields.unsupported("prediction_type", FLOW_PREDICTION).into());
            }
            FlowConfig::parse(fields, "flow_shift")?
        }
    };
    if class != FLOWS[0].0 {
        notices.push(format!(
            "the model's scheduler is {class}; its flow was sampled with Euler's method instead"
        ));
    }
    Ok(Chosen { sampler: Box::new(FlowEuler::new(config)), notices })
}

/// `prediction_type` of a solver of diffusion that samples a flow.
const FLOW_PREDICTION: &str = "flow_prediction";

/// The scheduler's class: that which the pipeline lists, as diffusers makes it, or else the file's.
fn class(fields: &ConfigFile, listed: Option<&str>) -> Result<(String, Vec<String>)> {
    let own = fields.get("_class_name").map(|class| class.as_str().map(str::to_owned));
    match (own, listed) {
        (Some(Some(own)), Some(listed)) if own != listed => {
            let notice = format!(
                "model_index.json lists the scheduler {listed}, its own file {own}; {listed} is taken, \
                 as in diffusers"
            );
            Ok((listed.to_owned(), vec![notice]))
        }
        (Some(Some(own)), _) => Ok((own, Vec::new())),
        (None, Some(listed)) => Ok((listed.to_owned(), Vec::new())),
        (None, None) | (Some(None), _) => {
            Err(fields.unsupported("_class_name", "the scheduler's diffusers class").into())
        }
    }
}

fn unsupported(fields: &ConfigFile, class: &str, known: &str) -> Error {
    let reason = format!(
        "scheduler class `{class}` is not supported for this pipeline; supported are {known}"
    );
    Error::Folder { path: fields.path().to_owned(), reason }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use fairlead_fuzz::{bounded_by, fuzz, spoiled_text};

    use crate::sampler::config::MAX_TRAIN_TIMESTEPS;

    fn fields(text: &str) -> Result<ConfigFile> {
        Ok(ConfigFile::parse(Path::new(FILE), text)?)
    }

    /// The sampler of the text of a scheduler's file.
    pub(crate) fn choose(text: &str) -> Result<Chosen> {
        super::choose(&fields(text)?, None, |_| Vec::new())
    }

    fn choose_flow(text: &str) -> Result<Chosen> {
        super::choose_flow(&fields(text)?, None)
    }

    fn refusal(text: &str) -> String {
        choose(text).err().expect("it is refused").to_string()
    }

    #[test]
    fn a_pndm_folder_is_sampled_with_ddim_and_says_so() {
        // Stable Diffusion 1.5's file.
        let text = r#"{"_class_name": "PNDMScheduler", "_diffusers_version": "0.6.0",
            "beta_end": 0.012, "beta_schedule": "scaled_linear", "beta_start": 0.00085,
            "num_train_timesteps": 1000, "set_alpha_to_one": false, "skip_prk_steps": true,
            "steps_offset": 1, "trained_betas": null, "clip_sample": false}"#;
        let chosen = choose(text).expect("it is supported");
        assert_eq!(chosen.sampler.name(), "ddim");
        assert!(chosen.notices[0].contains("PNDMScheduler"), "{:?}", chosen.notices);
        let steps = chosen.sampler.schedule(20).expect("a schedule");
        assert_eq!((steps[0].timestep, steps[19].timestep), (951.0, 1.0));
    }

    /// diffusers' list and the others of its noise schedule; each file as diffusers writes it,
    /// solver's settings and all. `lambda_min_clipped` is in Python's JSON.
    #[test]
    fn ddim_stands_in_for_every_class_of_its_noise_schedule_and_says_so() {
        let base = r#""beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear",
            "num_train_timesteps": 1000, "prediction_type": "epsilon", "trained_betas": null"#;
        let solver = r#""algorithm_type": "dpmsolver++", "solver_type": "midpoint", "solver_order": 2,
            "use_karras_sigmas": true, "lower_order_final": true, "lambda_min_clipped": -Infinity,
            "final_sigmas_type": "zero", "flow_shift": 1.0, "use_flow_sigmas": false,
            "sample_max_value": 1.0, "dynamic_thresholding_ratio": 0.995"#;
        for (class, more) in [
            ("DDIMScheduler", r#""clip_sample_range": 1.0"#),
            ("DDIMParallelScheduler", r#""clip_sample": false"#),
            ("DDPMScheduler", r#""variance_type": "fixed_small""#),
            ("DDPMParallelScheduler", r#""variance_type": "fixed_large""#),
            ("PNDMScheduler", r#""skip_prk_steps": true"#),
            ("LMSDiscreteScheduler", r#""use_karras_sigmas": true"#),
            (
                "EulerDiscreteScheduler",
                r#""interpolation_type": "linear", "timestep_type": "discrete""#,
            ),
            ("EulerAncestralDiscreteScheduler", r#""steps_offset": 1"#),
            ("HeunDiscreteScheduler", r#""use_exponential_sigmas": true"#),
            ("KDPM2DiscreteScheduler", r#""use_beta_sigmas": true"#),
            ("KDPM2AncestralDiscreteScheduler", r#""timestep_spacing": "trailing""#),
            ("DPMSolverMultistepScheduler", solver),
            ("DPMSolverSinglestepScheduler", solver),
            ("DPMSolverSDEScheduler", r#""noise_sampler_seed": 3"#),
            ("DEISMultistepScheduler", r#""algorithm_type": "deis", "solver_type": "logrho""#),
            ("UniPCMultistepScheduler", r#""predict_x0": true, "disable_corrector": [0]"#),
            ("SASolverScheduler", r#""predictor_order": 2, "corrector_order": 2"#),
            ("LCMScheduler", r#""original_inference_steps": 50, "timestep_scaling": 10.0"#),
            ("TCDScheduler", r#""original_inference_steps": 50"#),
        ] {
            let text = format!(r#"{{"_class_name": "{class}", {base}, {more}}}"#);
            let chosen = choose(&text).unwrap_or_else(|error| panic!("{class}: {error}"));
            assert_eq!(chosen.sampler.name(), "ddim");
            let said = chosen.notices.iter().any(|notice| notice.contains(class));
            assert_eq!(said, class != "DDIMScheduler", "{class}: {:?}", chosen.notices);
        }
        assert_eq!(TABLE.len(), 19, "each has a case here");
    }

    #[test]
    fn euler_stands_in_for_every_sampler_of_flows_and_says_so() {
        let solver = r#""use_flow_sigmas": true, "flow_shift": 3.0, "shift": 9.0, "beta_start": 0.1,
            "prediction_type": "flow_prediction", "solver_order": 2"#;
        let first = |text: &str| {
            let chosen = choose_flow(text).unwrap_or_else(|error| panic!("{text}: {error}"));
            (chosen.sampler.schedule(4).expect("a schedule")[1], chosen.notices)
        };
        let (expected, notices) =
            first(r#"{"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0}"#);
        assert!(notices.is_empty());
        for (class, flow) in FLOWS {
            let settings = if flow == Flow::Class { r#""shift": 3.0"# } else { solver };
            let (step, notices) = first(&format!(r#"{{"_class_name": "{class}", {settings}}}"#));
            assert_eq!(step, expected, "{class}");
            assert_eq!(notices.is_empty(), class == FLOWS[0].0, "{class}: {notices:?}");
        }
        for (text, part) in [
            (r#"{"_class_name": "UniPCMultistepScheduler"}"#, "use_flow_sigmas is absent"),
            (
                r#"{"_class_name": "UniPCMultistepScheduler", "use_flow_sigmas": true}"#,
                "prediction_type is absent",
            ),
            (r#"{"_class_name": "FlowMatchLCMScheduler", "scale_factors": [1]}"#, "scale_factors"),
            (r#"{"_class_name": "FlowMapEulerDiscreteScheduler"}"#, "FlowMatchHeunDiscrete"),
        ] {
            let message = choose_flow(text).err().expect("it is refused").to_string();
            assert!(message.contains(part), "{message}");
        }
    }

    #[test]
    fn the_class_that_the_pipeline_lists_is_taken_as_diffusers_does() {
        let fields = fields(r#"{"_class_name": "PNDMScheduler"}"#).expect("it is JSON");
        let chosen = super::choose(&fields, Some("LMSDiscreteScheduler"), |_| Vec::new());
        let notices = chosen.expect("it is supported").notices;
        assert!(notices[0].contains("PNDMScheduler; LMSDiscreteScheduler is taken"), "{notices:?}");
    }

    #[test]
    fn outdated_files_are_read_as_the_pipeline_reads_them() {
        // An early file: neither key is there, so that DDIM itself would clamp and start at 0.
        let folder = tempfile::tempdir().expect("a folder");
        let text = r#"{"_class_name": "DDIMScheduler", "beta_schedule": "scaled_linear"}"#;
        std::fs::write(folder.path().join(FILE), text).expect("it is written");
        let last = |chosen: &Chosen| chosen.sampler.schedule(20).expect("a schedule")[19].timestep;
        let bare = from_folder(folder.path()).expect("it is supported");
        assert_eq!((last(&bare), bare.notices.len()), (0.0, 0));
        let index = r#"{"_class_name": "StableDiffusionPipeline",
            "scheduler": ["diffusers", "DDIMScheduler"]}"#;
        let pipeline = tempfile::tempdir().expect("a folder");
        std::fs::write(pipeline.path().join("model_index.json"), index).expect("it is written");
        std::fs::create_dir(pipeline.path().join("scheduler")).expect("a folder");
        std::fs::write(pipeline.path().join("scheduler").join(FILE), text).expect("it is written");
        let opened = PipelineFolder::open(pipeline.path()).expect("it is a pipeline");
        let pipeline = for_stable_diffusion(&opened).expect("it is supported");
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
        assert!(ddim(r#""prediction_type": "flow_prediction""#).contains("rectified flow"));
        assert!(ddim(r#""use_flow_sigmas": true"#).contains("use_flow_sigmas is true"));
        assert!(ddim(r#""variance_type": "learned_range""#).contains("variance_type"));
        assert!(ddim(r#""timestep_type": "continuous""#).contains("timestep_type"));
        assert!(ddim(r#""trained_betas": [0.1, "b"]"#).contains("trained_betas"));
        assert!(ddim(r#""beta_start": "0.1""#).contains("beta_start is \"0.1\""));
        assert!(ddim(r#""beta_start": Infinity"#).contains("beta_start is \"Infinity\""));
        assert!(ddim(r#""some_new_sigmas": 3"#).contains("unknown field some_new_sigmas (3)"));
        assert!(refusal(r#"{"_class_name": "EDMEulerScheduler"}"#).contains("EDMEulerScheduler"));
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
    const MAX_SCHEDULE: usize = 32 * MAX_TRAIN_TIMESTEPS;

    /// Steps through what a scheduler's file says, if it says something sound.
    fn step_through(length: usize, choose: impl FnOnce() -> Result<Chosen>) {
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
            step_through(text.len(), || choose(&text));
        });
        fuzz(spoiled_text(&file("emojiland-sd3")), |text| {
            step_through(text.len(), || choose_flow(&text));
        });
    }
}
