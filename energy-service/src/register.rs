//! Announces the node to a coordinator and keeps its registration alive.

use std::{sync::Arc, time::Duration};

use fairlead_common::{backoff::Backoff, grpc::Replicas};
use fairlead_proto::{
    MAX_MESSAGE_BYTES,
    v1::{
        DeregisterNodeRequest, NodeInfo, RegisterNodeRequest, RenewNodeRequest,
        registry_service_client::RegistryServiceClient,
    },
};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use tonic::{Code, Status};

use crate::{engine::EngineState, offer::Offer, service::Node};

/// Deadline of every call to the coordinator.
pub(crate) const CALL_TIMEOUT: Duration = Duration::from_secs(5);

/// Shortest time between two renewals, whatever the coordinator says.
const SHORTEST_RENEWAL: Duration = Duration::from_millis(10);

/// A registration that is alive.
struct Registration {
    node_id: String,
    id: String,
    ttl: Duration,
}

/// Why a registration's loop was left.
enum Ended {
    /// The node stops.
    Shutdown,
    /// The scorer is broken.
    EngineFailed,
    /// The description changed.
    Changed,
    /// The coordinator no longer knows the node.
    Forgotten,
}

/// Keeps `node` registered with `coordinators` until `shutdown`, or until its engine fails.
pub(crate) async fn keep_registered(
    coordinators: Replicas,
    node: Arc<Node>,
    shutdown: CancellationToken,
) {
    let mut client = RegistryServiceClient::new(coordinators)
        .max_decoding_message_size(MAX_MESSAGE_BYTES)
        .max_encoding_message_size(MAX_MESSAGE_BYTES);
    let mut offers = node.offers();
    let mut engine = node.engine().state();
    loop {
        offers.borrow_and_update();
        let registered = tokio::select! {
            biased;
            () = shutdown.cancelled() => return,
            () = failed(&mut engine) => return,
            registration = register(&mut client, node.describe()) => registration,
        };
        let mut registration = registered;
        let ended =
            renew(&mut client, &mut registration, &mut offers, &mut engine, &shutdown).await;
        match ended {
            Ended::Shutdown | Ended::EngineFailed => {
                return deregister(&mut client, registration).await;
            }
            Ended::Changed => {
                tracing::info!("concepts or calibrations changed, registering anew")
            }
            Ended::Forgotten => {
                tracing::warn!("the coordinator forgot this node, registering anew")
            }
        }
    }
}

async fn failed(engine: &mut watch::Receiver<EngineState>) {
    let failed = |state: &EngineState| matches!(state, EngineState::Failed(_));
    if engine.wait_for(failed).await.is_err() {
        // The engine's thread has ended in order: the node is stopping.
        std::future::pending::<()>().await;
    }
}

/// Tries until it is registered.
async fn register(client: &mut RegistryServiceClient<Replicas>, node: NodeInfo) -> Registration {
    let mut backoff = Backoff::new(Duration::from_millis(100), Duration::from_secs(5));
    loop {
        let request = RegisterNodeRequest { node: Some(node.clone()) };
        match bounded(client.register_node(request)).await {
            Ok(answer) => {
                let node_id = node.node_id;
                let ttl = Duration::from_millis(answer.ttl_ms.into());
                tracing::info!(%node_id, ?ttl, concepts = node.concepts.len(), "registered");
                return Registration { node_id, id: answer.registration_id, ttl };
            }
            Err(status) => {
                let delay = backoff.next_delay();
                let (code, message) = (status.code(), status.message());
                if matches!(code, Code::Unavailable | Code::DeadlineExceeded) {
                    tracing::info!(message, ?delay, "the coordinator cannot be reached yet");
                } else {
                    tracing::error!(?code, message, ?delay, "the coordinator refused this node");
                }
                tokio::time::sleep(delay).await;
            }
        }
    }
}

/// Renews at a third of the registration's length until it ends. A failed renewal is tried again;
/// the coordinator says when it is too late.
async fn renew(
    client: &mut RegistryServiceClient<Replicas>,
    registration: &mut Registration,
    offers: &mut watch::Receiver<Arc<Offer>>,
    engine: &mut watch::Receiver<EngineState>,
    shutdown: &CancellationToken,
) -> Ended {
    let mut backoff = Backoff::new(Duration::from_millis(100), Duration::from_secs(5));
    let mut wait = (registration.ttl / 3).max(SHORTEST_RENEWAL);
    loop {
        tokio::select! {
            biased;
            () = shutdown.cancelled() => return Ended::Shutdown,
            () = failed(engine) => return Ended::EngineFailed,
            Ok(()) = offers.changed() => return Ended::Changed,
            () = tokio::time::sleep(wait) => {}
        }
        let request = RenewNodeRequest {
            node_id: registration.node_id.clone(),
            registration_id: registration.id.clone(),
        };
        match bounded(client.renew_node(request)).await {
            Ok(answer) => {
                backoff.reset();
                registration.ttl = Duration::from_millis(answer.ttl_ms.into());
                wait = (registration.ttl / 3).max(SHORTEST_RENEWAL);
            }
            Err(status) if status.code() == Code::NotFound => return Ended::Forgotten,
            Err(status) => {
                wait = backoff.next_delay().min((registration.ttl / 3).max(SHORTEST_RENEWAL));
                tracing::warn!(%status, ?wait, "the registration was not renewed");
            }
        }
    }
}

async fn deregister(client: &mut RegistryServiceClient<Replicas>, registration: Registration) {
    let Registration { node_id, id, .. } = registration;
    let request = DeregisterNodeRequest { node_id, registration_id: id };
    match bounded(client.deregister_node(request)).await {
        Ok(_) => tracing::info!("deregistered"),
        Err(status) => tracing::warn!(%status, "not deregistered; the registration will expire"),
    }
}

/// A call with its deadline.
async fn bounded<T>(
    call: impl Future<Output = Result<tonic::Response<T>, Status>>,
) -> Result<T, Status> {
    match tokio::time::timeout(CALL_TIMEOUT, call).await {
        Ok(answer) => answer.map(tonic::Response::into_inner),
        Err(_) => Err(Status::deadline_exceeded(format!("no answer within {CALL_TIMEOUT:?}"))),
    }
}
