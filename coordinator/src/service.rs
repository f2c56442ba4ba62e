//! What the coordinator does for clients. `grpc.rs` only translates.

use std::{path::Path, sync::Arc, time::Duration};

use fairlead_common::{grpc::Channels, ids::JobId, signature::Signer, trace};
use fairlead_proto::{MAX_MESSAGE_BYTES, v1};
use prost::Message;
use sha2::{Digest, Sha256};
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;
use tonic::Status;
use tracing::Span;

use crate::{
    access::Access,
    admission::{self, Cluster, Identity},
    clock::Clock,
    config::{CoordinatorOptions, Data},
    deploy::Deployer,
    error::{Error, Result},
    events::{self, Events},
    handout::Handout,
    hub::{Hub, HubOptions},
    lease::Phase,
    metrics,
    outputs::Outputs,
    registrar::Registrar,
    registry::Registry,
    release::ReleaseGate,
    retention::Retention,
    state::JobRecord,
    store::{
        Created, Found, Full, Lookup, MemoryStore, NewJob, RedbStore, RedisStore, Store, StoreError,
    },
    tenants::Tenant,
};

/// Most characters of an idempotency key.
const MAX_KEY_CHARS: usize = 128;
/// Jobs on a page unless asked otherwise, and at most.
const DEFAULT_PAGE: u32 = 50;
const MAX_PAGE: u32 = 1_000;
/// The key that signs records, in the data directory, and what others check it with.
const SIGNING_KEY: &str = "signing-key.pem";
const PUBLIC_KEY: &str = "signing-key.pub.pem";

/// The coordinator; clones share it.
#[derive(Debug, Clone)]
pub(crate) struct Coordinator {
    store: Arc<dyn Store>,
    clock: Clock,
    outputs: Outputs,
    handout: Handout,
    registry: Registry,
    registrar: Registrar,
    deployer: Deployer,
    events: Events,
    hub: Hub,
    access: Access,
    signer: Signer,
    options: Arc<CoordinatorOptions>,
    /// No further job is admitted.
    stopping: CancellationToken,
}

/// What a coordinator stands on.
#[derive(Debug)]
pub(crate) struct Ground {
    pub(crate) store: Arc<dyn Store>,
    pub(crate) outputs: Outputs,
    /// Vouches for safety records.
    pub(crate) signer: Signer,
    /// Lead to energy nodes.
    pub(crate) channels: Channels,
}

impl Coordinator {
    /// Opens what `options` name and starts the hub.
    pub(crate) async fn start(options: CoordinatorOptions) -> Result<Self> {
        let ground = open(&options).await?;
        Self::start_on(ground, options).await
    }

    /// Starts the hub.
    pub(crate) async fn start_on(ground: Ground, options: CoordinatorOptions) -> Result<Self> {
        let Ground { store, outputs, signer, channels } = ground;
        tracing::info!(key = signer.public().id(), "safety records are signed");
        let clock = Clock::of(Arc::clone(&store)).await?;
        let pause = options.node_ttl.min(options.lease_ttl) / 2;
        let registry = Registry::new(Arc::clone(&store), clock.clone(), options.node_ttl, pause);
        let events = Events::new(Arc::clone(&store));
        let access = Access::new(options.policies.clone(), options.tls.is_on());
        let timeout = options.check_timeout;
        let registrar = Registrar::new(registry.clone(), channels.clone());
        let deployer = Deployer::new(registry.clone(), channels.clone());
        let mut trusted = vec![signer.public()];
        trusted.extend(options.trusted_signers.iter().cloned());
        let handout = Handout::new(outputs.clone(), trusted);
        let gate =
            ReleaseGate::new(registry.clone(), outputs.clone(), channels, timeout, signer.clone());
        let hub_options = HubOptions {
            coordinator_id: options.coordinator_id.clone(),
            lease_ttl: options.lease_ttl,
            retry_delay: options.retry_delay,
            max_wait: options.max_wait,
            has_own_workers: options.has_own_workers,
        };
        let hub = Hub::start(
            Arc::clone(&store),
            clock.clone(),
            registry.clone(),
            events.clone(),
            gate,
            hub_options,
        )
        .await?;
        Ok(Self {
            store,
            clock,
            outputs,
            handout,
            registry,
            registrar,
            deployer,
            events,
            hub,
            access,
            signer,
            options: Arc::new(options),
            stopping: CancellationToken::new(),
        })
    }

