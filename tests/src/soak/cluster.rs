//! The cluster that is soaked: 2 coordinators, 3 workers, 3 energy nodes and a Redis, with a proxy on every
//! line that faults harm. Proxies also give services addresses that outlive them.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs::File,
    io::{BufRead, BufReader},
    path::{Path, PathBuf},
    process::ExitStatus,
    sync::Arc,
    time::Duration,
};

use anyhow::{Context, Result, bail, ensure};
use fairlead_common::{grpc, testing::RedisServer, tls::Tls};
use fairlead_proto::v1::{
    ListConceptsRequest, ListModelsRequest, catalog_service_client::CatalogServiceClient,
};
use tokio::{
    process::Command,
    sync::Mutex,
    time::{sleep, timeout},
};

use super::requests;
use crate::{
    PATIENCE, asset, command,
    process::{LISTENING, Process},
    proxy::{Proxy, Target},
};

const COORDINATORS: usize = 2;
const WORKERS: usize = 3;
const NODES: usize = 3;
/// Length of leases and registrations, in seconds.
pub(super) const LEASE: Duration = Duration::from_secs(2);
/// Warnings, and each result that a coordinator accepts.
const LOG: &str = "warn,fairlead_coordinator::hub::session=info";
/// Time to finish what runs after SIGTERM, in seconds.
const DRAIN: &str = "5";

/// A service that can be killed and started again.
pub(super) struct Service {
    name: String,
    command: Box<dyn Fn() -> Result<Command> + Send + Sync>,
    /// Its address for others, where it listens.
    front: Option<Proxy>,
    /// The lines to what it depends on; of an energy node, on which others depend, its front.
    lines: Vec<Proxy>,
    process: Mutex<Option<Process>>,
}

impl Service {
    pub(super) fn name(&self) -> &str {
        &self.name
    }

    /// The lines that a fault of this service's network harms.
    pub(super) fn lines(&self) -> impl Iterator<Item = &Proxy> {
        let front = self.front.iter().filter(|_| self.lines.is_empty());
        self.lines.iter().chain(front)
    }

    pub(super) async fn start(&self) -> Result<()> {
        let command = (self.command)()?;
        let process = match &self.front {
            None => Process::start(&self.name, command)?,
            Some(front) => {
                let started = Process::start_saying(&self.name, command, LISTENING).await;
                let (process, said) = started?;
                front.lead(Some(Target::url(&said.address)));
                process
            }
        };
        *self.process.lock().await = Some(process);
        Ok(())
    }

    pub(super) async fn signal(&self, signal: &str) -> Result<()> {
        let process = self.process.lock().await;
        process
            .as_ref()
            .with_context(|| format!("`{}` does not run", self.name))?
            .signal(signal)
            .await
    }

    pub(super) async fn kill(&self) -> Result<()> {
        let Some(mut process) = self.process.lock().await.take() else { return Ok(()) };
        if let Some(status) = process.has_ended()? {
            bail!("`{}` had ended by itself with {status}", self.name);
        }
        process.kill().await
    }

    /// Tells it to stop and waits until it has; anything but success is an error.
    pub(super) async fn drain(&self) -> Result<()> {
        let mut process = self.process.lock().await;
        let process = process.take().with_context(|| format!("`{}` does not run", self.name));
        let mut process = process?;
        process.signal("TERM").await?;
        let status = process.ended(PATIENCE).await?;
        ensure!(status.success(), "`{}` was told to stop and ended with {status}", self.name);
        Ok(())
    }

    /// Starts it again if it has ended by itself, and says how it ended.
    pub(super) async fn revive(&self) -> Result<Option<ExitStatus>> {
        let status = match self.process.lock().await.as_mut() {
            Some(process) => process.has_ended()?,
            None => None,
        };
        if status.is_some() {
            self.start().await?;
        }
        Ok(status)
    }
}

/// The services, their proxies and the folder of their data.
pub(super) struct Cluster {
    // Before the folder that its data are in.
    redis: Arc<std::sync::Mutex<RedisServer>>,
    folder: tempfile::TempDir,
    pub(super) coordinators: Vec<Service>,
    pub(super) workers: Vec<Service>,
    pub(super) nodes: Vec<Service>,
}

