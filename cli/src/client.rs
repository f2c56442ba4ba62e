//! The client's side of `GenerationService` and `CatalogService`.

use std::{
    error::Error as _,
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail};
use fairlead_common::{
    backoff::Backoff,
    grpc::{self, Replicas},
    trace,
};
use fairlead_proto::{
    MAX_MESSAGE_BYTES,
    v1::{
        CancelJobRequest, ConceptDefinition, ConceptRef, DeployConceptsRequest, Deployment,
        GetImageRequest, GetJobRequest, GetRecordRequest, ImageInfo, ImageStatus, Job, JobSpec,
        JobState, ListConceptsRequest, ListModelsRequest, ModelInfo, RetireConceptRequest,
        RetireConceptResponse, SafetyRecord, ServedConcept, StepProgress, SubmitJobRequest,
        WatchJobRequest, catalog_service_client::CatalogServiceClient,
        generation_service_client::GenerationServiceClient, watch_job_response::Event,
    },
};
use tokio_util::sync::CancellationToken;
use tonic::{Code, Request, Response, Status, service::interceptor::InterceptedService};
use tonic_types::StatusExt;
use tracing::Span;

use crate::credentials::{Credentials, Key};

/// How long a coordinator that was reached before may be away: a restart, or a failover of its store.
const AWAY: Duration = Duration::from_secs(60);
/// How long one that was never reached is waited for: it may be starting.
const ABSENT: Duration = Duration::from_secs(3);

/// A watch that was open for so long was a good one.
const SOUND: Duration = Duration::from_secs(5);

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

type Keyed = InterceptedService<Replicas, Key>;

/// A connection to the coordinators of a cluster. A call that none of them can answer now is repeated
/// for a while.
#[derive(Clone)]
pub(crate) struct Client {
    address: String,
    coordinators: Replicas,
    /// How long one that was reached may be away.
    away: Duration,
    was_reached: Arc<AtomicBool>,
    generation: GenerationServiceClient<Keyed>,
    catalog: CatalogServiceClient<Keyed>,
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
    /// Connects lazily to `address`, "http://host:port", or to one of several separated by commas.
    pub(crate) fn new(address: &str, credentials: Credentials) -> Result<Self> {
        Self::with_patience(address, credentials, grpc::REQUEST_TIMEOUT, AWAY)
    }

    fn with_patience(
        address: &str,
        credentials: Credentials,
        deadline: Duration,
        away: Duration,
    ) -> Result<Self> {
        let Credentials { key, tls } = credentials;
        let coordinators = grpc::replicas(address, deadline, &tls)?;
        let channel = InterceptedService::new(coordinators.clone(), key);
        Ok(Self {
            address: address.to_owned(),
            coordinators,
            away,
            was_reached: Arc::default(),
            generation: GenerationServiceClient::new(channel.clone())
                .max_decoding_message_size(MAX_MESSAGE_BYTES)
                .max_encoding_message_size(MAX_MESSAGE_BYTES),
            catalog: CatalogServiceClient::new(channel)
                .max_decoding_message_size(MAX_MESSAGE_BYTES),
        })
    }

    pub(crate) async fn models(&self) -> Result<Vec<ModelInfo>> {
        let mut catalog = self.catalog.clone();
        let list = async move || catalog.list_models(ListModelsRequest {}).await;
        Ok(self.call(list).await?.models)
    }

    pub(crate) async fn concepts(&self) -> Result<Vec<ServedConcept>> {
        Ok(self.concepts_and_absent().await?.0)
    }

    /// Served concepts, and those that were served once and are required still.
    pub(crate) async fn concepts_and_absent(
        &self,
    ) -> Result<(Vec<ServedConcept>, Vec<ConceptRef>)> {
        let mut catalog = self.catalog.clone();
        let list = async move || catalog.list_concepts(ListConceptsRequest {}).await;
        let reply = self.call(list).await?;
        Ok((reply.concepts, reply.absent))
    }