    /// Vouches for records.
    pub(crate) fn signer(&self) -> &Signer {
        &self.signer
    }

    pub(crate) fn access(&self) -> &Access {
        &self.access
    }

    pub(crate) fn registry(&self) -> &Registry {
        &self.registry
    }

    pub(crate) fn registrar(&self) -> &Registrar {
        &self.registrar
    }

    pub(crate) fn deployer(&self) -> &Deployer {
        &self.deployer
    }

    pub(crate) fn hub(&self) -> &Hub {
        &self.hub
    }

    /// Admits and stores a job. `incoming` is the client's traceparent.
    pub(crate) async fn submit(
        &self,
        tenant: &Tenant,
        request: v1::SubmitJobRequest,
        incoming: &str,
    ) -> Result<v1::Job> {
        if self.stopping.is_cancelled() {
            return Err(Error::Stopping);
        }
        let spec = request.spec.ok_or_else(|| Error::invalid("spec", "is missing"))?;
        let key = request.idempotency_key;
        if key.chars().count() > MAX_KEY_CHARS {
            let problem = format!("has more than {MAX_KEY_CHARS} characters");
            return Err(Error::invalid("idempotency_key", problem));
        }
        let body = Sha256::digest(spec.encode_to_vec()).to_vec();
        // Before admission: a repeated request gets its job even if the cluster has changed.
        if !key.is_empty()
            && let Some(found) = self.store.find(Lookup::Key(&tenant.name, &key)).await?
        {
            return self.existing(tenant, &key, &body, found).await;
        }
        let now = self.clock.now();
        let identity = Identity { job: JobId::generate(now), drawn_seed: rand::random(), now };
        let (models, nodes, seen) =
            (self.registry.models(), self.registry.live(), self.registry.seen());
        let cluster = Cluster { models: &models, nodes: &nodes, seen: &seen };
        let policies = self.access.policies();
        let mut record = admission::admit(&spec, &policies, tenant, &cluster, identity)?;
        record.traceparent = trace::traceparent_or(&Span::current(), incoming);
        let max_queued = self.options.max_queued;
        let key = (!key.is_empty()).then_some((key, body));
        let quota = tenant.quota;
        let new = NewJob { record, key: key.clone(), max_queued, quota };
        match self.store.create(new, now).await? {
            Created::New(record) => {
                metrics::admitted();
                tracing::info!(
                    job = record.job.job_id,
                    model = record.model.name,
                    images = record.job.images.len(),
                    shards = record.shards.len(),
                    policy = record.policy().name,
                    "job admitted"
                );
                self.hub.wake();
                Ok(record.job)
            }
            Created::Existing(found) => {
                let (key, body) = key.unwrap_or_default();
                self.existing(tenant, &key, &body, found).await
            }
            Created::Full(full) => {
                metrics::refused();
                let name = tenant.name.clone();
                Err(match full {
                    Full::Queue => Error::QueueFull { limit: max_queued },
                    Full::Tenant => Error::TenantFull {
                        tenant: name,
                        limit: quota.max_queued.unwrap_or_default(),
                    },
                    Full::Rate { wait_ms } => Error::TooFast {
                        tenant: name,
                        limit: quota.images_per_minute.unwrap_or_default(),
                        wait: Duration::from_millis(wait_ms),
                    },
                    Full::Withheld { wait_ms } => Error::TooManyWithheld {
                        tenant: name,
                        limit: quota.withheld_per_minute.unwrap_or_default(),
                        wait: Duration::from_millis(wait_ms),
                    },
                })
            }
        }
    }

