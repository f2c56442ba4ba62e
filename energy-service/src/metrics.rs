//! What an energy node counts; `fairlead_common::metrics` shows it.

use std::time::Duration;

use metrics::{counter, histogram};
use tonic::Code;

/// One request's time on the engine, and how many images it had.
pub(crate) fn computed(took: Duration, images: usize) {
    histogram!("fairlead_energy_compute_seconds").record(took);
    histogram!("fairlead_energy_request_images").record(images as f64);
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

/// A concept's gate is open on an image.
pub(crate) fn opened(concept: &str) {
    counter!("fairlead_energy_gates_open_total", "concept" => concept.to_owned()).increment(1);
}
