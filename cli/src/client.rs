//! The client's side of `GenerationService` and `CatalogService`.

use std::{path::Path, time::Duration};

use anyhow::{Context, Result, bail};
use fairlead_common::{grpc, trace};
use fairlead_proto::{
    MAX_MESSAGE_BYTES,
    v1::{
        CancelJobRequest, GetImageRequest, GetRecordRequest, ImageInfo, ImageStatus, Job, JobSpec,
        JobState, ListConceptsRequest, ListModelsRequest, ModelInfo, SafetyRecord, ServedConcept,
        StepProgress, SubmitJobRequest, WatchJobRequest,
        catalog_service_client::CatalogServiceClient,
        generation_service_client::GenerationServiceClient, watch_job_response::Event,
    },
};
use tokio_util::sync::CancellationToken;
use tonic::{Code, Request, transport::Channel};
use tracing::Span;

/// A watch that breaks is resumed this many times in a row before it is an error.
const WATCH_RETRIES: u32 = 10;

/// Work ended early because the person asked for it, with Ctrl-C.
#[derive(Debug)]
pub(crate) struct Interrupted;

impl std::fmt::Display for Interrupted {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("interrupted")
    }
}

impl std::error::Error for Interrupted {}

/// Tells that work with a journal is not lost.
pub(crate) fn goes_on(error: anyhow::Error) -> anyhow::Error {
    match error.is::<Interrupted>() {
        true => error.context("the same command goes on where it stopped"),
        false => error,
    }
}

/// A connection to one coordinator.
#[derive(Clone)]
pub(crate) struct Client {
    address: String,
    generation: GenerationServiceClient<Channel>,
    catalog: CatalogServiceClient<Channel>,
}

/// A finished job with what was released.
pub(crate) struct Finished {
    pub(crate) job: Job,
    /// In the order of `job.images`.
    pub(crate) images: Vec<FinishedImage>,
}

/// One image of a finished job.
pub(crate) struct FinishedImage {
    pub(crate) info: ImageInfo,
    pub(crate) record: SafetyRecord,
    /// The PNG; empty if the image was withheld.
    pub(crate) png: Vec<u8>,
}

impl Client {
    /// Connects lazily to `address`, "http://host:port".
    pub(crate) fn new(address: &str) -> Result<Self> {
        let channel = grpc::channel(address, grpc::REQUEST_TIMEOUT)?;
        Ok(Self {
            address: address.to_owned(),
            generation: GenerationServiceClient::new(channel.clone())
                .max_decoding_message_size(MAX_MESSAGE_BYTES)
                .max_encoding_message_size(MAX_MESSAGE_BYTES),
            catalog: CatalogServiceClient::new(channel)
                .max_decoding_message_size(MAX_MESSAGE_BYTES),
        })
    }

    pub(crate) async fn models(&self) -> Result<Vec<ModelInfo>> {
        let reply = self.catalog.clone().list_models(ListModelsRequest {}).await;
        Ok(reply.with_context(|| self.trouble())?.into_inner().models)
    }

    pub(crate) async fn concepts(&self) -> Result<Vec<ServedConcept>> {
        let reply = self.catalog.clone().list_concepts(ListConceptsRequest {}).await;
        Ok(reply.with_context(|| self.trouble())?.into_inner().concepts)
    }

    pub(crate) async fn submit(&self, spec: JobSpec) -> Result<Job> {
        let request = SubmitJobRequest { spec: Some(spec), idempotency_key: String::new() };
        let mut request = Request::new(request);
        trace::send(&Span::current(), "", request.metadata_mut());
        let reply = self.generation.clone().submit_job(request).await;
        reply.with_context(|| self.trouble())?.into_inner().job.context("an answer without a job")
    }

    pub(crate) async fn cancel(&self, job_id: &str) -> Result<Job> {
        let request = CancelJobRequest { job_id: job_id.to_owned() };
        let reply = self.generation.clone().cancel_job(request).await;
        reply.with_context(|| self.trouble())?.into_inner().job.context("an answer without a job")
    }

    pub(crate) async fn record(&self, record_id: &str) -> Result<SafetyRecord> {
        let request =
            GetRecordRequest { record_id: record_id.to_owned(), job_id: String::new(), index: 0 };
        let reply = self.generation.clone().get_record(request).await;
        let record = reply.with_context(|| self.trouble())?.into_inner().record;
        record.context("an answer without a record")
    }

