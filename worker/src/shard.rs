//! A shard as the engine takes it: every default filled in, every range checked.

use std::collections::BTreeMap;

use fairlead_common::{
    envelope,
    limits::{self, Shape},
    steering,
};
use fairlead_proto::v1::{
    ConceptRef, ImageTask, JobSpec, ModelInfo, PinnedPolicy, RunConditions, ShardAssignment,
};

use crate::{Error, error::Result, steering::Knobs};

/// Images of one job to be made together.
#[derive(Debug, Clone)]
pub struct Shard {
    /// The job's id, for the records.
    pub job_id: String,
    /// The job's specification.
    pub spec: JobSpec,
    /// Width and height in pixels.
    pub size: (u32, u32),
    /// Sampling steps.
    pub steps: u32,
    /// Classifier-free guidance scale; 1 switches it off.
    pub guidance: f32,
    /// The policy pinned at admission.
    pub policy: PinnedPolicy,
    /// Its steering knobs.
    pub knobs: Knobs,
    /// The images to make.
    pub images: Vec<ImageTask>,
}

impl Shard {
    /// Checks `spec` and `policy` against the model; unset fields take its defaults.
    ///
    /// # Errors
    /// [`Error::Request`] names the field, its value and what is allowed.
    pub fn new(
        job_id: impl Into<String>,
        spec: JobSpec,
        policy: PinnedPolicy,
        images: Vec<ImageTask>,
        model: &ModelInfo,
    ) -> Result<Self> {
        limits::check_prompts(&spec)?;
        let Shape { width, height, steps, guidance } = Shape::of(&spec, model)?;
        if images.is_empty() {
            let problem = format!("no image is asked for; allowed is 1 to {}", limits::MAX_IMAGES);
            return Err(Error::request("n", problem));
        }
        policy.weights.iter().try_for_each(steering::check_weight)?;
        let knobs = Knobs::from_params(&policy.steering.unwrap_or_default())?;
        let size = (width, height);
        Ok(Self { job_id: job_id.into(), spec, size, steps, guidance, policy, knobs, images })
    }

    /// Reads a coordinator's assignment for `model`.
    ///
    /// # Errors
    /// [`Error::Request`] if a message is incomplete or out of range.
    pub fn from_assignment(assignment: &ShardAssignment, model: &ModelInfo) -> Result<Self> {
        let missing = |field| Error::request(field, "the coordinator's assignment lacks it");
        Self::new(
            assignment.job_id.clone(),
            assignment.spec.clone().ok_or_else(|| missing("spec"))?,
            assignment.policy.clone().ok_or_else(|| missing("policy"))?,
            assignment.images.clone(),
            model,
        )
    }

    /// The concepts to be asked for, once for each energy that watches for them.
    pub fn concepts(&self) -> &[ConceptRef] {
        &self.policy.concepts
    }

    /// What of it decides whether a calibration is for it.
    pub(crate) fn conditions(&self) -> RunConditions {
        let (width, height) = self.size;
        let filled = JobSpec {
            width: Some(width),
            height: Some(height),
            guidance_scale: Some(self.guidance),
            ..self.spec.clone()
        };
        envelope::conditions(&filled, !self.policy.outside_envelope.is_empty())
    }

