//! What an operator sets.

use std::{net::SocketAddr, path::PathBuf, time::Duration};

use clap::Args;
use fairlead_common::{door::ServerArgs, ids, tls::Tls};
use fairlead_models::DeviceName;

use crate::engine::Batching;

/// Options of `fairlead energy`.
#[derive(Args, Debug, Clone)]
pub struct EnergyArgs {
    /// Energy model: a folder with a transformers CLIPModel or SiglipModel (config.json,
    /// model.safetensors, preprocessor_config.json and the tokenizer's files) or with a CLIP of
    /// open_clip (open_clip_config.json, open_clip_model.safetensors), or the id org/name of one in
    /// the Hugging Face cache.
    #[arg(long, value_name = "DIR", env = "FAIRLEAD_ENERGY_MODEL")]
    pub model: PathBuf,
    /// Concepts to watch for: a pack, which is a TOML file with one `concept` table each of name,
    /// group, targets and, if wanted, anchors, weight and fallback_threshold; or a folder of packs.
    /// Repeatable.
    #[arg(
        long,
        value_name = "FILE|DIR",
        env = "FAIRLEAD_ENERGY_CONCEPTS",
        value_delimiter = ',',
        required = true
    )]
    pub concepts: Vec<PathBuf>,
    /// Folder of calibrations as `fairlead calibrate` writes them; new ones are picked up while the
    /// node runs. Without any, only policies that allow a fallback can use this node.
    #[arg(long, value_name = "DIR", env = "FAIRLEAD_ENERGY_CALIBRATIONS")]
    pub calibrations: Option<PathBuf>,
    /// Folder that concepts are kept in which are added while the node runs (`fairlead concepts --add`), so
    /// that it has them again after a restart. Without it they last until it stops.
    #[arg(long, value_name = "DIR", env = "FAIRLEAD_ENERGY_ADDED_CONCEPTS")]
    pub added_concepts: Option<PathBuf>,
    /// Address to listen on; port 0 takes a free one.
    #[arg(
        long,
        value_name = "HOST:PORT",
        env = "FAIRLEAD_ENERGY_LISTEN",
        default_value = "127.0.0.1:0"
    )]
    pub listen: SocketAddr,
    /// Listen in the clear where other machines can connect, and let anybody in.
    #[arg(long, env = "FAIRLEAD_ENERGY_INSECURE")]
    pub insecure: bool,
    /// Address that workers and the coordinator reach this node at, e.g. http://10.0.0.7:7101.
    /// Default: the one it listens on. Needed when that is 0.0.0.0.
    #[arg(long, value_name = "URL", env = "FAIRLEAD_ENERGY_ADVERTISE")]
    pub advertise: Option<String>,
    /// Coordinator to register with, e.g. http://10.0.0.1:7100, or all that share a Redis, separated by
    /// commas. Without it the node serves whoever calls it.
    #[arg(long, value_name = "URL", env = "FAIRLEAD_ENERGY_COORDINATOR")]
    pub coordinator: Option<String>,
    /// Name of this node, unique among the live ones: a second that runs is refused, and one that comes
    /// back has it again, wherever it comes back. Default: the one that --tls-cert is for, and without TLS a
    /// random one.
    #[arg(long, value_name = "NAME", env = "FAIRLEAD_ENERGY_NODE_ID")]
    pub node_id: Option<String>,
    /// Crops each image is scored on where a request does not say, 1 to 8. More are harder to fool
    /// and cost as much more. Calibrations hold for one number only.
    #[arg(
        long,
        value_name = "N",
        env = "FAIRLEAD_ENERGY_CROPS",
        default_value_t = DEFAULT_CROPS,
        value_parser = clap::value_parser!(u32).range(1..=8)
    )]
    pub crops: u32,
    /// Requests that may wait for the model; further ones are refused at once.
    #[arg(
        long,
        value_name = "N",
        env = "FAIRLEAD_ENERGY_QUEUE",
        default_value_t = DEFAULT_QUEUE,
        value_parser = clap::value_parser!(u32).range(1..=4096)
    )]
    pub queue: u32,
    /// Images, of as many requests as wait, that share one pass of the model. More keep a large device
    /// busy and take as much more memory. Default: 4 on the CPU; 1 elsewhere, where the order of a sum
    /// may depend on it, and with it an image's last bits.
    #[arg(
        long,
        value_name = "N",
        env = "FAIRLEAD_ENERGY_MAX_BATCH",
        value_parser = clap::value_parser!(u32).range(1..=64)
    )]
    pub max_batch: Option<u32>,
    /// How long a request waits, in milliseconds, for others to share its pass. Worth a little on devices
    /// that are no slower with more images; on a CPU it only adds to every step.
    #[arg(
        long,
        value_name = "MS",
        env = "FAIRLEAD_ENERGY_BATCH_WAIT_MS",
        default_value_t = 0,
        value_parser = clap::value_parser!(u32).range(0..=1000)
    )]
    pub batch_wait_ms: u32,
    /// Device the model runs on: cpu, or cuda:N in a build with that feature.
    #[arg(long, value_name = "DEVICE", env = "FAIRLEAD_ENERGY_DEVICE", default_value = "cpu")]
    pub device: DeviceName,
    /// Who may connect, and what is shown to them.
    #[command(flatten)]
    pub server: ServerArgs,
}

