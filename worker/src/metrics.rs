//! What a worker counts; `fairlead_common::metrics` shows it.

use std::time::Duration;

use fairlead_proto::v1::ImageStatus;
use metrics::{counter, histogram};

/// One denoiser call for a batch.
pub(crate) fn denoised(took: Duration) {
    histogram!("fairlead_worker_denoise_seconds").record(took);
}

/// One step's steering of a batch: decoding, asking, and where a gate is open the way back.
pub(crate) fn steered(took: Duration) {
    histogram!("fairlead_worker_steer_seconds").record(took);
}

/// One question to one energy node, its answer included. `call` is "evaluate" or "check".
pub(crate) fn energy_call(call: &'static str, took: Duration, is_answered: bool) {
    histogram!("fairlead_worker_energy_call_seconds", "call" => call).record(took);
    if !is_answered {
        counter!("fairlead_worker_energy_call_failures_total", "call" => call).increment(1);
    }
}

/// One correction of one image.
pub(crate) fn corrected() {
    counter!("fairlead_worker_corrections_total").increment(1);
}

/// One more attempt at one image.
pub(crate) fn rerun() {
    counter!("fairlead_worker_reruns_total").increment(1);
}

/// An image is finished after `took` of the engine's time.
pub(crate) fn finished(status: ImageStatus, took: Duration) {
    let status = match status {
        ImageStatus::Released => "released",
        _ => "withheld",
    };
    counter!("fairlead_worker_images_total", "status" => status).increment(1);
    histogram!("fairlead_worker_image_seconds").record(took);
}

/// A shard ended without a result.
pub(crate) fn failed() {
    counter!("fairlead_worker_shard_failures_total").increment(1);
}