    async fn existing(
        &self,
        tenant: &Tenant,
        key: &str,
        body: &[u8],
        found: Found,
    ) -> Result<v1::Job> {
        if found.body_hash != body {
            return Err(Error::KeyReused { key: key.to_owned(), job_id: found.job_id });
        }
        Ok(self.record_of(tenant, &found.job_id).await?.job)
    }

    pub(crate) async fn get(&self, tenant: &Tenant, job_id: &str) -> Result<v1::Job> {
        Ok(self.record_of(tenant, job_id).await?.job)
    }

    /// Events after a sequence number; the stream ends after the job's last event.
    pub(crate) async fn watch(
        &self,
        tenant: &Tenant,
        job_id: &str,
        after: u64,
    ) -> Result<mpsc::Receiver<Result<v1::WatchJobResponse, Status>>> {
        let record = self.record_of(tenant, job_id).await?;
        let after = events::cursor(&record, after);
        if record.is_terminal() && after == record.last_sequence {
            // Nothing is left to send: a stream that ends at once.
            return Ok(mpsc::channel(1).1);
        }
        Ok(self.events.watch(parse_job(job_id)?, after))
    }

    pub(crate) async fn cancel(&self, tenant: &Tenant, job_id: &str) -> Result<v1::Job> {
        let job = parse_job(job_id)?;
        self.record_of(tenant, job_id).await?;
        match self.hub.cancel(job, "cancelled by the client").await {
            Ok(record) => {
                tracing::info!(job = job_id, state = record.job.state().as_str_name(), "cancel");
                Ok(record.job)
            }
            Err(Error::Store(StoreError::UnknownJob(_))) => Err(unknown_job(job_id)),
            Err(error) => Err(error),
        }
    }

    pub(crate) async fn list(
        &self,
        tenant: &Tenant,
        request: v1::ListJobsRequest,
    ) -> Result<v1::ListJobsResponse> {
        let size = match request.page_size {
            0 => DEFAULT_PAGE,
            size @ 1..=MAX_PAGE => size,
            size => {
                let problem = format!("is {size}; ask for 1 to {MAX_PAGE}");
                return Err(Error::invalid("page_size", problem));
            }
        } as usize;
        let before = match request.page_token.as_str() {
            "" => None,
            token => Some(token.parse::<JobId>().map_err(|_| {
                Error::invalid("page_token", format!("`{token}` comes from no previous page"))
            })?),
        };
        let own = (!tenant.admin).then_some(tenant.name.as_str());
        let mut records = self.store.list(own, before, size + 1).await?;
        let mut room = MAX_MESSAGE_BYTES / 2;
        let fits = records.iter().take(size).take_while(|record| {
            let length = record.job.encoded_len();
            let fits = length <= room;
            room = room.saturating_sub(length);
            fits
        });
        let keep = fits.count().max(1);
        let more = records.len() > keep;
        records.truncate(keep);
        let jobs: Vec<v1::Job> = records.into_iter().map(|record| record.job).collect();
        let next_page_token =
            jobs.last().filter(|_| more).map(|job| job.job_id.clone()).unwrap_or_default();
        Ok(v1::ListJobsResponse { jobs, next_page_token })
    }

    /// The bytes of a released image, as they were checked.
    pub(crate) async fn image(
        &self,
        tenant: &Tenant,
        job_id: &str,
        index: u32,
    ) -> Result<v1::GetImageResponse> {
        let record = self.record_of(tenant, job_id).await?;
        let image = image_of(&record, index)?;
        if image.status() != v1::ImageStatus::Released {
            return Err(not_released(job_id, image));
        }
        let token = winner(&record, index).unwrap_or_default();
        let png = self.handout.image(&record.job.job_id, image, token).await?;
        Ok(v1::GetImageResponse { png: png.to_vec(), image_sha256: image.image_sha256.clone() })
    }

