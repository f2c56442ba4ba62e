//! The safety record of one image.

use fairlead_common::clock::unix_ms;
use fairlead_proto::v1::{ImageStatus, SafetyRecord};

use super::{Run, Track};
use crate::energy::Verdict;

/// How an image ended.
pub(super) struct Ending {
    pub(super) status: ImageStatus,
    pub(super) verdict: Verdict,
    pub(super) reruns: u32,
    pub(super) image_sha256: String,
    pub(super) pixels_sha256: String,
}

impl Run<'_> {
    /// Everything needed to account for the image. The final scores are those of this worker's
    /// check; the coordinator replaces them with its own.
    pub(super) fn record(&self, track: Track, ending: Ending) -> SafetyRecord {
        let info = self.engine.info();
        let sources = self.energy.sources();
        SafetyRecord {
            record_id: track.task.record_id,
            job_id: self.shard.job_id.clone(),
            index: track.task.index,
            status: ending.status.into(),
            policy: Some(self.shard.policy.clone()),
            model: info.name.clone(),
            model_hash: info.hash.clone(),
            sampler: self.generator().sampler().name().to_owned(),
            steps: self.shard.steps,
            guidance_scale: self.shard.guidance,
            width: self.shard.size.0,
            height: self.shard.size.1,
            seed: track.task.seed,
            prompt: self.shard.spec.prompt.clone(),
            negative_prompt: self.shard.spec.negative_prompt.clone(),
            trajectory: track.trajectory,
            final_scores: ending.verdict.scores,
            reruns: ending.reruns,
            image_sha256: ending.image_sha256,
            pixels_sha256: ending.pixels_sha256,
            energy_nodes: sources.nodes.iter().cloned().collect(),
            calibrations: sources.calibrations.iter().cloned().collect(),
            steered: track.steered,
            worker_id: self.engine.worker_id.clone(),
            finished_unix_ms: unix_ms(),
            engine_ms: u32::try_from(track.spent_time.as_millis()).unwrap_or(u32::MAX),
            signature: None,
        }
    }
}
