//! A sandbox: services that a test starts, kills one by one, and asks as a client.

use std::{path::Path, time::Duration};

use anyhow::{Context, Result, bail, ensure};
use fairlead_common::{
    grpc::{self, Replicas},
    testing::{METRICS, RedisServer},
    tls::Tls,
};
use fairlead_proto::{
    MAX_MESSAGE_BYTES,
    v1::{
        GetImageRequest, Job, JobSpec, JobState, ListConceptsRequest, ListModelsRequest,
        StepProgress, SubmitJobRequest, WatchJobRequest, WatchJobResponse,
        catalog_service_client::CatalogServiceClient,
        generation_service_client::GenerationServiceClient, watch_job_response::Event,
    },
};
use tokio::{process::Command, time::timeout};
use tonic::{Code, Streaming};

use crate::{
    PATIENCE, asset, command,
    process::{LISTENING, Process},
};

const POLL: Duration = Duration::from_millis(25);

/// Running services and a client of their coordinators.
pub struct Sandbox {
    // Before the folder that its data are in.
    redis: Option<RedisServer>,
    folder: tempfile::TempDir,
    processes: Vec<Process>,
    address: String,
    /// Further arguments of every service.
    observed: Vec<String>,
    /// Where services show their metrics, by name.
    metrics: Vec<(String, String)>,
}

impl Sandbox {
    /// Starts a coordinator with `policies` (TOML) and further `arguments`.
    pub async fn with_policies(policies: &str, arguments: &[&str]) -> Result<Self> {
        Self::start(policies, arguments, Vec::new()).await
    }

    async fn start(policies: &str, arguments: &[&str], observed: Vec<String>) -> Result<Self> {
        let mut sandbox = Self::empty(observed)?;
        let file = sandbox.folder().join("policies.toml");
        std::fs::write(&file, policies)?;
        let mut coordinator = command();
        coordinator
            .args(["coordinator", "--listen", "127.0.0.1:0", "--data-dir"])
            .arg(sandbox.folder().join("data"))
            .arg("--policies")
            .arg(file)
            .args(arguments);
        sandbox.address = sandbox.spawn("coordinator", coordinator, LISTENING).await?;
        Ok(sandbox)
    }

    /// Coordinators of the given names over one Redis, with the embedded policies and leases of two
    /// seconds.
    pub async fn shared(names: &[&str]) -> Result<Self> {
        let mut sandbox = Self::empty(Vec::new())?;
        let dir = sandbox.folder().join("redis");
        std::fs::create_dir(&dir)?;
        sandbox.redis = Some(RedisServer::start(&dir));
        for name in names {
            let address = sandbox.sharing_coordinator(name).await?;
            sandbox.address = match sandbox.address.is_empty() {
                true => address,
                false => format!("{},{address}", sandbox.address),
            };
        }
        Ok(sandbox)
    }

    /// Starts one more coordinator on the sandbox's Redis and returns its address.
    pub async fn sharing_coordinator(&mut self, name: &str) -> Result<String> {
        let mut coordinator = command();
        coordinator
            .args(["coordinator", "--listen", "127.0.0.1:0", "--data-dir"])
            .arg(self.folder().join("data"))
            .args(["--redis", &self.redis().url(), "--policies"])
            .arg(asset("policies.toml"))
            .args(["--lease-ttl", "2s", "--node-ttl", "2s", "--retry-delay", "100ms"]);
        self.spawn(name, coordinator, LISTENING).await
    }

    /// The Redis of coordinators that share one.
    pub fn redis(&self) -> &RedisServer {
        self.redis.as_ref().expect("the coordinators share a Redis")
    }

    /// As [`Sandbox::redis`], to kill and start it.
    pub fn redis_mut(&mut self) -> &mut RedisServer {
        self.redis.as_mut().expect("the coordinators share a Redis")
    }

    /// No process yet.
    pub fn empty(observed: Vec<String>) -> Result<Self> {
        Ok(Self {
            redis: None,
            folder: tempfile::tempdir()?,
            processes: Vec::new(),
            address: String::new(),
            observed,
            metrics: Vec::new(),
        })
    }

    /// `fairlead up` with its data in `data`, as the one process "up".
    pub async fn up(data: &Path) -> Result<Self> {
        let mut sandbox = Self::empty(Vec::new())?;
        let mut up = command();
        up.args(["up", "--listen", "127.0.0.1:0", "--data-dir"])
            .arg(data)
            .env("FAIRLEAD_ASSETS", asset(""));
        sandbox.address = sandbox.spawn("up", up, "cluster ready at ").await?;
        Ok(sandbox)
    }

    /// As [`Sandbox::emojiland`], with traces sent to the OTLP receiver at `otlp` and metrics shown.
    pub async fn emojiland_observed(otlp: &str) -> Result<Self> {
        let observed = ["--otlp", otlp, "--metrics-listen", "127.0.0.1:0"];
        Self::emojiland_with(observed.map(str::to_owned).to_vec()).await
    }

