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

/// The registry, at one of several coordinators.
struct Registry {
    coordinators: Replicas,
    client: RegistryServiceClient<Replicas>,
}

/// A registration that is alive.
struct Registration {
    node_id: String,
    id: String,
    ttl: Duration,
}

/// Why a registration's loop was left.
enum Ended {
    /// The node stops, or its scorer is broken.
    Stops,
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
    let client = RegistryServiceClient::new(coordinators.clone())
        .max_decoding_message_size(MAX_MESSAGE_BYTES)
        .max_encoding_message_size(MAX_MESSAGE_BYTES);
    let mut registry = Registry { coordinators, client };
    let mut offers = node.offers();
    let mut engine = node.engine().state();
    let mut registration = None;
    loop {
        offers.borrow_and_update();
        let registered = register(&mut registry, node.describe(), &mut engine, &shutdown).await;
        let Some(registered) = registered else { break };
        let current = registration.insert(registered);
        match renew(&mut registry, current, &mut offers, &mut engine, &shutdown).await {
            Ended::Stops => break,
            // What it has is good until the next one replaces it.
            Ended::Changed => {
                tracing::info!("concepts or calibrations changed, registering anew");
            }
            Ended::Forgotten => {
                registration = None;
                tracing::warn!("the coordinator forgot this node, registering anew");
            }
        }
    }
    if let Some(registration) = registration {
        deregister(&mut registry, registration).await;
    }
}

/// Until `shutdown`, or until the scorer breaks.
async fn stops(engine: &mut watch::Receiver<EngineState>, shutdown: &CancellationToken) {
    tokio::select! {
        () = shutdown.cancelled() => {}
        () = failed(engine) => {}
    }
}

async fn failed(engine: &mut watch::Receiver<EngineState>) {
    let failed = |state: &EngineState| matches!(state, EngineState::Failed(_));
    if engine.wait_for(failed).await.is_err() {
        // The engine's thread has ended in order: the node is stopping.
        std::future::pending::<()>().await;
    }
}

/// Tries until it is registered; `None` if the node stops or its scorer breaks before. A call's answer is
/// waited for, which names what is to be taken back; where none comes, a registration ends by itself.
async fn register(
    registry: &mut Registry,
    node: NodeInfo,
    engine: &mut watch::Receiver<EngineState>,
    shutdown: &CancellationToken,
) -> Option<Registration> {
    let mut backoff = Backoff::new(Duration::from_millis(100), Duration::from_secs(5));
    loop {
        let coordinator = registry.coordinators.address().to_owned();
        let request = RegisterNodeRequest { node: Some(node.clone()) };
        match bounded(registry.client.register_node(request)).await {
            Ok(answer) => {
                let node_id = node.node_id;
                let ttl = Duration::from_millis(answer.ttl_ms.into());
                let concepts = node.concepts.len();
                tracing::info!(coordinator, %node_id, ?ttl, concepts, "registered");
                return Some(Registration { node_id, id: answer.registration_id, ttl });
            }
            Err(status) => {
                let delay = backoff.next_delay();
                let (code, message) = (status.code(), status.message());
                match code {
                    // A deadline of tonic's is CANCELLED.
                    Code::Unavailable | Code::DeadlineExceeded | Code::Cancelled => {
                        tracing::warn!(coordinator, ?delay, "cannot be reached yet: {message}");
                    }
                    _ => {
                        tracing::error!(coordinator, ?code, ?delay, "refused this node: {message}");
                    }
                }
                tokio::select! {
                    biased;
                    () = stops(engine, shutdown) => return None,
                    () = tokio::time::sleep(delay) => {}
                }
            }
        }
    }
}

/// Renews at a third of the registration's length until it ends. A failed renewal is tried again;
/// the coordinator says when it is too late.
async fn renew(
    registry: &mut Registry,
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
            () = stops(engine, shutdown) => return Ended::Stops,
            Ok(()) = offers.changed() => return Ended::Changed,
            () = tokio::time::sleep(wait) => {}
        }
        let coordinator = registry.coordinators.address().to_owned();
        let request = RenewNodeRequest {
            node_id: registration.node_id.clone(),
            registration_id: registration.id.clone(),
        };
        match bounded(registry.client.renew_node(request)).await {
            Ok(answer) => {
                backoff.reset();
                registration.ttl = Duration::from_millis(answer.ttl_ms.into());
                wait = (registration.ttl / 3).max(SHORTEST_RENEWAL);
            }
            Err(status) if status.code() == Code::NotFound => return Ended::Forgotten,
            Err(status) => {
                wait = backoff.next_delay().min((registration.ttl / 3).max(SHORTEST_RENEWAL));
                let (code, message) = (status.code(), status.message());
                tracing::warn!(coordinator, ?code, ?wait, "registration not renewed: {message}");
            }
        }
    }
}

async fn deregister(registry: &mut Registry, registration: Registration) {
    let Registration { node_id, id, .. } = registration;
    let request = DeregisterNodeRequest { node_id, registration_id: id };
    match bounded(registry.client.deregister_node(request)).await {
        Ok(_) => tracing::info!("deregistered"),
        Err(status) if status.code() == Code::NotFound => {
            tracing::info!("the registration had ended or was replaced before");
        }
        Err(status) => {
            let (code, message) = (status.code(), status.message());
            tracing::warn!(?code, "not deregistered, the registration will expire: {message}");
        }
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