    /// Forgets a concept that no node serves and returns the energies that it was known from, if that is
    /// told: the answer may get lost.
    pub(crate) async fn retire(&self, concept: &str) -> Result<Vec<String>> {
        let mut catalog = self.catalog.clone();
        let request = RetireConceptRequest { concept: concept.to_owned() };
        let mut is_repeated = false;
        let retire = async move || match catalog.retire_concept(request.clone()).await {
            Err(status) if is_repeated && status.code() == Code::NotFound => {
                Ok(Response::new(RetireConceptResponse::default()))
            }
            answer => {
                is_repeated = true;
                answer
            }
        };
        Ok(self.call(retire).await?.energies)
    }

    /// Has energy nodes serve further concepts: those of the given names, or all. May be repeated.
    pub(crate) async fn deploy(
        &self,
        concepts: Vec<ConceptDefinition>,
        node_ids: Vec<String>,
        allow_uncalibrated: bool,
    ) -> Result<Vec<Deployment>> {
        let mut catalog = self.catalog.clone();
        let request = DeployConceptsRequest { concepts, node_ids, allow_uncalibrated };
        let deploy = async move || catalog.deploy_concepts(request.clone()).await;
        Ok(self.call(deploy).await?.deployments)
    }

    pub(crate) async fn submit(&self, spec: JobSpec) -> Result<Job> {
        // With a key, a repeated call finds the job that the first one made.
        let idempotency_key = uuid::Uuid::new_v4().to_string();
        let submission = SubmitJobRequest { spec: Some(spec), idempotency_key };
        let mut generation = self.generation.clone();
        let submit = async move || {
            let mut request = Request::new(submission.clone());
            trace::send(&Span::current(), "", request.metadata_mut());
            generation.submit_job(request).await
        };
        self.call(submit).await?.job.context("an answer without a job")
    }

    pub(crate) async fn job(&self, job_id: &str) -> Result<Job> {
        let mut generation = self.generation.clone();
        let request = GetJobRequest { job_id: job_id.to_owned() };
        let get = async move || generation.get_job(request.clone()).await;
        self.call(get).await?.job.context("an answer without a job")
    }

    pub(crate) async fn cancel(&self, job_id: &str) -> Result<Job> {
        let mut generation = self.generation.clone();
        let request = CancelJobRequest { job_id: job_id.to_owned() };
        let cancel = async move || generation.cancel_job(request.clone()).await;
        self.call(cancel).await?.job.context("an answer without a job")
    }

    pub(crate) async fn record(&self, record_id: &str) -> Result<SafetyRecord> {
        let mut generation = self.generation.clone();
        let request =
            GetRecordRequest { record_id: record_id.to_owned(), job_id: String::new(), index: 0 };
        let get = async move || generation.get_record(request.clone()).await;
        self.call(get).await?.record.context("an answer without a record")
    }

    async fn png(&self, job_id: &str, index: u32) -> Result<Vec<u8>> {
        let mut generation = self.generation.clone();
        let request = GetImageRequest { job_id: job_id.to_owned(), index };
        let get = async move || generation.get_image(request.clone()).await;
        Ok(self.call(get).await?.png)
    }

    /// Calls until there is an answer or an error that stays.
    async fn call<T>(
        &self,
        mut call: impl AsyncFnMut() -> Result<Response<T>, Status>,
    ) -> Result<T> {
        let mut trouble = Trouble::new(&self.coordinators);
        loop {
            let began = Instant::now();
            match call().await {
                Ok(reply) => {
                    self.was_reached.store(true, Ordering::Relaxed);
                    return Ok(reply.into_inner());
                }
                Err(status) => self.wait(&mut trouble, began, status).await?,
            }
        }
    }