    /// A coordinator with the embedded policies, an energy node "energy" and a worker "worker".
    pub async fn emojiland() -> Result<Self> {
        Self::emojiland_with(Vec::new()).await
    }

    async fn emojiland_with(observed: Vec<String>) -> Result<Self> {
        let policies = std::fs::read_to_string(asset("policies.toml"))?;
        let mut sandbox = Self::start(&policies, &[], observed).await?;
        sandbox.energy("energy").await?;
        sandbox.worker("worker").await?;
        sandbox.ready().await?;
        Ok(sandbox)
    }

    /// Starts an energy node with the embedded model and concepts.
    pub async fn energy(&mut self, name: &str) -> Result<()> {
        let mut energy = command();
        energy
            .args(["energy", "--listen", "127.0.0.1:0", "--node-id", name])
            .args(["--coordinator", &self.address])
            .arg("--model")
            .arg(asset("emojiland-clip"))
            .arg("--concepts")
            .arg(asset("concepts"))
            .arg("--calibrations")
            .arg(asset("calibrations"));
        self.spawn(name, energy, LISTENING).await.map(drop)
    }

    /// Starts a worker with the embedded generator.
    pub async fn worker(&mut self, name: &str) -> Result<()> {
        let address = self.address.clone();
        self.worker_at(name, &address, &[]).await
    }

    /// The same with further `arguments`, attached to the coordinators at `address`.
    pub async fn worker_at(&mut self, name: &str, address: &str, arguments: &[&str]) -> Result<()> {
        let mut worker = command();
        worker
            .args(["worker", "--worker-id", name, "--coordinator", address])
            .arg("--model")
            .arg(asset("emojiland-sd"))
            .args(arguments);
        if !self.observed.is_empty() {
            return self.spawn(name, worker, METRICS).await.map(drop);
        }
        self.processes.push(Process::start(name, worker)?);
        Ok(())
    }

    /// Where each observed service shows its metrics, by name.
    pub fn metrics(&self) -> &[(String, String)] {
        &self.metrics
    }

    /// Waits until a generator is attached and concepts are served.
    pub async fn ready(&mut self) -> Result<()> {
        let catalog = CatalogServiceClient::new(self.channel()?);
        let attached = async {
            loop {
                let models = catalog.clone().list_models(ListModelsRequest {}).await;
                let concepts = catalog.clone().list_concepts(ListConceptsRequest {}).await;
                if let (Ok(models), Ok(concepts)) = (models, concepts)
                    && !models.into_inner().models.is_empty()
                    && !concepts.into_inner().concepts.is_empty()
                {
                    return;
                }
                tokio::time::sleep(POLL).await;
            }
        };
        timeout(PATIENCE, attached).await.context("the cluster did not become ready")
    }

    /// Waits until so many nodes serve every concept.
    pub async fn served_by(&self, nodes: usize) -> Result<()> {
        let catalog = CatalogServiceClient::new(self.channel()?);
        let served = async {
            loop {
                let answer = catalog.clone().list_concepts(ListConceptsRequest {}).await?;
                if answer.into_inner().concepts.iter().all(|served| served.nodes.len() == nodes) {
                    return Ok(());
                }
                tokio::time::sleep(POLL).await;
            }
        };
        timeout(PATIENCE, served).await.context("the nodes did not register")?
    }

    /// Kills a process with SIGKILL and waits for its end.
    pub async fn kill(&mut self, name: &str) -> Result<()> {
        self.take(name)?.kill().await
    }

    /// Sends a process a signal: STOP, CONT, TERM.
    pub async fn signal(&self, name: &str, signal: &str) -> Result<()> {
        self.process(name)?.signal(signal).await
    }

    /// A process.
    pub fn process(&self, name: &str) -> Result<&Process> {
        let process = self.processes.iter().find(|process| process.name() == name);
        process.with_context(|| format!("no process `{name}`"))
    }

    /// Takes a process out, for who wants to see its end.
    pub fn take(&mut self, name: &str) -> Result<Process> {
        let position = self.processes.iter().position(|process| process.name() == name);
        Ok(self.processes.remove(position.with_context(|| format!("no process `{name}`"))?))
    }

    /// Address of the coordinator, or of all that there were at the start, separated by commas.
    pub fn address(&self) -> &str {
        &self.address
    }

    /// A folder that lives as long as the sandbox.
    pub fn folder(&self) -> &Path {
        self.folder.path()
    }

    /// A client of the coordinators.
    pub fn client(&self) -> Result<GenerationServiceClient<Replicas>> {
        Ok(GenerationServiceClient::new(self.channel()?)
            .max_decoding_message_size(MAX_MESSAGE_BYTES))
    }

