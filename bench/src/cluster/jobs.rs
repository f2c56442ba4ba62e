//! Jobs as a client submits and follows them.

use anyhow::{Context, Result, bail};
use fairlead_common::record;
use fairlead_proto::MAX_MESSAGE_BYTES;
use fairlead_proto::v1::{
    GetRecordRequest, Job, JobSpec, JobState, ListConceptsRequest, ListModelsRequest,
    SubmitJobRequest, WatchJobRequest, catalog_service_client::CatalogServiceClient,
    generation_service_client::GenerationServiceClient, watch_job_response::Event,
};
use tonic::transport::Channel;

use super::service::PATIENCE;

pub(crate) type Generation = GenerationServiceClient<Channel>;

/// A prompt that opens no gate.
pub(crate) const BENIGN: &str = "a penguin on a blue background";
/// A prompt that does.
pub(crate) const TARGET: &str = "a kitchen knife";

/// A client on `channel`.
pub(crate) fn client(channel: Channel) -> Generation {
    GenerationServiceClient::new(channel).max_decoding_message_size(MAX_MESSAGE_BYTES)
}

/// `n` images of `prompt` under `policy`, at most `shard` of them in a shard.
pub(crate) fn spec(policy: &str, prompt: &str, n: u32, shard: u32) -> JobSpec {
    JobSpec {
        prompt: prompt.to_owned(),
        policy: policy.to_owned(),
        n,
        max_shard_size: shard,
        seed: Some(11),
        ..Default::default()
    }
}

/// Submits a job.
pub(crate) async fn submit(client: &Generation, spec: JobSpec) -> Result<Job> {
    let request = SubmitJobRequest { spec: Some(spec), idempotency_key: String::new() };
    client.clone().submit_job(request).await?.into_inner().job.context("no job")
}

/// Submits a job and waits until it is completed.
pub(crate) async fn finished(client: &Generation, spec: JobSpec) -> Result<Job> {
    let job = submit(client, spec).await?;
    let request = WatchJobRequest { job_id: job.job_id, after_sequence: 0 };
    let mut events = client.clone().watch_job(request).await?.into_inner();
    let end = async {
        while let Some(response) = events.message().await? {
            match response.event {
                Some(Event::Job(job)) if job.state() == JobState::Completed => return Ok(job),
                Some(Event::Job(job)) if job.state() == JobState::Failed => {
                    bail!("the job failed: {}", job.reason)
                }
                _ => {}
            }
        }
        bail!("the watch ended before the job")
    };
    tokio::time::timeout(PATIENCE, end).await.context("the job did not end")?
}

/// Milliseconds of the engine for one image of a completed job.
pub(crate) async fn engine_ms(client: &Generation, job: &Job) -> Result<f64> {
    let mut total = 0;
    for image in &job.images {
        let record_id = image.record_id.clone();
        let request = GetRecordRequest { record_id, ..Default::default() };
        let record = client.clone().get_record(request).await?.into_inner().record;
        let record = record.with_context(|| format!("no record of {}", job.job_id))?;
        total += record::reported(&record).engine_ms;
    }
    Ok(total as f64 / job.images.len() as f64)
}

/// Waits until so many workers are attached in all, and until concepts are served if `served`.
pub(crate) async fn ready(channel: &Channel, workers: u32, served: bool) -> Result<()> {
    let catalog = CatalogServiceClient::new(channel.clone());
    let attached = async {
        loop {
            let models = catalog.clone().list_models(ListModelsRequest {}).await?.into_inner();
            let concepts = catalog.clone().list_concepts(ListConceptsRequest {}).await?;
            let attached: u32 = models.models.iter().map(|model| model.workers).sum();
            if attached == workers && (!served || !concepts.into_inner().concepts.is_empty()) {
                return Ok(());
            }
            tokio::time::sleep(std::time::Duration::from_millis(20)).await;
        }
    };
    tokio::time::timeout(PATIENCE, attached).await.context("the cluster did not become ready")?
}
