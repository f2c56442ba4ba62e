//! The node's gRPC surface: the energy service and who may ask it what, health with one name per concept,
//! reflection.

use std::sync::{Arc, OnceLock};

use fairlead_common::{
    clock::unix_ms,
    identity::{
        Role::{self, Coordinator, Operator, Worker},
        authorize,
    },
    trace,
};
use fairlead_proto::{
    FILE_DESCRIPTOR_SET, MAX_MESSAGE_BYTES,
    v1::{
        AddConceptsRequest, AddConceptsResponse, CheckRequest, CheckResponse, DescribeRequest,
        DescribeResponse, EvaluateRequest, EvaluateResponse,
        energy_service_server::{EnergyService, EnergyServiceServer},
    },
};
use tonic::{Code, Request, Response, Status};
use tonic_health::{ServingStatus, server::HealthReporter};
use tracing::Instrument;

use crate::{error::RequestError, metrics, service::Node};

/// The node, once its model is loaded.
pub(crate) type NodeCell = Arc<OnceLock<Arc<Node>>>;

/// Health name of the service as a whole; "" is answered alike.
pub(crate) const SERVICE: &str = "fairlead.v1.EnergyService";

/// Health name of one concept.
pub(crate) fn concept_service(concept: &str) -> String {
    format!("fairlead.concept.{concept}")
}

pub(crate) struct EnergyGrpc {
    node: NodeCell,
    /// Callers must show certificates.
    mutual: bool,
}

impl EnergyGrpc {
    pub(crate) fn server(node: NodeCell, mutual: bool) -> EnergyServiceServer<Self> {
        EnergyServiceServer::new(Self { node, mutual })
            .max_decoding_message_size(MAX_MESSAGE_BYTES)
            .max_encoding_message_size(MAX_MESSAGE_BYTES)
    }

    /// Refuses a call of anybody without one of these roles.
    fn only<T>(&self, request: &Request<T>, roles: &[Role]) -> Result<(), Status> {
        let refused = |refusal| {
            tracing::warn!(%refusal, "request refused");
            Status::from(refusal)
        };
        authorize(request, self.mutual, roles).map(drop).map_err(refused)
    }

    fn node(&self) -> Result<&Arc<Node>, RequestError> {
        self.node.get().ok_or(RequestError::Loading)
    }
}

#[tonic::async_trait]
impl EnergyService for EnergyGrpc {
    async fn describe(
        &self,
        request: Request<DescribeRequest>,
    ) -> Result<Response<DescribeResponse>, Status> {
        self.only(&request, &[Coordinator, Worker, Operator])?;
        let node = self.node()?.describe();
        Ok(Response::new(DescribeResponse { node: Some(node) }))
    }

    async fn evaluate(
        &self,
        request: Request<EvaluateRequest>,
    ) -> Result<Response<EvaluateResponse>, Status> {
        self.only(&request, &[Worker, Operator])?;
        let images = request.get_ref().samples.len() as i64;
        let span = tracing::info_span!("evaluate", otel.kind = "server", images);
        trace::follow(&span, trace::incoming(request.metadata()));
        let answer = async { self.node()?.evaluate(request.into_inner()).await };
        answered("evaluate", answer.instrument(span).await)
    }

    async fn check(
        &self,
        request: Request<CheckRequest>,
    ) -> Result<Response<CheckResponse>, Status> {
        self.only(&request, &[Coordinator, Worker])?;
        let span = tracing::info_span!("check", otel.kind = "server");
        trace::follow(&span, trace::incoming(request.metadata()));
        let answer = async { self.node()?.check(request.into_inner()).await };
        answered("check", answer.instrument(span).await)
    }

    async fn add_concepts(
        &self,
        request: Request<AddConceptsRequest>,
    ) -> Result<Response<AddConceptsResponse>, Status> {
        self.only(&request, &[Operator, Coordinator])?;
        let node = Arc::clone(self.node()?);
        // A task of its own, so that it is polled to the end when the caller goes away.
        let adding = async move { node.add_concepts(request.into_inner(), unix_ms()).await };
        let answer = match tokio::spawn(adding).await {
            Ok(answer) => answer,
            Err(panic) => Err(RequestError::Stopped(panic.to_string())),
        };
        answered("add_concepts", answer)
    }
}

/// Counts an answer and puts it on the wire.
fn answered<T>(call: &'static str, answer: Result<T, RequestError>) -> Result<Response<T>, Status> {
    let code = answer.as_ref().map_or_else(RequestError::code, |_| Code::Ok);
    metrics::answered(call, code);
    answer.map(Response::new).map_err(|error| {
        tracing::warn!(?code, %error, "request refused");
        error.into()
    })
}

/// Reflection of the whole contract, health included.
pub(crate) fn reflection() -> Result<
    tonic_reflection::server::v1::ServerReflectionServer<
        impl tonic_reflection::server::v1::ServerReflection,
    >,
    tonic_reflection::server::Error,
> {
    tonic_reflection::server::Builder::configure()
        .register_encoded_file_descriptor_set(FILE_DESCRIPTOR_SET)
        .register_encoded_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET)
        .build_v1()
}

/// Says of every service name whether it is served.
pub(crate) async fn set_health(reporter: &HealthReporter, node: Option<&Node>, serving: bool) {
    let status = if serving { ServingStatus::Serving } else { ServingStatus::NotServing };
    reporter.set_service_status("", status).await;
    reporter.set_service_status(SERVICE, status).await;
    let offer = node.map(Node::offer);
    for concept in offer.iter().flat_map(|offer| &offer.served.concepts) {
        reporter.set_service_status(concept_service(&concept.info.name), status).await;
    }
}