    /// Factors of the energies' gradients, of those that have one.
    pub(crate) fn weights(&self) -> BTreeMap<String, f32> {
        self.policy.weights.iter().map(|w| (w.energy.clone(), w.weight)).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use fairlead_common::limits::GUIDANCE;
    use fairlead_fuzz::{bounded, fuzz, spoiled};
    use fairlead_proto::v1::{EnergyWeight, SteeringParams};
    use proptest::prelude::*;
    use prost::Message;

    fn model() -> ModelInfo {
        ModelInfo {
            name: "toy".into(),
            granularity: 8,
            max_side: 64,
            default_width: 32,
            default_height: 32,
            default_steps: 20,
            default_guidance_scale: 5.0,
            train_timesteps: 1000,
            max_steps: 0,
            ..Default::default()
        }
    }

    fn make(spec: JobSpec) -> Result<Shard> {
        Shard::new("job", spec, PinnedPolicy::default(), vec![ImageTask::default()], &model())
    }

    #[test]
    fn defaults_are_the_models() {
        let shard = make(JobSpec { prompt: "a cat".into(), ..Default::default() }).expect("valid");
        assert_eq!((shard.size, shard.steps, shard.guidance), ((32, 32), 20, 5.0));
    }

    #[test]
    fn a_field_out_of_range_is_named() {
        let spec = || JobSpec { prompt: "a cat".into(), ..Default::default() };
        let bad = [
            (JobSpec { width: Some(63), ..spec() }, "width"),
            (JobSpec { height: Some(72), ..spec() }, "height"),
            (JobSpec { height: Some(0), ..spec() }, "height"),
            (JobSpec { steps: Some(0), ..spec() }, "steps"),
            (JobSpec { steps: Some(1001), ..spec() }, "steps"),
            (JobSpec { guidance_scale: Some(0.5), ..spec() }, "guidance_scale"),
            (JobSpec { guidance_scale: Some(f32::NAN), ..spec() }, "guidance_scale"),
            (JobSpec { prompt: "  ".into(), ..spec() }, "prompt"),
        ];
        for (spec, name) in bad {
            match make(spec) {
                Err(Error::Request { field, .. }) => assert_eq!(field, name),
                other => panic!("{name}: {other:?}"),
            }
        }
        let none = Shard::new("job", spec(), PinnedPolicy::default(), vec![], &model());
        assert!(matches!(none, Err(Error::Request { field: "n", .. })));
    }

    proptest! {
        /// The checks that admission makes, all of them, are all that a shard needs.
        #[test]
        fn what_admission_takes_a_shard_takes(
            prompt in "[ a]{0,3}", width in prop::option::of(0u32..80), steps in prop::option::of(0u32..1100),
            guidance_scale in prop::option::of(0f32..40.0), weight in -1f32..2.0,
            (eta, start, end) in (prop::option::of(0f32..2.5), prop::option::of(0f32..=1.0), 0u8..3),
            (crops, cap) in (prop::option::of(0u32..10), prop::option::of(0f32..120.0)),
        ) {
            let spec = JobSpec { prompt, width, steps, guidance_scale, ..Default::default() };
            // One in three windows is of one time.
            let window_end = if end == 0 { start } else { Some(0.1 * f32::from(end)) };
            let params = SteeringParams { eta, window_start: start, window_end, crops, cap, ..Default::default() };
            let weight = EnergyWeight { energy: "e".into(), weight };
            let admitted = limits::check_prompts(&spec).is_ok()
                && Shape::of(&spec, &model()).is_ok()
                && steering::check_weight(&weight).is_ok();
            let pinned = steering::resolve(&params);
            let is_admitted = admitted && pinned.is_ok();
            let policy = PinnedPolicy {
                steering: Some(pinned.unwrap_or(params)), weights: vec![weight], ..Default::default()
            };
            let shard = Shard::new("job", spec, policy, vec![ImageTask::default()], &model());
            prop_assert_eq!(shard.is_ok(), is_admitted, "{:?}", shard.err());
        }
    }

    #[test]
    fn spoiled_assignments_stay_in_range_or_are_refused_by_field() {
        let valid = ShardAssignment {
            job_id: "job".into(),
            spec: Some(JobSpec {
                prompt: "a cat".into(),
                width: Some(64),
                height: Some(32),
                steps: Some(25),
                guidance_scale: Some(5.0),
                ..Default::default()
            }),
            policy: Some(PinnedPolicy {
                steering: Some(SteeringParams { eta: Some(0.5), ..Default::default() }),
                ..Default::default()
            }),
            images: vec![ImageTask { seed: 7, ..Default::default() }],
            ..Default::default()
        };
        fuzz(spoiled(valid.encode_to_vec()), |bytes| {
            let Ok(assignment) = ShardAssignment::decode(&*bytes) else { return };
            match bounded(bytes.len(), || Shard::from_assignment(&assignment, &model())) {
                Ok(Shard { size: (width, height), steps, guidance, .. }) => {
                    assert!((8..=64).contains(&width) && (8..=64).contains(&height));
                    assert!((1..=1000).contains(&steps) && GUIDANCE.contains(&guidance));
                }
                Err(error) => assert!(matches!(error, Error::Request { .. }), "{error}"),
            }
        });
    }
}