impl Cluster {
    /// Starts everything and waits until all have found each other.
    pub(super) async fn start() -> Result<Self> {
        let folder = tempfile::Builder::new().prefix("fairlead-soak-").tempdir()?;
        let redis = folder.path().join("redis");
        std::fs::create_dir(&redis)?;
        let redis = RedisServer::start(&redis);
        std::fs::write(folder.path().join("policies.toml"), requests::policies()?)?;
        let mut cluster = Self {
            coordinators: Vec::new(),
            workers: Vec::new(),
            nodes: Vec::new(),
            redis: Arc::new(std::sync::Mutex::new(redis)),
            folder,
        };
        for number in 1..=COORDINATORS {
            let service = cluster.coordinator(number).await?;
            cluster.coordinators.push(service);
        }
        for number in 1..=NODES {
            let service = cluster.node(number).await?;
            cluster.nodes.push(service);
        }
        for number in 1..=WORKERS {
            let service = cluster.worker(number).await?;
            cluster.workers.push(service);
        }
        for service in cluster.services() {
            service.start().await?;
        }
        cluster.ready().await?;
        Ok(cluster)
    }

    /// Where coordinators keep images, records and the key that signs them.
    pub(super) fn data(&self) -> PathBuf {
        self.folder.path().join("data")
    }

    /// The coordinators' addresses, separated by commas.
    pub(super) fn addresses(&self) -> String {
        urls(self.coordinators.iter().filter_map(|service| service.front.as_ref()))
    }

    pub(super) fn services(&self) -> impl Iterator<Item = &Service> {
        self.coordinators.iter().chain(&self.nodes).chain(&self.workers)
    }

    /// Does something to the Redis that may take a while.
    pub(super) async fn redis(&self, harm: fn(&mut RedisServer)) -> Result<()> {
        let redis = Arc::clone(&self.redis);
        let harmed = tokio::task::spawn_blocking(move || {
            harm(&mut redis.lock().expect("no harm panicked before"));
        });
        harmed.await.context("the Redis")
    }

    /// Waits until every worker is attached and every energy node serves.
    pub(super) async fn ready(&self) -> Result<()> {
        let replicas = grpc::replicas(&self.addresses(), LEASE, &Tls::default())?;
        let catalog = CatalogServiceClient::new(replicas);
        let complete = async {
            loop {
                let models = catalog.clone().list_models(ListModelsRequest {}).await;
                let concepts = catalog.clone().list_concepts(ListConceptsRequest {}).await;
                if let (Ok(models), Ok(concepts)) = (models, concepts)
                    && models.get_ref().models.iter().any(|model| model.workers as usize == WORKERS)
                    && concepts.get_ref().concepts.iter().all(|served| served.nodes.len() == NODES)
                {
                    return;
                }
                sleep(Duration::from_millis(50)).await;
            }
        };
        timeout(PATIENCE, complete).await.context("not all workers and energy nodes joined")
    }

    /// Lines of logs that tell of a panic: one inside a task does not end its process.
    pub(super) fn panics(&self) -> Result<Vec<String>> {
        let mut panics = Vec::new();
        for service in self.coordinators.iter().chain(&self.workers).chain(&self.nodes) {
            for line in BufReader::new(File::open(self.log(&service.name))?).lines() {
                let line = line?;
                if line.contains("panicked at") {
                    panics.push(format!("{}: {line}", service.name));
                }
            }
        }
        Ok(panics)
    }

    /// The tokens of the accepted results of each shard, as the coordinators' logs tell.
    pub(super) fn results(&self) -> Result<BTreeMap<String, BTreeSet<String>>> {
        let mut results: BTreeMap<String, BTreeSet<String>> = BTreeMap::new();
        for coordinator in &self.coordinators {
            let log = File::open(self.log(&coordinator.name))?;
            for line in BufReader::new(log).lines() {
                let line = line?;
                if !line.contains("shard done") {
                    continue;
                }
                let lease = line.split_once("lease=shard ").map(|(_, rest)| rest.split(' '));
                let mut lease = lease.with_context(|| format!("no lease in: {line}"))?;
                // "SHARD token TOKEN"
                let (Some(shard), Some(token)) = (lease.next(), lease.nth(1)) else {
                    bail!("no token in: {line}");
                };
                results.entry(shard.to_owned()).or_default().insert(token.to_owned());
            }
        }
        ensure!(!results.is_empty(), "the logs tell of no result; did their words change?");
        Ok(results)
    }