    /// The safety record of an image that was released or withheld.
    pub(crate) async fn record(
        &self,
        tenant: &Tenant,
        request: v1::GetRecordRequest,
    ) -> Result<v1::SafetyRecord> {
        let by_id = !request.record_id.is_empty();
        let unknown = || Error::NotFound(format!("record `{}`", request.record_id));
        let (job_id, index) = if by_id {
            let found = self.store.find(Lookup::Record(&request.record_id)).await?;
            let found = found.ok_or_else(unknown)?;
            (found.job_id, found.index)
        } else {
            (request.job_id.clone(), request.index)
        };
        let record = self.record_of(tenant, &job_id).await.map_err(|error| match error {
            // Another tenant's: its job is not told.
            Error::NotFound(_) if by_id => unknown(),
            other => other,
        })?;
        let image = image_of(&record, index)?;
        let Some(token) = winner(&record, index) else {
            let status = image.status().as_str_name();
            let what = format!("the record of image {index} of job {job_id} ({status})");
            return Err(Error::NotFound(what));
        };
        self.handout.record(&job_id, image, token).await
    }

    pub(crate) fn models(&self) -> Vec<v1::ModelInfo> {
        self.registry.models()
    }

    /// Served concepts by name, energy and version, each with its nodes.
    pub(crate) fn concepts(&self) -> v1::ListConceptsResponse {
        let mut concepts: Vec<v1::ServedConcept> = Vec::new();
        for node in self.registry.live() {
            for info in &node.info.concepts {
                let concept = info.concept.clone().unwrap_or_default();
                let serving = v1::ServingNode {
                    node_id: node.info.node_id.clone(),
                    address: node.info.address.clone(),
                    model_name: node.info.model_name.clone(),
                    since_unix_ms: info.since_unix_ms,
                    calibrations: node.calibrations(&concept).cloned().collect(),
                    model_hash: node.info.model_hash.clone(),
                    preprocessing_version: node.info.preprocessing_version,
                };
                let same = |served: &&mut v1::ServedConcept| {
                    served.concept.as_ref().and_then(|c| c.concept.as_ref())
                        == info.concept.as_ref()
                };
                match concepts.iter_mut().find(same) {
                    Some(served) => served.nodes.push(serving),
                    None => concepts.push(v1::ServedConcept {
                        concept: Some(info.clone()),
                        nodes: vec![serving],
                    }),
                }
            }
        }
        concepts.sort_by_cached_key(|served| {
            let concept = served.concept.clone().unwrap_or_default();
            (concept.group, concept.concept.unwrap_or_default().name)
        });
        v1::ListConceptsResponse { concepts, absent: self.registry.absent() }
    }

    /// What forgets old jobs.
    pub(crate) fn retention(&self) -> Retention {
        Retention::new(Arc::clone(&self.store), self.outputs.clone(), self.options.retention)
    }

    /// Whether it can store what it is told.
    pub(crate) async fn check(&self) -> Result<()> {
        self.store.check().await?;
        Ok(self.outputs.check()?)
    }

    /// Admits nothing more, lets running shards finish for a while, ends every stream.
    pub(crate) async fn stop(&self) {
        self.stopping.cancel();
        self.hub.stop(self.options.drain_timeout).await;
        self.events.stop().await;
    }

    /// A job that `tenant` may see.
    async fn record_of(&self, tenant: &Tenant, job_id: &str) -> Result<JobRecord> {
        let record = self.store.get(parse_job(job_id)?).await?;
        record.filter(|record| tenant.sees(&record.tenant)).ok_or_else(|| unknown_job(job_id))
    }
}

