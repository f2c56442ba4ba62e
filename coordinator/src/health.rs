//! What `grpc.health.v1` says of the coordinator: whether it can store what it is told.

use std::time::Duration;

use fairlead_proto::v1::{
    catalog_service_server::SERVICE_NAME as CATALOG,
    generation_service_server::SERVICE_NAME as GENERATION,
    registry_service_server::SERVICE_NAME as REGISTRY,
    worker_service_server::SERVICE_NAME as WORKER,
};
use tonic_health::{ServingStatus, server::HealthReporter};

use crate::{metrics, service::Coordinator};

/// Pause between two looks.
const PAUSE: Duration = Duration::from_secs(1);

/// The services, and by the empty name all of them together.
const SERVICES: [&str; 5] = ["", GENERATION, CATALOG, REGISTRY, WORKER];

/// Tells health from what the coordinator stands on.
pub(crate) struct Health {
    coordinator: Coordinator,
    reporter: HealthReporter,
    was_sound: bool,
}

impl Health {
    /// Looks for the first time.
    pub(crate) async fn new(coordinator: Coordinator, reporter: HealthReporter) -> Self {
        let mut health = Self { coordinator, reporter, was_sound: true };
        health.look().await;
        health
    }

    /// Goes on looking; it never ends.
    pub(crate) async fn follow(mut self) {
        loop {
            tokio::time::sleep(PAUSE).await;
            self.look().await;
        }
    }

    async fn look(&mut self) {
        let problem = self.coordinator.check().await.err();
        let is_sound = problem.is_none();
        metrics::sound(is_sound);
        match problem {
            Some(error) if self.was_sound => tracing::error!(%error, "NOT_SERVING"),
            None if !self.was_sound => tracing::info!("SERVING again"),
            _ => {}
        }
        self.was_sound = is_sound;
        let status = if is_sound { ServingStatus::Serving } else { ServingStatus::NotServing };
        for service in SERVICES {
            self.reporter.set_service_status(service, status).await;
        }
    }
}