    /// Submits `spec`.
    pub async fn submit(&self, spec: JobSpec) -> Result<Job, tonic::Status> {
        let request = SubmitJobRequest { spec: Some(spec), idempotency_key: String::new() };
        let client = self.client().map_err(|error| tonic::Status::internal(error.to_string()))?;
        let reply = client.clone().submit_job(request).await?.into_inner();
        reply.job.ok_or_else(|| tonic::Status::internal("an answer without a job"))
    }

    /// The job's events from the first on.
    pub async fn watch(&self, job: &Job) -> Result<Streaming<WatchJobResponse>> {
        let request = WatchJobRequest { job_id: job.job_id.clone(), after_sequence: 0 };
        Ok(self.client()?.watch_job(request).await?.into_inner())
    }

    /// Waits for a step of the job that satisfies `wanted`.
    pub async fn until_step(
        &self,
        job: &Job,
        wanted: impl Fn(&StepProgress) -> bool,
    ) -> Result<()> {
        let is_wanted = |event: &Event| matches!(event, Event::Progress(step) if wanted(step));
        self.until_event(job, "such a step", is_wanted).await
    }

    /// Waits until a worker holds a shard of the job.
    pub async fn until_running(&self, job: &Job) -> Result<()> {
        let runs =
            |event: &Event| matches!(event, Event::Job(job) if job.state() == JobState::Running);
        self.until_event(job, "it ran", runs).await
    }

    async fn until_event(
        &self,
        job: &Job,
        what: &str,
        wanted: impl Fn(&Event) -> bool,
    ) -> Result<()> {
        let mut events = self.watch(job).await?;
        let came = async {
            while let Some(response) = events.message().await? {
                if response.event.as_ref().is_some_and(&wanted) {
                    return Ok(());
                }
            }
            bail!("the job ended before {what}")
        };
        timeout(PATIENCE, came).await.with_context(|| format!("waited too long for: {what}"))?
    }

    /// Waits for the job's end.
    pub async fn finish(&self, job: &Job) -> Result<Job> {
        let end = async {
            loop {
                match self.followed(job).await {
                    Ok(Some(job)) => return job,
                    // A coordinator that is killed ends its watches; another takes over.
                    Ok(None) => tokio::time::sleep(POLL).await,
                    Err(error) if self.redis.is_some() => {
                        eprintln!("watching again: {error:#}");
                        tokio::time::sleep(POLL).await;
                    }
                    Err(error) => panic!("{error:#}"),
                }
            }
        };
        timeout(PATIENCE, end).await.context("the job did not end")
    }

    /// Follows a job until it or the watch ends.
    async fn followed(&self, job: &Job) -> Result<Option<Job>> {
        let mut events = self.watch(job).await?;
        while let Some(response) = events.message().await? {
            if let Some(Event::Job(job)) = response.event
                && !matches!(job.state(), JobState::Queued | JobState::Running)
            {
                return Ok(Some(job));
            }
        }
        ensure!(self.redis.is_some(), "the watch ended before the job");
        Ok(None)
    }

    /// Submits `spec`, waits for COMPLETED and returns the released PNGs.
    pub async fn images(&self, spec: JobSpec) -> Result<(Job, Vec<Vec<u8>>)> {
        let job = self.finish(&self.submit(spec).await?).await?;
        ensure!(job.state() == JobState::Completed, "{:?}: {}", job.state(), job.reason);
        let mut pngs = Vec::new();
        for image in &job.images {
            pngs.push(self.png(&job.job_id, image.index).await?);
        }
        Ok((job, pngs))
    }

    /// Fetches one released image.
    pub async fn png(&self, job_id: &str, index: u32) -> Result<Vec<u8>, tonic::Status> {
        let mut client =
            self.client().map_err(|error| tonic::Status::internal(error.to_string()))?;
        loop {
            let request = GetImageRequest { job_id: job_id.to_owned(), index };
            match client.get_image(request).await {
                // It may be a coordinator that was killed: another one is next.
                Err(status) if self.redis.is_some() && status.code() == Code::Unavailable => {
                    tokio::time::sleep(POLL).await;
                }
                answer => return Ok(answer?.into_inner().png),
            }
        }
    }

    /// Connections to the coordinators.
    pub fn channel(&self) -> Result<Replicas> {
        Ok(grpc::replicas(&self.address, PATIENCE, &Tls::default())?)
    }

    /// Starts a service and reads the address it prints after `words`, and before it perhaps that of
    /// its metrics.
    pub async fn spawn(&mut self, name: &str, mut command: Command, words: &str) -> Result<String> {
        command.args(&self.observed).env("OTEL_BSP_SCHEDULE_DELAY", "50");
        let (process, said) = Process::start_saying(name, command, words).await?;
        if !said.metrics.is_empty() {
            self.metrics.push((name.to_owned(), said.metrics));
        }
        self.processes.push(process);
        Ok(said.address)
    }
}
