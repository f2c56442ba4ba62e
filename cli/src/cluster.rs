//! A whole cluster inside this process, on loopback: the real services speaking real gRPC.

use std::{
    collections::BTreeSet,
    net::SocketAddr,
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::{Context, Result, bail};
use clap::Args;
use fairlead_common::{text, tls::Tls};
use fairlead_coordinator::{CoordinatorOptions, Data, Policies, parse_duration};
use fairlead_energy::EnergyOptions;
use fairlead_proto::v1::SteeringParams;
use fairlead_worker::WorkerArgs;
use tokio::{net::TcpListener, task::JoinSet};
use tokio_util::sync::CancellationToken;

use crate::{
    assets::ModelArgs,
    client::Client,
    credentials::{Credentials, Key},
};

/// Models are loaded and every service attached within this time, or the start failed.
const START_TIMEOUT: Duration = Duration::from_secs(300);
const READY_POLL: Duration = Duration::from_millis(20);
/// Time the services get to end what they hold; longer than a worker drains.
const STOP_TIMEOUT: Duration = Duration::from_secs(90);

/// What to run and where.
pub(crate) struct ClusterOptions {
    pub(crate) models: ModelArgs,
    /// Address of the coordinator; port 0 takes a free one.
    pub(crate) listen: SocketAddr,
    /// Folder of jobs, images and records; `None` keeps them in memory.
    pub(crate) data_dir: Option<PathBuf>,
    /// Policies file; `None` takes the embedded one.
    pub(crate) policies: Option<PathBuf>,
    /// Whether energy nodes read calibrations. One that only scores needs none, and a file that is to
    /// be made anew must not keep it from starting.
    pub(crate) calibrated: bool,
    /// Adds the policies that observe and withhold nothing. Only for a cluster that serves nobody
    /// else.
    pub(crate) measuring: bool,
    /// Set in every policy that steers, whatever it allows clients: who starts the cluster is its
    /// operator.
    pub(crate) knobs: Option<SteeringParams>,
    /// Most images in one shard.
    pub(crate) max_batch: Option<u32>,
    /// How long an energy node may take over one step; `None` for the worker's default.
    pub(crate) energy_timeout: Option<Duration>,
    /// How long it may take over the final check; `None` for the coordinator's default.
    pub(crate) check_timeout: Option<Duration>,
    /// Generator workers.
    pub(crate) workers: WorkersArgs,
}

/// How a local cluster is run, the same for every command that has one.
#[derive(Args, Clone, Default)]
#[command(next_help_heading = "Local cluster")]
pub(crate) struct LocalArgs {
    /// Policies file. Default: assets/policies.toml.
    #[arg(long, value_name = "FILE", env = "FAIRLEAD_POLICIES")]
    pub(crate) policies: Option<PathBuf>,
    /// Most images that a worker makes at once. Default: 4.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=64))]
    max_batch: Option<u32>,
    /// How long an energy node may take over one step of a shard, e.g. 90s. Default: 30s, which a large
    /// model on a CPU may not do in.
    #[arg(long, value_name = "TIME", value_parser = parse_duration)]
    energy_timeout: Option<Duration>,
    /// How long an energy node may take over the final check of an image, e.g. 60s. Default: 20s.
    #[arg(long, value_name = "TIME", value_parser = parse_duration)]
    check_timeout: Option<Duration>,
    #[command(flatten)]
    workers: WorkersArgs,
}

impl LocalArgs {
    /// A cluster for the length of one command.
    pub(crate) fn cluster(&self, models: &ModelArgs) -> ClusterOptions {
        ClusterOptions {
            policies: self.policies.clone(),
            max_batch: self.max_batch,
            energy_timeout: self.energy_timeout,
            check_timeout: self.check_timeout,
            workers: self.workers,
            ..ClusterOptions::temporary(models)
        }
    }

    /// Those of these flags that were given, which have no effect beside --server.
    pub(crate) fn given(&self) -> [(&'static str, bool); 5] {
        [
            ("--policies", self.policies.is_some()),
            ("--max-batch", self.max_batch.is_some()),
            ("--energy-timeout", self.energy_timeout.is_some()),
            ("--check-timeout", self.check_timeout.is_some()),
            ("--workers", self.workers.count != WorkersArgs::default().count),
        ]
    }
}

/// How many generator workers a local cluster has.
#[derive(Args, Clone, Copy)]
pub(crate) struct WorkersArgs {
    /// Generator workers of the local cluster. Each loads the model and takes its share of the
    /// cores; more than one keeps small models' cores busier.
    #[arg(
        id = "workers",
        long = "workers",
        value_name = "N",
        default_value_t = 1,
        value_parser = clap::value_parser!(u32).range(1..=64)
    )]
    count: u32,
}