    async fn png(&self, job_id: &str, index: u32) -> Result<Vec<u8>> {
        let request = GetImageRequest { job_id: job_id.to_owned(), index };
        let reply = self.generation.clone().get_image(request).await;
        Ok(reply.with_context(|| self.trouble())?.into_inner().png)
    }

    /// Follows `job` to its end, telling `on_step` about every step. When `stop` is cancelled the
    /// *job* is cancelled, and the end awaited.
    pub(crate) async fn follow(
        &self,
        job: &Job,
        stop: &CancellationToken,
        mut on_step: impl FnMut(&StepProgress),
    ) -> Result<Job> {
        let mut after_sequence = 0;
        let mut retries = 0;
        let mut cancelled = false;
        loop {
            let request = WatchJobRequest { job_id: job.job_id.clone(), after_sequence };
            let mut events = match self.generation.clone().watch_job(request).await {
                Ok(reply) => reply.into_inner(),
                Err(status) => {
                    self.retry(&mut retries, status).await?;
                    continue;
                }
            };
            loop {
                let event = tokio::select! {
                    event = events.message() => event,
                    () = stop.cancelled(), if !cancelled => {
                        self.cancel(&job.job_id).await?;
                        cancelled = true;
                        continue;
                    }
                };
                match event {
                    Ok(Some(response)) => {
                        retries = 0;
                        after_sequence = after_sequence.max(response.sequence);
                        match response.event {
                            Some(Event::Progress(step)) => on_step(&step),
                            Some(Event::Job(job)) if is_terminal(&job) => return Ok(job),
                            Some(Event::Job(_) | Event::Image(_)) | None => {}
                        }
                    }
                    Ok(None) => {
                        self.retry(&mut retries, tonic::Status::unavailable("the watch ended"))
                            .await?;
                        break;
                    }
                    Err(status) => {
                        self.retry(&mut retries, status).await?;
                        break;
                    }
                }
            }
        }
    }

    /// Fetches everything a finished job left: records of all images, PNGs of the released.
    pub(crate) async fn collect(&self, job: Job) -> Result<Finished> {
        let mut images = Vec::with_capacity(job.images.len());
        for info in &job.images {
            let record = self.record(&info.record_id).await?;
            let png = match info.status() {
                ImageStatus::Released => self.png(&job.job_id, info.index).await?,
                _ => Vec::new(),
            };
            images.push(FinishedImage { info: info.clone(), record, png });
        }
        Ok(Finished { job, images })
    }

    /// Submits, follows and collects; anything but COMPLETED is an error, [`Interrupted`] once `stop`
    /// has cancelled the job.
    pub(crate) async fn complete(
        &self,
        spec: JobSpec,
        stop: &CancellationToken,
        on_step: impl FnMut(&StepProgress),
    ) -> Result<Finished> {
        let job = self.submit(spec).await?;
        let job = self.follow(&job, stop, on_step).await?;
        match job.state() {
            JobState::Completed => self.collect(job).await,
            JobState::Cancelled if stop.is_cancelled() => Err(Interrupted.into()),
            JobState::Cancelled => bail!("job {} was cancelled", job.job_id),
            _ => bail!("job {} failed: {}", job.job_id, job.reason),
        }
    }

    async fn retry(&self, retries: &mut u32, status: tonic::Status) -> Result<()> {
        let transient = matches!(status.code(), Code::Unavailable | Code::Unknown | Code::Aborted);
        if !transient || *retries >= WATCH_RETRIES {
            return Err(status).with_context(|| self.trouble());
        }
        *retries += 1;
        tokio::time::sleep(Duration::from_millis(100) * *retries).await;
        Ok(())
    }

    fn trouble(&self) -> String {
        format!("the coordinator at {}", self.address)
    }
}

fn is_terminal(job: &Job) -> bool {
    matches!(job.state(), JobState::Completed | JobState::Failed | JobState::Cancelled)
}

/// Writes a released image and its record as `NAME.png` and `NAME.json`. Beside the record of a
/// withheld image no picture stays, not even that of an earlier run.
pub(crate) fn save(image: &FinishedImage, folder: &Path, name: &str) -> Result<()> {
    let record = fairlead_common::record::to_json(&image.record);
    crate::output::write_file(&folder.join(format!("{name}.json")), record.as_bytes())?;
    let picture = folder.join(format!("{name}.png"));
    if !image.png.is_empty() {
        return crate::output::write_file(&picture, &image.png);
    }
    match std::fs::remove_file(&picture) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            Err(error).with_context(|| format!("cannot remove {}", picture.display()))
        }
        _ => Ok(()),
    }
}
