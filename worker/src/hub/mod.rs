//! The worker's side of the coordinator's stream: hello, renewals, shards in, images out.
//!
//! A stream that breaks ends all its leases, so the work on them is dropped at once and the worker
//! attaches again. Renewals come from the session's own task, which never waits for the device.

mod outbox;
mod session;
mod work;

use std::time::Duration;

use fairlead_common::{
    backoff::Backoff,
    grpc::{self, Channels, Replicas},
    tls::Tls,
};
use fairlead_proto::{MAX_MESSAGE_BYTES, v1::worker_service_client::WorkerServiceClient};
use tokio_util::sync::CancellationToken;
use tonic::{Code, Status};

use crate::{
    energy,
    engine::EngineHandle,
    error::{Error, Result},
};
use session::{Ended, Session};

/// First and longest pause before attaching again.
const BACKOFF: (Duration, Duration) = (Duration::from_millis(200), Duration::from_secs(10));

/// Longest wait for the coordinator's first answer.
const HANDSHAKE: Duration = Duration::from_secs(20);

/// What the worker's side needs to know.
#[derive(Debug, Clone)]
pub struct HubOptions {
    /// Addresses of the coordinators, separated by commas.
    pub coordinator: String,
    /// Name of this worker.
    pub worker_id: String,
    /// Shards to hold at once.
    pub capacity: u32,
    /// Deadline of one call to an energy node.
    pub energy_timeout: Duration,
    /// Longest time to finish running shards after the stop signal.
    pub drain_timeout: Duration,
    /// What it proves itself with, and whom it believes.
    pub tls: Tls,
}

/// Keeps a worker attached to a coordinator and runs what it is assigned.
#[derive(Debug)]
pub struct Hub {
    options: HubOptions,
    engines: Vec<EngineHandle>,
    channels: Channels,
}

impl Hub {
    /// A hub over engines that are ready.
    pub fn new(options: HubOptions, engines: Vec<EngineHandle>) -> Self {
        let channels = energy::channels(options.energy_timeout, options.tls.clone());
        Self { options, engines, channels }
    }

    /// Serves until `shutdown`, then finishes or hands back what it holds.
    ///
    /// # Errors
    /// [`Error::Coordinator`] if the address is none or the coordinator refuses this worker for good,
    /// [`Error::Device`] when the device has failed.
    pub async fn run(self, shutdown: CancellationToken) -> Result<()> {
        let coordinators = grpc::replicas(&self.options.coordinator, HANDSHAKE, &self.options.tls)
            .map_err(|error| self.refused(error.to_string()))?;
        let mut backoff = Backoff::new(BACKOFF.0, BACKOFF.1);
        while !shutdown.is_cancelled() {
            let (coordinator, moves) = (coordinators.address().to_owned(), coordinators.moves());
            let session = Session::open(&self, client(coordinators.clone()), &shutdown);
            let ended = match session.await {
                Ok(session) => {
                    backoff.reset();
                    tracing::info!(coordinator, "attached");
                    session.serve(&shutdown).await
                }
                Err(ended) => ended,
            };
            match ended {
                Ended::Drained => break,
                Ended::Fatal(error) => return Err(error),
                Ended::Broken(status) if is_final(&status) => {
                    return Err(self.refused(status.message().to_owned()));
                }
                Ended::Broken(status) => {
                    coordinators.leave(moves);
                    let delay = backoff.next_delay();
                    tracing::warn!(
                        coordinator, code = ?status.code(), ?delay,
                        "stream ended, attaching again: {}", status.message()
                    );
                    tokio::select! {
                        () = shutdown.cancelled() => {}
                        () = tokio::time::sleep(delay) => {}
                    }
                }
            }
        }
        Ok(())
    }

    fn refused(&self, reason: String) -> Error {
        Error::Coordinator { address: self.options.coordinator.clone(), reason }
    }
}

/// Whether attaching again would be refused again.
fn is_final(status: &Status) -> bool {
    matches!(
        status.code(),
        Code::FailedPrecondition
            | Code::InvalidArgument
            | Code::Unimplemented
            | Code::Unauthenticated
            | Code::PermissionDenied
    )
}

fn client(coordinators: Replicas) -> WorkerServiceClient<Replicas> {
    WorkerServiceClient::new(coordinators)
        .max_decoding_message_size(MAX_MESSAGE_BYTES)
        .max_encoding_message_size(MAX_MESSAGE_BYTES)
}
