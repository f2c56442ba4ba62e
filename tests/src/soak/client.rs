//! A client that outlives what happens to the cluster: calls that fail are made again, at whichever
//! coordinator answers.

use std::{collections::HashSet, future::Future, sync::Arc, time::Duration};

use anyhow::Result;
use fairlead_common::{
    grpc::{self, Replicas},
    tls::Tls,
};
use fairlead_proto::{
    MAX_MESSAGE_BYTES,
    v1::{
        CancelJobRequest, Job, JobSpec, JobState, ListJobsRequest, SubmitJobRequest,
        WatchJobRequest, generation_service_client::GenerationServiceClient,
        watch_job_response::Event,
    },
};
use tokio::time::{Instant, sleep, timeout};
use tonic::{Code, Response, Status};

use super::ledger::{Breach, Ledger};

/// How long anything may take that the faults only delay: they last for seconds.
pub(super) const LIMIT: Duration = Duration::from_secs(180);
/// Longest wait for one answer, e.g. of a coordinator that is frozen.
const ANSWER: Duration = Duration::from_secs(5);
/// Longest silence of a watched job before another coordinator is asked.
const QUIET: Duration = Duration::from_secs(20);
const PAUSE: Duration = Duration::from_millis(50);
const PAGE: u32 = 500;

pub(super) type Rpc = GenerationServiceClient<Replicas>;

/// Clones share their connections.
#[derive(Clone)]
pub(super) struct Client {
    rpc: Rpc,
    ledger: Arc<Ledger>,
}

impl Client {
    pub(super) fn new(addresses: &str, ledger: Arc<Ledger>) -> Result<Self> {
        let replicas = grpc::replicas(addresses, ANSWER, &Tls::default())?;
        let rpc = Rpc::new(replicas).max_decoding_message_size(MAX_MESSAGE_BYTES);
        Ok(Self { rpc, ledger })
    }

    /// Makes a call until it has an answer that more patience would not change.
    pub(super) async fn call<T, F>(&self, call: impl Fn(Rpc) -> F) -> Result<T, Status>
    where
        F: Future<Output = Result<Response<T>, Status>>,
    {
        let end = Instant::now() + LIMIT;
        loop {
            match call(self.rpc.clone()).await {
                Ok(answer) => return Ok(answer.into_inner()),
                Err(status) if passes(&status) && Instant::now() < end => {
                    self.ledger.error(status.code());
                    sleep(PAUSE).await;
                }
                Err(status) => return Err(status),
            }
        }
    }

    /// Submits a request under `key`.
    pub(super) async fn submit(&self, spec: &JobSpec, key: &str) -> Result<Job, Status> {
        let request = SubmitJobRequest { spec: Some(spec.clone()), idempotency_key: key.into() };
        let answer = self.call(|mut rpc| {
            let request = request.clone();
            async move { rpc.submit_job(request).await }
        });
        let job = answer.await?.job.unwrap_or_default();
        self.ledger.accepted(&job.job_id);
        Ok(job)
    }

    pub(super) async fn cancel(&self, job_id: &str) -> Result<(), Status> {
        let request = CancelJobRequest { job_id: job_id.to_owned() };
        let answer = self.call(|mut rpc| {
            let request = request.clone();
            async move { rpc.cancel_job(request).await }
        });
        answer.await.map(drop)
    }

    /// Watches a job to its end. Its events must come once each, however often the watch breaks; `None`
    /// if there is no end.
    pub(super) async fn follow(&self, job: &Job) -> Option<Job> {
        let mut watch = Watch { images: vec![0; job.images.len()], ..Watch::default() };
        let ended = async {
            loop {
                match watch.follow(self, &job.job_id).await {
                    Ok(Some(job)) => return Ok(job),
                    Ok(None) => {}
                    Err(status) if passes(&status) => self.ledger.error(status.code()),
                    Err(status) => return Err(status),
                }
                sleep(PAUSE).await;
            }
        };
        let problem = match timeout(LIMIT, ended).await {
            Ok(Ok(job)) => {
                watch.settle(&job, &self.ledger);
                return Some(job);
            }
            Ok(Err(status)) => status.to_string(),
            Err(_) => format!("no end within {LIMIT:?}"),
        };
        self.ledger.breach(Breach::Lost, format!("job {}: {problem}", job.job_id));
        None
    }

    /// The ids of all jobs there are.
    pub(super) async fn jobs(&self) -> Result<HashSet<String>, Status> {
        let mut all = HashSet::new();
        let mut request = ListJobsRequest { page_size: PAGE, page_token: String::new() };
        loop {
            let page = self.call(|mut rpc| {
                let request = request.clone();
                async move { rpc.list_jobs(request).await }
            });
            let page = page.await?;
            all.extend(page.jobs.into_iter().map(|job| job.job_id));
            if page.next_page_token.is_empty() {
                return Ok(all);
            }
            request.page_token = page.next_page_token;
        }
    }
}

/// Whether the same call may go better in a moment.
fn passes(status: &Status) -> bool {
    matches!(
        status.code(),
        Code::Unavailable
            | Code::DeadlineExceeded
            | Code::Cancelled
            | Code::Unknown
            | Code::Internal
            | Code::ResourceExhausted
    )
}

/// How far a job's events were read.
#[derive(Default)]
struct Watch {
    after: u64,
    /// Ends of each image.
    images: Vec<u32>,
    /// Events that came again.
    repeated: u32,
}

impl Watch {
    /// Reads on until the job ends, or the watch does.
    async fn follow(&mut self, client: &Client, job_id: &str) -> Result<Option<Job>, Status> {
        let request = WatchJobRequest { job_id: job_id.to_owned(), after_sequence: self.after };
        let mut events = client.rpc.clone().watch_job(request).await?.into_inner();
        loop {
            let Ok(event) = timeout(QUIET, events.message()).await else { return Ok(None) };
            let Some(response) = event? else { return Ok(None) };
            let Some(event) = response.event else { continue };
            if matches!(event, Event::Progress(_)) {
                continue;
            }
            self.repeated += u32::from(response.sequence <= self.after);
            self.after = self.after.max(response.sequence);
            match event {
                Event::Image(image) => {
                    if let Some(ends) = self.images.get_mut(image.index as usize) {
                        *ends += 1;
                    }
                }
                Event::Job(job) if has_ended(&job) => return Ok(Some(job)),
                Event::Job(_) | Event::Progress(_) => {}
            }
        }
    }

    /// Each image must have ended once.
    fn settle(&self, job: &Job, ledger: &Ledger) {
        let more = self.repeated > 0 || self.images.iter().any(|ends| *ends > 1);
        let fewer = self.images.contains(&0);
        let message = || {
            format!(
                "job {}: ends of its images {:?}, {} repeated",
                job.job_id, self.images, self.repeated
            )
        };
        if more {
            ledger.breach(Breach::Duplicated, message());
        }
        if fewer {
            ledger.breach(Breach::Lost, message());
        }
    }
}

fn has_ended(job: &Job) -> bool {
    matches!(job.state(), JobState::Completed | JobState::Failed | JobState::Cancelled)
}
