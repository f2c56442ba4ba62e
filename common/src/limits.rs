//! Limits of a request, and the checks that hold a request to them.
//!
//! The coordinator admits a request by these checks and a worker reads its shards by them, so what one
//! takes the other takes.

use std::fmt;

use fairlead_proto::v1::{JobSpec, ModelInfo};

/// Most bytes of a prompt, and of a negative prompt.
pub const MAX_PROMPT_BYTES: usize = 8 << 10;

/// Most images of a job.
pub const MAX_IMAGES: u32 = 64;

/// Most sampling steps.
pub const MAX_STEPS: u32 = 1_000;

/// Least and greatest classifier-free guidance scale; 1 switches it off.
pub const GUIDANCE: std::ops::RangeInclusive<f32> = 1.0..=30.0;

/// Most crops of an image.
pub const MAX_CROPS: u32 = 8;

/// Most reruns of an image.
pub const MAX_RERUNS: u32 = 2;

/// A field whose value is not allowed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FieldError {
    /// The field, as the contract names it.
    pub field: &'static str,
    /// Its value, and what is allowed.
    pub problem: String,
}

impl FieldError {
    /// `problem` says the value and what is allowed.
    pub fn new(field: &'static str, problem: impl Into<String>) -> Self {
        Self { field, problem: problem.into() }
    }
}

impl fmt::Display for FieldError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.field, self.problem)
    }
}

impl std::error::Error for FieldError {}

/// What decides how long an image takes, and what its calibration must be for.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Shape {
    /// Width in pixels.
    pub width: u32,
    /// Height in pixels.
    pub height: u32,
    /// Sampling steps.
    pub steps: u32,
    /// Classifier-free guidance scale.
    pub guidance: f32,
}

impl Shape {
    /// The shape of `spec`; unset fields take the model's defaults.
    ///
    /// # Errors
    /// [`FieldError`] for a value that `model` does not make.
    pub fn of(spec: &JobSpec, model: &ModelInfo) -> Result<Self, FieldError> {
        Ok(Self {
            width: side("width", spec.width.unwrap_or(model.default_width), model)?,
            height: side("height", spec.height.unwrap_or(model.default_height), model)?,
            steps: steps(spec.steps.unwrap_or(model.default_steps), model)?,
            guidance: guidance(spec.guidance_scale.unwrap_or(model.default_guidance_scale))?,
        })
    }
}

/// Checks the prompts of `spec`.
///
/// # Errors
/// [`FieldError`] for an empty prompt and for one that is too long.
pub fn check_prompts(spec: &JobSpec) -> Result<(), FieldError> {
    if spec.prompt.trim().is_empty() {
        return Err(FieldError::new("prompt", "is empty; say what to draw"));
    }
    for (field, text) in [("prompt", &spec.prompt), ("negative_prompt", &spec.negative_prompt)] {
        if text.len() > MAX_PROMPT_BYTES {
            let problem = format!("has {} bytes; at most {MAX_PROMPT_BYTES}", text.len());
            return Err(FieldError::new(field, problem));
        }
    }
    Ok(())
}

/// Checks the number of images of a job.
///
/// # Errors
/// [`FieldError`] outside 1 to [`MAX_IMAGES`].
pub fn check_count(n: u32) -> Result<(), FieldError> {
    if (1..=MAX_IMAGES).contains(&n) {
        return Ok(());
    }
    Err(FieldError::new("n", format!("is {n}; ask for 1 to {MAX_IMAGES} images")))
}

fn side(field: &'static str, side: u32, model: &ModelInfo) -> Result<u32, FieldError> {
    let unit = model.granularity.max(1);
    let largest = model.max_side / unit * unit;
    if side >= unit && side <= largest && side.is_multiple_of(unit) {
        return Ok(side);
    }
    let below = (side / unit * unit).clamp(unit, largest.max(unit));
    let above = side.div_ceil(unit).saturating_mul(unit).clamp(unit, largest.max(unit));
    let nearest = if below == above { below.to_string() } else { format!("{below} and {above}") };
    let name = &model.name;
    let problem = if side > largest {
        format!("is {side}, but `{name}` makes at most {largest}; nearest valid: {nearest}")
    } else {
        format!("is {side}, but `{name}` needs a multiple of {unit}; nearest valid: {nearest}")
    };
    Err(FieldError::new(field, problem))
}