const DEFAULT_CROPS: u32 = 4;
const DEFAULT_QUEUE: u32 = 64;
/// Images of a pass on the CPU, where a batch changes no bit.
const CPU_BATCH: u32 = 4;

/// What [`crate::run`] needs besides a listener.
#[derive(Debug, Clone)]
pub struct EnergyOptions {
    /// Folder of the energy model, a transformers CLIPModel or SiglipModel.
    pub model: PathBuf,
    /// Concept packs, or folders of them.
    pub concepts: Vec<PathBuf>,
    /// Folder of calibrations; it need not exist yet.
    pub calibrations: Option<PathBuf>,
    /// Folder for concepts that are added later; it need not exist yet.
    pub added_concepts: Option<PathBuf>,
    /// Address others reach the node at; `None` takes the listener's.
    pub advertise: Option<String>,
    /// Coordinator to register with, "http://host:port".
    pub coordinator: Option<String>,
    /// Name of the node, unique among the live ones.
    pub node_id: String,
    /// Crops per image where a request does not say, 1 to 8.
    pub crops: u32,
    /// Requests that may wait for the model, at least 1.
    pub queue: u32,
    /// Images that share one pass of the model, at least 1; `None` takes the device's default.
    pub max_batch: Option<u32>,
    /// Milliseconds that a request waits for others to share its pass.
    pub batch_wait_ms: u32,
    /// Where the model runs.
    pub device: DeviceName,
    /// With a certificate, only services of the cluster can connect.
    pub tls: Tls,
    /// Who may connect, and what is shown to them.
    pub server: ServerArgs,
}

impl EnergyOptions {
    /// Defaults around the energy model in `model`: its concepts in `concepts.toml` there, no
    /// calibrations, no coordinator, a random name, 4 crops, the CPU.
    pub fn new(model: PathBuf) -> Self {
        Self {
            concepts: vec![model.join("concepts.toml")],
            model,
            calibrations: None,
            added_concepts: None,
            advertise: None,
            coordinator: None,
            node_id: ids::process_name("energy"),
            crops: DEFAULT_CROPS,
            queue: DEFAULT_QUEUE,
            max_batch: None,
            batch_wait_ms: 0,
            device: DeviceName::Cpu,
            tls: Tls::default(),
            server: ServerArgs::default(),
        }
    }

    /// How requests share the model.
    pub(crate) fn batching(&self) -> Batching {
        let default = if self.device == DeviceName::Cpu { CPU_BATCH } else { 1 };
        Batching {
            queue: self.queue as usize,
            most: self.max_batch.unwrap_or(default).max(1) as usize,
            wait: Duration::from_millis(self.batch_wait_ms.into()),
        }
    }
}

impl EnergyArgs {
    /// The options that these ask for, of a node with the certificate of `tls`, if there is one.
    pub fn options(self, tls: Tls) -> EnergyOptions {
        let certified = || tls.identity().map(|own| own.name.clone());
        let node_id = self.node_id.or_else(certified);
        EnergyOptions {
            model: self.model,
            concepts: self.concepts,
            calibrations: self.calibrations,
            added_concepts: self.added_concepts,
            advertise: self.advertise,
            coordinator: self.coordinator,
            node_id: node_id.unwrap_or_else(|| ids::process_name("energy")),
            crops: self.crops,
            queue: self.queue,
            max_batch: self.max_batch,
            batch_wait_ms: self.batch_wait_ms,
            device: self.device,
            tls,
            server: self.server,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser;

    #[derive(Parser)]
    struct Cli {
        #[command(flatten)]
        energy: EnergyArgs,
    }

    fn parse(extra: &[&str]) -> Result<EnergyOptions, String> {
        let base = ["energy", "--model", "clip", "--concepts", "c.toml"];
        Cli::try_parse_from(base.iter().chain(extra))
            .map(|cli| cli.energy.options(Tls::default()))
            .map_err(|error| error.to_string())
    }

    #[test]
    fn defaults_and_bounds() {
        let options = parse(&[]).expect("it parses");
        assert_eq!((options.crops, options.queue, options.device), (4, 64, DeviceName::Cpu));
        assert!(options.node_id.starts_with("energy-"));
        for bad in [["--crops", "9"], ["--queue", "0"], ["--listen", "here"], ["--device", "gpu"]] {
            assert!(parse(&bad).expect_err("refused").contains(bad[0]));
        }
    }
}
