//! The gRPC faces of the coordinator: translation and nothing else.

use std::{pin::Pin, sync::Arc};

use fairlead_common::{
    bounds::{self, MAX_CONCEPTS},
    identity::Role,
    trace,
};
use fairlead_proto::v1::{
    self, catalog_service_server::CatalogService, generation_service_server::GenerationService,
    registry_service_server::RegistryService, worker_service_server::WorkerService,
};
use futures::{Stream, StreamExt};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status, Streaming};
use tracing::Instrument;

use crate::{clock::millis, error::Error, service::Coordinator, tenants::Tenant};

type Answer<T> = Result<Response<T>, Status>;
type BoxStream<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

/// Implements every service of the coordinator.
#[derive(Debug, Clone)]
pub(crate) struct Grpc {
    coordinator: Coordinator,
}

impl Grpc {
    pub(crate) fn new(coordinator: Coordinator) -> Self {
        Self { coordinator }
    }

    /// Who asks.
    fn client<T>(&self, request: &Request<T>) -> Result<Arc<Tenant>, Error> {
        self.coordinator.access().client(request.metadata())
    }

    /// An operator who expects a new concept to count should hear that it does not.
    fn tell_unasked(&self, node: &v1::NodeInfo) {
        let refs = node.concepts.iter().filter_map(|info| info.concept.as_ref());
        let names = refs.map(|concept| concept.name.as_str());
        let policies = self.coordinator.access().policies();
        let unasked = policies.unasked(names.take(MAX_CONCEPTS));
        if !unasked.is_empty() {
            let (concepts, first) = (unasked.len(), bounds::shown(unasked[0]));
            tracing::warn!(
                node = %bounds::shown(&node.node_id),
                concepts,
                %first,
                "serves concepts that no policy asks for; name them in known_concepts of the policies file"
            );
        }
    }

    fn ttl_ms(&self) -> u32 {
        u32::try_from(millis(self.coordinator.registry().ttl())).unwrap_or(u32::MAX)
    }
}

#[tonic::async_trait]
impl GenerationService for Grpc {
    async fn submit_job(
        &self,
        request: Request<v1::SubmitJobRequest>,
    ) -> Answer<v1::SubmitJobResponse> {
        let incoming = trace::incoming(request.metadata()).to_owned();
        let span = tracing::info_span!("submit_job", otel.kind = "server");
        trace::follow(&span, &incoming);
        let tenant = self.client(&request)?;
        let admitted = self.coordinator.submit(&tenant, request.into_inner(), &incoming);
        let job = tenant.job(admitted.instrument(span).await?);
        Ok(Response::new(v1::SubmitJobResponse { job: Some(job) }))
    }

    async fn get_job(&self, request: Request<v1::GetJobRequest>) -> Answer<v1::GetJobResponse> {
        let tenant = self.client(&request)?;
        let job = self.coordinator.get(&tenant, &request.into_inner().job_id).await?;
        Ok(Response::new(v1::GetJobResponse { job: Some(tenant.job(job)) }))
    }

    type WatchJobStream = BoxStream<v1::WatchJobResponse>;

    async fn watch_job(
        &self,
        request: Request<v1::WatchJobRequest>,
    ) -> Answer<Self::WatchJobStream> {
        let tenant = self.client(&request)?;
        let v1::WatchJobRequest { job_id, after_sequence } = request.into_inner();
        let events = self.coordinator.watch(&tenant, &job_id, after_sequence).await?;
        let events = ReceiverStream::new(events);
        let seen = events.map(move |event| event.map(|event| tenant.event(event)));
        Ok(Response::new(Box::pin(seen)))
    }

    async fn cancel_job(
        &self,
        request: Request<v1::CancelJobRequest>,
    ) -> Answer<v1::CancelJobResponse> {
        let tenant = self.client(&request)?;
        let job = self.coordinator.cancel(&tenant, &request.into_inner().job_id).await?;
        Ok(Response::new(v1::CancelJobResponse { job: Some(tenant.job(job)) }))
    }

    async fn list_jobs(
        &self,
        request: Request<v1::ListJobsRequest>,
    ) -> Answer<v1::ListJobsResponse> {
        let tenant = self.client(&request)?;
        let page = self.coordinator.list(&tenant, request.into_inner()).await?;
        let jobs = page.jobs.into_iter().map(|job| tenant.job(job)).collect();
        Ok(Response::new(v1::ListJobsResponse { jobs, ..page }))
    }

