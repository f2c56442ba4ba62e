//! Gives concepts to energy nodes that run.

use std::{collections::BTreeSet, time::Duration};

use fairlead_common::grpc::{CONNECT_TIMEOUT, Channels};
use fairlead_proto::v1::{self, energy_service_client::EnergyServiceClient};
use futures::future::join_all;
use tokio::time::{Instant, timeout, timeout_at};

use crate::{
    error::{Error, Result},
    registry::Registry,
    routing::LiveNode,
    suggest,
};

/// Time for a node to learn a set: its text model reads every phrase. Within a client's patience.
const DEADLINE: Duration = Duration::from_secs(15);

/// Has nodes serve further concepts. One that says it does is also known here to do so: the next job that
/// is submitted can have them.
#[derive(Debug, Clone)]
pub(crate) struct Deployer {
    registry: Registry,
    channels: Channels,
}

impl Deployer {
    pub(crate) fn new(registry: Registry, channels: Channels) -> Self {
        Self { registry, channels }
    }

    /// Asks every node of `request`, or every live one.
    ///
    /// # Errors
    /// If there is no such node. What a node says is in the answer.
    pub(crate) async fn deploy(
        &self,
        request: v1::DeployConceptsRequest,
    ) -> Result<v1::DeployConceptsResponse> {
        self.registry.refresh().await?;
        let nodes = chosen(self.registry.live(), &request.node_ids)?;
        let deadline = Instant::now() + DEADLINE;
        let v1::DeployConceptsRequest { concepts, allow_uncalibrated, .. } = request;
        let request = v1::AddConceptsRequest { concepts, allow_uncalibrated };
        let deployments = nodes.iter().map(|node| self.give(node, request.clone(), deadline));
        Ok(v1::DeployConceptsResponse { deployments: join_all(deployments).await })
    }

    async fn give(
        &self,
        node: &LiveNode,
        request: v1::AddConceptsRequest,
        deadline: Instant,
    ) -> v1::Deployment {
        let answer = match timeout_at(deadline, self.ask(node, request)).await {
            Ok(Ok(answer)) => {
                let known = timeout_at(deadline, self.announced(node, &answer.concepts)).await;
                known.map(|()| answer).map_err(|_| {
                    "it serves them, but its registration does not say so yet; see `fairlead concepts`"
                        .to_owned()
                })
            }
            Ok(Err(status)) => Err(format!("{:?}: {}", status.code(), status.message())),
            Err(_) => Err(format!("no answer within {DEADLINE:?}; repeat the command")),
        };
        let (v1::AddConceptsResponse { concepts, calibrations }, error) = match answer {
            Ok(answer) => (answer, String::new()),
            Err(problem) => (v1::AddConceptsResponse::default(), problem),
        };
        v1::Deployment {
            node_id: node.info.node_id.clone(),
            model_name: node.info.model_name.clone(),
            concepts,
            calibrations,
            error,
        }
    }

    async fn ask(
        &self,
        node: &LiveNode,
        request: v1::AddConceptsRequest,
    ) -> Result<v1::AddConceptsResponse, tonic::Status> {
        let channel = self.channels.get(&node.info);
        let channel = channel.map_err(|error| tonic::Status::unavailable(error.to_string()))?;
        let mut request = tonic::Request::new(request);
        request.set_timeout(DEADLINE);
        Ok(EnergyServiceClient::new(channel).add_concepts(request).await?.into_inner())
    }

    /// Waits until the node's registration has all of `concepts`.
    async fn announced(&self, node: &LiveNode, concepts: &[v1::ConceptInfo]) {
        let mut changes = self.registry.subscribe();
        let asked: Vec<&v1::ConceptRef> =
            concepts.iter().filter_map(|info| info.concept.as_ref()).collect();
        let has_all = |live: &LiveNode| {
            live.info.node_id == node.info.node_id && asked.iter().all(|c| live.serves(c))
        };
        while !self.registry.live().iter().any(has_all) {
            // It may have registered at another coordinator: look into the store now and then.
            let _ = timeout(CONNECT_TIMEOUT / 10, changes.changed()).await;
            if let Err(error) = self.registry.refresh().await {
                tracing::warn!(%error, "cannot read the members");
            }
        }
    }
}

/// The live nodes of these names, or all.
fn chosen(mut live: Vec<LiveNode>, names: &[String]) -> Result<Vec<LiveNode>> {
    let known: BTreeSet<&str> = live.iter().map(|node| node.info.node_id.as_str()).collect();
    if live.is_empty() {
        let what = "no energy node is registered; start one with `fairlead energy`";
        return Err(Error::Unavailable(what.to_owned()));
    }
    if let Some(missing) = names.iter().find(|name| !known.contains(name.as_str())) {
        let hint = suggest::hint(missing, known.iter().copied());
        let problem = format!("no live energy node is called `{missing}`{hint}");
        return Err(Error::invalid("node_ids", problem));
    }
    if !names.is_empty() {
        live.retain(|node| names.contains(&node.info.node_id));
    }
    Ok(live)
}