    fn log(&self, name: &str) -> PathBuf {
        self.folder.path().join(format!("{name}.log"))
    }

    /// Keeps data and logs for whoever wants to know what went wrong.
    pub(super) fn keep(self) -> PathBuf {
        self.folder.keep()
    }

    async fn coordinator(&self, number: usize) -> Result<Service> {
        let socket = self.redis.lock().expect("nothing has panicked yet").socket();
        let redis = Proxy::start(Some(Target::Unix(socket))).await?;
        let (folder, url) = (self.folder.path().to_owned(), redis.address());
        self.service(format!("coordinator-{number}"), vec![redis], true, move |command, _| {
            command
                .args(["coordinator", "--listen", "127.0.0.1:0", "--drain-timeout", "5s"])
                .args(["--redis", &format!("redis://{url}"), "--check-timeout", "5s"])
                .args(["--lease-ttl", "2s", "--node-ttl", "2s", "--retry-delay", "100ms"]);
            command.arg("--data-dir").arg(folder.join("data"));
            command.arg("--policies").arg(folder.join("policies.toml"));
        })
        .await
    }

    async fn node(&self, number: usize) -> Result<Service> {
        let (name, coordinators) = (format!("energy-{number}"), self.addresses());
        self.service(name.clone(), Vec::new(), true, move |command, front| {
            command.args(["energy", "--listen", "127.0.0.1:0", "--node-id", &name]).args([
                "--coordinator",
                &coordinators,
                "--advertise",
                front,
            ]);
            command.arg("--model").arg(asset("emojiland-clip"));
            command.arg("--concepts").arg(asset("concepts"));
            command.arg("--calibrations").arg(asset("calibrations"));
        })
        .await
    }

    async fn worker(&self, number: usize) -> Result<Service> {
        let name = format!("worker-{number}");
        let mut lines = Vec::new();
        for coordinator in self.coordinators.iter().filter_map(|service| service.front.as_ref()) {
            lines.push(Proxy::start(Some(Target::url(&coordinator.url()))).await?);
        }
        let coordinators = urls(&lines);
        self.service(name.clone(), lines, false, move |command, _| {
            command.args(["worker", "--worker-id", &name, "--coordinator", &coordinators]).args([
                "--threads",
                "1",
                "--energy-timeout",
                "5",
                "--drain-timeout",
                DRAIN,
            ]);
            command.arg("--model").arg(asset("emojiland-sd"));
        })
        .await
    }

    /// A service whose command is completed by `arguments`, which are told its front's address. Its log is
    /// a file of its name.
    async fn service(
        &self,
        name: String,
        lines: Vec<Proxy>,
        listens: bool,
        arguments: impl Fn(&mut Command, &str) + Send + Sync + 'static,
    ) -> Result<Service> {
        let front = if listens { Some(Proxy::start(None).await?) } else { None };
        let url = front.as_ref().map(Proxy::url).unwrap_or_default();
        let log = self.log(&name);
        let command = move || {
            let mut command = command();
            arguments(&mut command, &url);
            command.env("FAIRLEAD_LOG", LOG).stderr(append(&log)?);
            Ok(command)
        };
        let process = Mutex::new(None);
        Ok(Service { name, command: Box::new(command), front, lines, process })
    }
}

fn urls<'a>(proxies: impl IntoIterator<Item = &'a Proxy>) -> String {
    proxies.into_iter().map(Proxy::url).collect::<Vec<_>>().join(",")
}

fn append(path: &Path) -> Result<File> {
    let file = File::options().create(true).append(true).open(path);
    file.with_context(|| path.display().to_string())
}