/// What `options` name.
async fn open(options: &CoordinatorOptions) -> Result<Ground> {
    let redis = match &options.data {
        Data::Redis { url, prefix, may_lose_jobs, .. } => {
            let store = RedisStore::new(url.reveal(), prefix)?;
            store.vet(*may_lose_jobs).await?;
            Some(store)
        }
        Data::Memory | Data::Dir(_) => None,
    };
    let channels = Channels::new(options.check_timeout, options.tls.clone());
    let (data, signing_key) = (options.data.clone(), options.signing_key.clone());
    let opened = tokio::task::spawn_blocking(move || -> Result<Ground> {
        let signer = |dir: &Path| match &signing_key {
            Some(path) => Signer::load(path),
            None => Signer::load_or_create(&dir.join(SIGNING_KEY), &dir.join(PUBLIC_KEY)),
        };
        let (store, outputs, signer): (Arc<dyn Store>, _, _) = match data {
            Data::Memory => {
                let signer = signing_key.as_deref().map(Signer::load).transpose()?;
                let signer = signer.unwrap_or_else(Signer::generate);
                (Arc::new(MemoryStore::default()), Outputs::in_memory(), signer)
            }
            Data::Dir(dir) => {
                let outputs = outputs(&dir)?;
                let file = dir.join("jobs.redb");
                warn_of_orphans(&dir, &file);
                let store = RedbStore::open(&file)?;
                (Arc::new(store), outputs, signer(&dir)?)
            }
            Data::Redis { outputs: dir, .. } => {
                let store = redis.expect("it was made above for this very data");
                (Arc::new(store), outputs(&dir)?, signer(&dir)?)
            }
        };
        Ok(Ground { store, outputs, signer, channels })
    });
    opened.await.map_err(|error| Error::Io {
        what: "opening the data directory".to_owned(),
        source: std::io::Error::other(error),
    })?
}

/// Says that a folder has images and no jobs: then somebody has taken the file of the jobs away.
fn warn_of_orphans(dir: &Path, file: &Path) {
    let mut images = std::fs::read_dir(dir.join("outputs/jobs")).into_iter().flatten();
    if !file.exists() && images.next().is_some() {
        tracing::error!(
            file = %file.display(),
            "it is not there, but the folder has images of jobs: they are lost unless you restore the file \
             from a backup; beginning without jobs"
        );
    }
}

fn outputs(dir: &Path) -> Result<Outputs> {
    let dir = dir.join("outputs");
    std::fs::create_dir_all(&dir).map_err(|source| Error::Io {
        what: format!("data directory {}", dir.display()),
        source,
    })?;
    Ok(Outputs::local(&dir)?)
}

fn parse_job(job_id: &str) -> Result<JobId> {
    job_id.parse().map_err(|_| {
        Error::invalid("job_id", format!("`{job_id}` is no job id; it is what SubmitJob returned"))
    })
}

fn unknown_job(job_id: &str) -> Error {
    Error::NotFound(format!("job {job_id}"))
}

fn image_of(record: &JobRecord, index: u32) -> Result<&v1::ImageInfo> {
    record.job.images.get(index as usize).ok_or_else(|| {
        let (job_id, n) = (&record.job.job_id, record.job.images.len());
        Error::NotFound(format!("image {index} of job {job_id} (it has {n})"))
    })
}

/// Token of the delivery whose result for `index` was accepted.
fn winner(record: &JobRecord, index: u32) -> Option<u64> {
    let shard = record.shards.iter().find(|shard| shard.images().contains(&index))?;
    (shard.lease.phase() == Phase::Done).then(|| shard.lease.token())
}

fn not_released(job_id: &str, image: &v1::ImageInfo) -> Error {
    use v1::ImageStatus::{Cancelled, Failed, Pending, Released, Unspecified, Withheld};
    let (status, hint) = match image.status() {
        Unspecified | Pending => ("pending", "; watch the job until it ends"),
        Released => ("released", ""),
        Withheld => ("withheld", "; its safety record says why"),
        Failed => ("failed", "; the job's reason says why"),
        Cancelled => ("cancelled", ""),
    };
    Error::NotReleased { job_id: job_id.to_owned(), index: image.index, status, hint }
}