/// The bounds of a scheduler are 0 where it sets none.
fn steps(steps: u32, model: &ModelInfo) -> Result<u32, FieldError> {
    let bounds = [model.max_steps, model.train_timesteps].into_iter().filter(|&bound| bound > 0);
    let most = bounds.fold(MAX_STEPS, u32::min);
    if (1..=most).contains(&steps) {
        return Ok(steps);
    }
    let problem = format!("is {steps}; ask `{}` for 1 to {most}", model.name);
    Err(FieldError::new("steps", problem))
}

/// 0 is off as in diffusers, where that is everything up to 1; it stands for 1, which computes the same.
fn guidance(scale: f32) -> Result<f32, FieldError> {
    let (least, greatest) = (*GUIDANCE.start(), *GUIDANCE.end());
    if scale == 0.0 {
        return Ok(least);
    }
    if GUIDANCE.contains(&scale) {
        return Ok(scale);
    }
    let problem = format!("is {scale}; it must be 0 or {least} (off), or up to {greatest}");
    Err(FieldError::new("guidance_scale", problem))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn model() -> ModelInfo {
        ModelInfo {
            name: "toy".into(),
            granularity: 8,
            max_side: 70,
            default_width: 32,
            default_height: 32,
            default_steps: 20,
            default_guidance_scale: 5.0,
            train_timesteps: 100,
            max_steps: 0,
            ..Default::default()
        }
    }

    #[test]
    fn guidance_of_0_is_off() {
        let shape = |scale| {
            Shape::of(&JobSpec { guidance_scale: Some(scale), ..Default::default() }, &model())
        };
        assert_eq!(shape(0.0), shape(1.0));
        assert_eq!(shape(0.0).expect("off").guidance, 1.0);
        let problem = shape(0.5).expect_err("between").to_string();
        assert_eq!(problem, "guidance_scale: is 0.5; it must be 0 or 1 (off), or up to 30");
    }

    #[test]
    fn every_bound_of_the_scheduler_counts() {
        let asks = |steps, model: &ModelInfo| {
            Shape::of(&JobSpec { steps: Some(steps), ..Default::default() }, model)
        };
        assert!(asks(100, &model()).is_ok());
        let problem = asks(101, &model()).expect_err("too many").to_string();
        assert_eq!(problem, "steps: is 101; ask `toy` for 1 to 100");
        assert!(asks(51, &ModelInfo { max_steps: 50, ..model() }).is_err());
        let unbounded = ModelInfo { train_timesteps: 0, ..model() };
        assert!(asks(1000, &unbounded).is_ok() && asks(1001, &unbounded).is_err());
    }

    proptest! {
        /// What was filled in is taken again, as it is.
        #[test]
        fn a_shape_is_a_fixed_point(
            width: Option<u32>, height in prop::option::of(0u32..100), steps in prop::option::of(0u32..1200),
            guidance_scale: Option<f32>,
        ) {
            let spec = JobSpec { width, height, steps, guidance_scale, ..Default::default() };
            if let Ok(shape) = Shape::of(&spec, &model()) {
                let Shape { width, height, steps, guidance } = shape;
                prop_assert!((8..=64).contains(&width) && width.is_multiple_of(8));
                prop_assert!((1..=100).contains(&steps) && GUIDANCE.contains(&guidance));
                let filled = JobSpec {
                    width: Some(width), height: Some(height), steps: Some(steps),
                    guidance_scale: Some(guidance), ..spec
                };
                prop_assert_eq!(Shape::of(&filled, &model()), Ok(shape));
            }
        }
    }
}
