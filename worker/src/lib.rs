//! The worker: it takes shards from a coordinator, denoises them, asks energy nodes at every step
//! where each image is heading, corrects it while a gate is open, and proposes for release only what
//! passed a final check.
//!
//! [`run`] is the service. [`load`] and [`engine::EngineHandle`] are the engine alone, for tests and
//! measurements: they need an [`energy::Energy`] but no cluster.

mod config;
pub mod energy;
pub mod engine;
mod error;
pub mod generator;
mod hub;
mod metrics;
pub mod noise;
pub mod sampler;
mod shard;
pub mod steering;
pub mod turn;

use std::path::Path;

use fairlead_common::ids::{process_name, process_part};
use tokio_util::sync::CancellationToken;

pub use config::WorkerArgs;
pub use engine::{Engine, EngineHandle};
pub use error::{Error, NodeFailure, Result};
pub use hub::{Hub, HubOptions};
pub use shard::Shard;

/// Loads the models of `options`, attaches to its coordinator and serves until `shutdown`.
///
/// # Errors
/// If a model cannot be loaded or the coordinator refuses this worker for good. A coordinator that
/// cannot be reached is tried again until `shutdown`.
pub async fn run(options: WorkerArgs, shutdown: CancellationToken) -> Result<()> {
    let worker_id = options.worker_id.clone().unwrap_or_else(|| match options.tls.identity() {
        Some(own) => process_part(&own.name),
        None => process_name("worker"),
    });
    let mut engines: Vec<EngineHandle> = Vec::new();
    for dir in &options.models {
        let engine = tokio::select! {
            () = shutdown.cancelled() => return Ok(()),
            engine = load(dir, &options) => engine?,
        };
        let info = engine.info();
        if engines.iter().any(|other| other.info().name == info.name) {
            return Err(Error::Folder {
                path: dir.clone(),
                reason: format!("another --model is also called `{}`; rename one", info.name),
            });
        }
        tracing::info!(model = %info.name, hash = %info.hash, "model loaded");
        engines.push(engine);
    }
    let hub = HubOptions {
        coordinator: options.coordinator,
        worker_id,
        capacity: options.capacity,
        energy_timeout: options.energy_timeout,
        drain_timeout: options.drain_timeout,
        tls: options.tls,
    };
    Hub::new(hub, engines).run(shutdown).await
}

/// Loads the model in `dir` on a thread of its own.
///
/// # Errors
/// [`Error::Folder`] or [`Error::Model`], naming the file and what to do.
pub async fn load(dir: &Path, options: &WorkerArgs) -> Result<EngineHandle> {
    let name = generator::model_name(dir)?;
    let (dir, device, max_batch) = (dir.to_owned(), options.device, options.max_batch);
    EngineHandle::spawn(&name, options.threads, options.micro_batches, move || {
        Ok(Engine::new(generator::load(&dir, &device.open()?)?, max_batch))
    })
    .await
}