impl Default for WorkersArgs {
    fn default() -> Self {
        Self { count: 1 }
    }
}

impl WorkersArgs {
    /// Threads of each; 0 is all cores.
    fn threads(self) -> usize {
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        if self.count == 1 { 0 } else { (cores / self.count as usize).max(1) }
    }
}

impl ClusterOptions {
    /// A cluster for the length of one command.
    pub(crate) fn temporary(models: &ModelArgs) -> Self {
        Self {
            models: models.clone(),
            listen: SocketAddr::from(([127, 0, 0, 1], 0)),
            data_dir: None,
            policies: None,
            calibrated: true,
            measuring: true,
            knobs: None,
            max_batch: None,
            energy_timeout: None,
            check_timeout: None,
            workers: WorkersArgs::default(),
        }
    }
}

/// The policies that it would have.
pub(crate) fn policies(options: &ClusterOptions) -> Result<Policies> {
    let mut policies = read_policies(options)?;
    if let Some(knobs) = &options.knobs {
        policies.set_knobs(knobs)?;
    }
    Ok(policies)
}

fn read_policies(options: &ClusterOptions) -> Result<Policies> {
    let file = match &options.policies {
        Some(file) => file.clone(),
        None => options.models.policies()?,
    };
    if !options.measuring {
        return Ok(Policies::load(&file)?);
    }
    let read =
        |path: &Path| text::read(path).with_context(|| format!("cannot read {}", path.display()));
    Ok(Policies::parse(&(read(&file)? + &read(&options.models.measuring_policies()?)?))?)
}

/// A running local cluster. Call [`LocalCluster::stop`] to end it in order.
pub(crate) struct LocalCluster {
    address: String,
    /// Opens it where the policies have tenants.
    key: Key,
    services: JoinSet<Result<()>>,
    /// Different generators.
    generators: usize,
    /// Energy nodes.
    nodes: usize,
    stop_workers: CancellationToken,
    stop_energy: CancellationToken,
    stop_coordinator: CancellationToken,
}

/// Where a node of a cluster with a data folder keeps concepts that are added: each has its own.
fn added_concepts(data: &Path, number: usize, energy: &Path) -> PathBuf {
    let name = energy.file_name().unwrap_or_default().to_string_lossy();
    data.join("concepts").join(format!("{number}-{name}"))
}

