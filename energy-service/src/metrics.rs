//! What an energy node counts; `fairlead_common::metrics` shows it.

use std::time::Duration;

use metrics::{counter, histogram};
use tonic::Code;

/// The time on the engine of requests that were answered together, and how many images they had.
pub(crate) fn computed(took: Duration, images: usize) {
    histogram!("fairlead_energy_compute_seconds").record(took);
    histogram!("fairlead_energy_batch_images").record(images as f64);
}

/// How long a request waited for the engine.
pub(crate) fn waited(took: Duration) {
    histogram!("fairlead_energy_wait_seconds").record(took);
}

/// A request was answered or refused.
pub(crate) fn answered(call: &'static str, code: Code) {
    let code = format!("{code:?}");
    counter!("fairlead_energy_requests_total", "call" => call, "code" => code).increment(1);
}

/// A concept's gate is open on a clean estimate.
pub(crate) fn opened(concept: &str) {
    counter!("fairlead_energy_gates_open_total", "concept" => concept.to_owned()).increment(1);
}