    /// Waits before a repetition of what failed and `began` then; the error is one that stays, or has stayed
    /// for too long.
    async fn wait(&self, trouble: &mut Trouble, began: Instant, status: Status) -> Result<()> {
        // Only what may be repeated says when: a queue that is full, a rate that is exceeded.
        let hint = status.get_details_retry_info().and_then(|info| info.retry_delay);
        if hint.is_some() {
            // Who says when to come back is there.
            self.was_reached.store(true, Ordering::Relaxed);
        }
        let transient = hint.is_some() || is_transient(status.code());
        let patience = match self.was_reached.load(Ordering::Relaxed) {
            true => self.away,
            false => ABSENT,
        };
        let delay = trouble.backoff.next_delay().max(hint.unwrap_or_default());
        let lasts = trouble.since.get_or_insert(began).elapsed() + hint.unwrap_or_default();
        // One that is frozen costs a whole deadline; the others are asked nevertheless.
        let moves = self.coordinators.moves().wrapping_sub(trouble.moves_before);
        let is_answer = status.source().is_none();
        let is_late = (is_answer || moves >= self.coordinators.count()) && lasts >= patience;
        if !transient || is_late {
            let what = match is_answer {
                true => "",
                false if is_refused(&status) => " cannot be reached (does it run there?)",
                false => " cannot be reached",
            };
            return Err(status)
                .with_context(|| format!("the coordinator at {}{what}", self.address));
        }
        tokio::time::sleep(delay).await;
        Ok(())
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
        let mut trouble = Trouble::new(&self.coordinators);
        let mut cancelled = false;
        loop {
            let request = WatchJobRequest { job_id: job.job_id.clone(), after_sequence };
            let (began, moves) = (Instant::now(), self.coordinators.moves());
            let mut events = match self.generation.clone().watch_job(request).await {
                Ok(reply) => {
                    self.was_reached.store(true, Ordering::Relaxed);
                    reply.into_inner()
                }
                Err(status) => {
                    self.wait(&mut trouble, began, status).await?;
                    continue;
                }
            };
            let opened = Instant::now();
            let broken = loop {
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
                        trouble = Trouble::new(&self.coordinators);
                        after_sequence = after_sequence.max(response.sequence);
                        match response.event {
                            Some(Event::Progress(step)) => on_step(&step),
                            Some(Event::Job(job)) if is_terminal(&job) => return Ok(job),
                            Some(Event::Job(_) | Event::Image(_)) | None => {}
                        }
                    }
                    Ok(None) => break Status::unavailable("the watch ended"),
                    Err(status) => break status,
                }
            };
            // Of a job that waits nothing is heard.
            if opened.elapsed() >= SOUND {
                trouble = Trouble::new(&self.coordinators);
            }
            self.coordinators.leave(moves);
            self.wait(&mut trouble, Instant::now(), broken).await?;
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
}

/// Calls in a row that failed.
struct Trouble {
    /// When the first of them began.
    since: Option<Instant>,
    moves_before: usize,
    backoff: Backoff,
}

impl Trouble {
    /// None yet.
    fn new(coordinators: &Replicas) -> Self {
        let backoff = Backoff::new(Duration::from_millis(100), Duration::from_secs(2));
        Self { since: None, moves_before: coordinators.moves(), backoff }
    }
}

/// Whether the same call may go better in a moment, perhaps at another coordinator. A deadline that passes
/// here is CANCELLED.
fn is_transient(code: Code) -> bool {
    use Code::{Aborted, Cancelled, DeadlineExceeded, Unavailable, Unknown};
    matches!(code, Unavailable | Unknown | Aborted | Cancelled | DeadlineExceeded)
}

/// Whether nobody listens at the address.
fn is_refused(status: &Status) -> bool {
    let causes = std::iter::successors(status.source(), |&error| error.source());
    let mut io = causes.filter_map(|error| error.downcast_ref::<std::io::Error>());
    io.any(|error| error.kind() == std::io::ErrorKind::ConnectionRefused)
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

#[cfg(test)]
mod tests;