impl LocalCluster {
    /// Starts coordinator, energy nodes and workers and waits until a job could run.
    pub(crate) async fn start(options: ClusterOptions) -> Result<Self> {
        let key = hex::encode(rand::random::<[u8; 32]>());
        let mut policies = policies(&options)?;
        policies.admit_operator(&key);
        let key = Key::new(&key)?;
        let defaults = CoordinatorOptions::default();
        let coordinator = CoordinatorOptions {
            check_timeout: options.check_timeout.unwrap_or(defaults.check_timeout),
            data: options.data_dir.clone().map_or(Data::Memory, Data::Dir),
            policies,
            policies_file: options.policies.clone().filter(|_| !options.measuring),
            has_own_workers: true,
            ..defaults
        };
        let coordinator_listener = TcpListener::bind(options.listen).await.with_context(|| {
            format!("cannot listen on {} (--listen picks another address)", options.listen)
        })?;
        let address = format!("http://{}", coordinator_listener.local_addr()?);
        let energies = options.models.energies()?;
        let generators = options.models.generators()?;
        let mut worker = WorkerArgs::new(generators.clone(), address.clone());
        let generators = generators.len();
        worker.max_batch = options.max_batch.unwrap_or(worker.max_batch);
        worker.threads = options.workers.threads();
        worker.energy_timeout = options.energy_timeout.unwrap_or(worker.energy_timeout);
        worker.device = options.models.device.unwrap_or_default();
        let energy_device = options.models.energy_device.unwrap_or(worker.device);

        let [stop_workers, stop_energy, stop_coordinator] =
            std::array::from_fn(|_| CancellationToken::new());
        let mut services = JoinSet::new();
        let stop = stop_coordinator.clone();
        services.spawn(async move {
            let run = fairlead_coordinator::run(coordinator_listener, coordinator, stop);
            run.await.context("the coordinator ended")
        });
        let calibrations = options.calibrated.then(|| options.models.calibrations().ok()).flatten();
        for (number, energy) in energies.iter().enumerate() {
            let listener = TcpListener::bind("127.0.0.1:0").await?;
            let node = EnergyOptions {
                concepts: options.models.concepts()?,
                calibrations: calibrations.clone(),
                added_concepts: options
                    .data_dir
                    .as_ref()
                    .map(|data| added_concepts(data, number, energy)),
                coordinator: Some(address.clone()),
                device: energy_device,
                ..EnergyOptions::new(energy.clone())
            };
            let stop = stop_energy.clone();
            services.spawn(async move {
                let run = fairlead_energy::run(listener, node, stop);
                run.await.context("an energy node ended")
            });
        }
        for _ in 0..options.workers.count {
            let (stop, worker) = (stop_workers.clone(), worker.clone());
            services.spawn(async move {
                fairlead_worker::run(worker, stop).await.context("a worker ended")
            });
        }
        let mut cluster = Self {
            address,
            key,
            services,
            generators,
            nodes: energies.len(),
            stop_workers,
            stop_energy,
            stop_coordinator,
        };
        cluster.ready().await?;
        Ok(cluster)
    }

    /// Address of the coordinator, "http://127.0.0.1:port".
    pub(crate) fn address(&self) -> &str {
        &self.address
    }

    /// A client that may do everything here.
    pub(crate) fn client(&self) -> Result<Client> {
        let credentials = Credentials { key: self.key.clone(), tls: Tls::default() };
        Client::new(&self.address, credentials)
    }

    /// Ends when a service does, which is an error unless the cluster was stopped.
    pub(crate) async fn failed(&mut self) -> Result<()> {
        match self.services.join_next().await {
            Some(Ok(Ok(()))) => bail!("a service ended by itself"),
            Some(Ok(Err(error))) => Err(error),
            Some(Err(panic)) => bail!("a service panicked: {panic}"),
            None => bail!("no service is running"),
        }
    }

    /// Stops the workers, then the energy nodes that their last shards need, then the coordinator.
    pub(crate) async fn stop(mut self) -> Result<()> {
        let drain = async {
            self.stop_workers.cancel();
            while let Some(ended) = self.services.join_next().await {
                ended.context("a service panicked")??;
                match self.services.len() {
                    0 | 1 => self.stop_coordinator.cancel(),
                    left if left <= 1 + self.nodes => self.stop_energy.cancel(),
                    _ => {}
                }
            }
            Ok(())
        };
        tokio::time::timeout(STOP_TIMEOUT, drain)
            .await
            .context("the services did not stop in time")?
    }

    async fn ready(&mut self) -> Result<()> {
        let client = self.client()?;
        let (generators, energies) = (self.generators, self.nodes);
        let attached = async {
            loop {
                let models = client.models().await.map(|models| models.len()).unwrap_or(0);
                let concepts = client.concepts().await.unwrap_or_default();
                let nodes: BTreeSet<&str> = concepts
                    .iter()
                    .flat_map(|concept| &concept.nodes)
                    .map(|node| node.node_id.as_str())
                    .collect();
                if models == generators && nodes.len() == energies {
                    return;
                }
                tokio::time::sleep(READY_POLL).await;
            }
        };
        tokio::select! {
            () = attached => Ok(()),
            failed = self.failed() => failed,
            () = tokio::time::sleep(START_TIMEOUT) => {
                bail!("the local cluster was not ready within {START_TIMEOUT:?}")
            }
        }
    }
}
