//! A coordinator on a free port, on a runtime of its own so that it can be killed.

use std::{future::Future, net::SocketAddr, time::Duration};

use fairlead_common::tls::Tls;
use fairlead_coordinator::{CoordinatorOptions, Policies};
use fairlead_proto::v1::{
    self, JobSpec, JobState, catalog_service_client::CatalogServiceClient,
    generation_service_client::GenerationServiceClient,
    registry_service_client::RegistryServiceClient, watch_job_response::Event,
};
use tokio::{net::TcpListener, runtime::Runtime, task::JoinHandle};
use tokio_util::sync::CancellationToken;
use tonic::{Code, Status, Streaming, transport::Channel};

/// Bounds every wait of a test: reached only if something hangs.
pub(crate) const PATIENCE: Duration = Duration::from_secs(60);

/// Ends `future` with a panic instead of a hanging test.
pub(crate) async fn patient<T>(future: impl Future<Output = T>) -> T {
    tokio::time::timeout(PATIENCE, future).await.expect("it ends before the test's patience")
}

pub(crate) struct Cluster {
    address: SocketAddr,
    stop: CancellationToken,
    server: JoinHandle<fairlead_coordinator::Result<()>>,
    runtime: Option<Runtime>,
}

impl Drop for Cluster {
    fn drop(&mut self) {
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
    }
}

/// Options for tests: failures are retried at once, nothing expires by itself.
pub(crate) fn options() -> CoordinatorOptions {
    CoordinatorOptions {
        lease_ttl: Duration::from_secs(600),
        node_ttl: Duration::from_secs(600),
        retry_delay: Duration::from_millis(1),
        drain_timeout: Duration::from_millis(10),
        ..CoordinatorOptions::default()
    }
}

/// The same, but what nobody can make fails at once.
pub(crate) fn impatient() -> CoordinatorOptions {
    CoordinatorOptions { max_wait: Duration::ZERO, ..options() }
}

pub(crate) fn policies(text: &str) -> CoordinatorOptions {
    CoordinatorOptions { policies: Policies::parse(text).expect("valid policies"), ..options() }
}

impl Cluster {
    pub(crate) async fn start(options: CoordinatorOptions) -> Self {
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .enable_all()
            .build()
            .expect("a runtime");
        let stop = CancellationToken::new();
        let token = stop.clone();
        let (sender, address) = tokio::sync::oneshot::channel();
        let server = runtime.spawn(async move {
            let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
            sender.send(listener.local_addr().expect("an address")).expect("the test waits");
            fairlead_coordinator::run(listener, options, token).await
        });
        let address = address.await.expect("the coordinator binds");
        Self { address, stop, server, runtime: Some(runtime) }
    }

    pub(crate) fn channel(&self) -> Channel {
        let address = format!("http://{}", self.address);
        fairlead_common::grpc::channel(&address, PATIENCE, &Tls::default())
            .expect("a valid address")
    }

    pub(crate) fn client(&self) -> GenerationServiceClient<Channel> {
        GenerationServiceClient::new(self.channel())
    }

    pub(crate) fn catalog(&self) -> CatalogServiceClient<Channel> {
        CatalogServiceClient::new(self.channel())
    }

    pub(crate) fn registry(&self) -> RegistryServiceClient<Channel> {
        RegistryServiceClient::new(self.channel())
    }

    /// Stops it as a signal would.
    pub(crate) async fn stop(mut self) {
        self.stop.cancel();
        patient(&mut self.server).await.expect("no panic").expect("a clean end");
    }

    /// Kills it: every task is dropped where it stands.
    pub(crate) async fn kill(mut self) {
        let runtime = self.runtime.take().expect("it runs");
        tokio::task::spawn_blocking(move || runtime.shutdown_timeout(PATIENCE))
            .await
            .expect("it dies");
    }

    pub(crate) async fn submit(&self, spec: JobSpec) -> Result<v1::Job, Status> {
        self.submit_with_key(spec, "").await
    }

    pub(crate) async fn submit_with_key(
        &self,
        spec: JobSpec,
        key: &str,
    ) -> Result<v1::Job, Status> {
        let request = v1::SubmitJobRequest { spec: Some(spec), idempotency_key: key.into() };
        let response = patient(self.client().submit_job(request)).await?;
        Ok(response.into_inner().job.expect("a job"))
    }

    pub(crate) async fn get(&self, job_id: &str) -> v1::Job {
        let request = v1::GetJobRequest { job_id: job_id.into() };
        let response = patient(self.client().get_job(request)).await.expect("the job is there");
        response.into_inner().job.expect("a job")
    }

    pub(crate) async fn cancel(&self, job_id: &str) -> Result<v1::Job, Status> {
        let request = v1::CancelJobRequest { job_id: job_id.into() };
        let response = patient(self.client().cancel_job(request)).await?;
        Ok(response.into_inner().job.expect("a job"))
    }

    pub(crate) async fn watch(&self, job_id: &str, after: u64) -> Streaming<v1::WatchJobResponse> {
        let request = v1::WatchJobRequest { job_id: job_id.into(), after_sequence: after };
        patient(self.client().watch_job(request)).await.expect("it is watched").into_inner()
    }

    /// Follows a job to its end and returns the last state.
    pub(crate) async fn finished(&self, job_id: &str) -> v1::Job {
        let events = collect(self.watch(job_id, 0).await).await;
        match events.into_iter().next_back().and_then(|event| event.event) {
            Some(Event::Job(job)) => job,
            other => panic!("the last event is {other:?}"),
        }
    }

    pub(crate) async fn image(
        &self,
        job_id: &str,
        index: u32,
    ) -> Result<v1::GetImageResponse, Status> {
        let request = v1::GetImageRequest { job_id: job_id.into(), index };
        Ok(patient(self.client().get_image(request)).await?.into_inner())
    }

    pub(crate) async fn record(&self, record_id: &str) -> Result<v1::SafetyRecord, Status> {
        let request = v1::GetRecordRequest { record_id: record_id.into(), ..Default::default() };
        let response = patient(self.client().get_record(request)).await?.into_inner();
        Ok(response.record.expect("a record"))
    }
}

/// All events of a stream that ends.
pub(crate) async fn collect(
    mut stream: Streaming<v1::WatchJobResponse>,
) -> Vec<v1::WatchJobResponse> {
    let mut events = Vec::new();
    while let Some(event) = patient(stream.message()).await.expect("a healthy stream") {
        events.push(event);
    }
    events
}

pub(crate) fn spec(n: u32) -> JobSpec {
    JobSpec { prompt: "a cat".into(), n, seed: Some(7), ..Default::default() }
}

pub(crate) fn statuses(job: &v1::Job) -> Vec<v1::ImageStatus> {
    job.images.iter().map(v1::ImageInfo::status).collect()
}

/// Asserts a refusal with `code` whose message holds `part`.
pub(crate) fn assert_status(result: Result<impl std::fmt::Debug, Status>, code: Code, part: &str) {
    let status = result.expect_err(part);
    assert_eq!(status.code(), code, "{status}");
    assert!(status.message().contains(part), "{status}");
}

pub(crate) fn assert_failed_naming(job: &v1::Job, parts: &[&str]) {
    assert_eq!(job.state(), JobState::Failed, "{job:?}");
    for part in parts {
        assert!(job.reason.contains(part), "`{part}` is not in: {}", job.reason);
    }
    assert!(statuses(job).iter().all(|status| *status == v1::ImageStatus::Failed), "{job:?}");
}