    async fn get_image(
        &self,
        request: Request<v1::GetImageRequest>,
    ) -> Answer<v1::GetImageResponse> {
        let tenant = self.client(&request)?;
        let v1::GetImageRequest { job_id, index } = request.into_inner();
        Ok(Response::new(self.coordinator.image(&tenant, &job_id, index).await?))
    }

    async fn get_record(
        &self,
        request: Request<v1::GetRecordRequest>,
    ) -> Answer<v1::GetRecordResponse> {
        let tenant = self.client(&request)?;
        let record = self.coordinator.record(&tenant, request.into_inner()).await?;
        Ok(Response::new(tenant.safety_record(record, self.coordinator.signer())))
    }
}

#[tonic::async_trait]
impl CatalogService for Grpc {
    async fn list_models(
        &self,
        request: Request<v1::ListModelsRequest>,
    ) -> Answer<v1::ListModelsResponse> {
        self.client(&request)?;
        Ok(Response::new(v1::ListModelsResponse { models: self.coordinator.models() }))
    }

    async fn list_concepts(
        &self,
        request: Request<v1::ListConceptsRequest>,
    ) -> Answer<v1::ListConceptsResponse> {
        self.client(&request)?;
        Ok(Response::new(self.coordinator.concepts()))
    }

    async fn retire_concept(
        &self,
        request: Request<v1::RetireConceptRequest>,
    ) -> Answer<v1::RetireConceptResponse> {
        self.coordinator.access().admin(&request)?;
        let concept = request.into_inner().concept;
        let energies = self.coordinator.registry().retire(&concept).await?;
        let energies = energies.into_iter().collect();
        Ok(Response::new(v1::RetireConceptResponse { energies }))
    }

    async fn deploy_concepts(
        &self,
        request: Request<v1::DeployConceptsRequest>,
    ) -> Answer<v1::DeployConceptsResponse> {
        self.coordinator.access().admin(&request)?;
        let deployed = self.coordinator.deployer().deploy(request.into_inner()).await?;
        Ok(Response::new(deployed))
    }
}

#[tonic::async_trait]
impl RegistryService for Grpc {
    async fn register_node(
        &self,
        request: Request<v1::RegisterNodeRequest>,
    ) -> Answer<v1::RegisterNodeResponse> {
        let node = request.get_ref().node.as_ref();
        let node_id = node.map_or("", |node| node.node_id.as_str());
        let who = self.coordinator.access().node(&request, node_id)?;
        let node = request.into_inner().node;
        let node = node.ok_or_else(|| Error::invalid("node", "is missing"))?;
        self.tell_unasked(&node);
        let registration_id = self.coordinator.registrar().register(node, who.as_deref()).await?;
        Ok(Response::new(v1::RegisterNodeResponse { registration_id, ttl_ms: self.ttl_ms() }))
    }

    async fn renew_node(
        &self,
        request: Request<v1::RenewNodeRequest>,
    ) -> Answer<v1::RenewNodeResponse> {
        self.coordinator.access().node(&request, &request.get_ref().node_id)?;
        let v1::RenewNodeRequest { node_id, registration_id } = request.into_inner();
        self.coordinator.registry().renew(&node_id, &registration_id).await?;
        Ok(Response::new(v1::RenewNodeResponse { ttl_ms: self.ttl_ms() }))
    }

    async fn deregister_node(
        &self,
        request: Request<v1::DeregisterNodeRequest>,
    ) -> Answer<v1::DeregisterNodeResponse> {
        self.coordinator.access().node(&request, &request.get_ref().node_id)?;
        let v1::DeregisterNodeRequest { node_id, registration_id } = request.into_inner();
        self.coordinator.registry().deregister(&node_id, &registration_id).await?;
        Ok(Response::new(v1::DeregisterNodeResponse {}))
    }
}

#[tonic::async_trait]
impl WorkerService for Grpc {
    type AttachStream = BoxStream<v1::AttachResponse>;

    async fn attach(
        &self,
        request: Request<Streaming<v1::AttachRequest>>,
    ) -> Answer<Self::AttachStream> {
        let who = self.coordinator.access().service(&request, &[Role::Worker])?;
        let outbound = self.coordinator.hub().attach(request.into_inner(), who);
        Ok(Response::new(Box::pin(ReceiverStream::new(outbound))))
    }
}
