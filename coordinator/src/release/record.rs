//! The safety record of one image: what the coordinator knows or has checked, and beside it, under a
//! name that says so, what the worker reported.

use fairlead_proto::v1::{self, ImageStatus};

use super::check::Readings;
use crate::state::JobRecord;

/// What was decided about one image.
pub(super) enum Decision {
    /// The coordinator had its pixels checked.
    Checked {
        /// What the nodes read.
        readings: Readings,
        /// SHA-256 of the file and of its pixels.
        image_sha256: String,
        pixels_sha256: String,
    },
    /// The worker sent no pixels.
    WithheldByWorker,
}

/// The record, not signed yet.
pub(super) fn assemble(
    job: &JobRecord,
    image: &v1::ImageInfo,
    worker_id: String,
    report: v1::WorkerReport,
    decision: Decision,
    now_unix_ms: i64,
) -> v1::SafetyRecord {
    let spec = job.spec();
    let mut record = v1::SafetyRecord {
        record_id: image.record_id.clone(),
        job_id: job.job.job_id.clone(),
        index: image.index,
        policy: Some(job.policy()),
        model: job.model.name.clone(),
        model_hash: job.model.hash.clone(),
        sampler: job.model.sampler.clone(),
        steps: spec.steps(),
        guidance_scale: spec.guidance_scale(),
        width: spec.width(),
        height: spec.height(),
        seed: image.seed,
        prompt: spec.prompt,
        negative_prompt: spec.negative_prompt,
        worker_id,
        finished_unix_ms: now_unix_ms,
        reported_by_worker: Some(report),
        ..Default::default()
    };
    match decision {
        Decision::Checked { readings, image_sha256, pixels_sha256 } => {
            let released = !readings.is_flagged();
            record.set_status(if released { ImageStatus::Released } else { ImageStatus::Withheld });
            (record.image_sha256, record.pixels_sha256) = (image_sha256, pixels_sha256);
            record.energy_nodes = readings.nodes.into_iter().collect();
            record.calibrations = readings.calibrations.into_iter().collect();
            record.final_scores = readings.scores.into_values().collect();
        }
        Decision::WithheldByWorker => {
            record.set_status(ImageStatus::Withheld);
            record.withheld_by_worker = true;
        }
    }
    record
}

/// What clients are told of an image with this record. Where the worker withheld it, the scores are the
/// worker's, of pinned concepts alone: no other says why.
pub(super) fn info(image: v1::ImageInfo, record: &v1::SafetyRecord) -> v1::ImageInfo {
    let report = record.reported_by_worker.as_ref();
    let reported = || report.map(|report| report.final_scores.clone()).unwrap_or_default();
    v1::ImageInfo {
        status: record.status,
        image_sha256: record.image_sha256.clone(),
        final_scores: match record.withheld_by_worker {
            true => reported(),
            false => record.final_scores.clone(),
        },
        steered: report.is_some_and(|report| report.steered),
        ..image
    }
}
