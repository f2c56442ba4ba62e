//! Options of a worker process.

use std::{path::PathBuf, time::Duration};

use clap::Args;
use fairlead_common::tls::Tls;
use fairlead_models::DeviceName;

/// Options of `fairlead worker`; each can also be set in the environment.
#[derive(Debug, Clone, Args)]
pub struct WorkerArgs {
    /// Folder of a diffusers pipeline (the one with model_index.json), or the id org/name of one in
    /// the Hugging Face cache; repeat it to serve several models. The folder's or repository's name
    /// is the model's name.
    #[arg(
        long = "model",
        value_name = "DIR",
        env = "FAIRLEAD_WORKER_MODELS",
        value_delimiter = ',',
        required = true
    )]
    pub models: Vec<PathBuf>,

    /// Address of the coordinator, e.g. http://127.0.0.1:7100. Where several share a Redis, all of them,
    /// separated by commas: the worker goes to another one when its own goes away.
    #[arg(
        long,
        value_name = "URL",
        env = "FAIRLEAD_WORKER_COORDINATOR",
        default_value = "http://127.0.0.1:7100"
    )]
    pub coordinator: String,

    /// Name of this worker in records and logs. With TLS it is the one that --tls-cert is for, or begins with
    /// that and `/`, so that several can share a certificate: by default with a random end, e.g.
    /// worker-1/3f9c21ab. Without, it is any; by default a random one.
    #[arg(long, value_name = "NAME", env = "FAIRLEAD_WORKER_ID")]
    pub worker_id: Option<String>,

    /// Most images denoised together. The images do not depend on it; memory does.
    #[arg(long, value_name = "N", env = "FAIRLEAD_WORKER_MAX_BATCH", default_value_t = 4, value_parser = clap::value_parser!(u32).range(1..=64))]
    pub max_batch: u32,

    /// Shards of a model that are made at once, in turns: while one waits for an energy node, the device
    /// works for another. The images do not depend on it; memory does.
    #[arg(long, value_name = "N", env = "FAIRLEAD_WORKER_MICRO_BATCHES", default_value_t = 2, value_parser = clap::value_parser!(u32).range(1..=8))]
    pub micro_batches: u32,

    /// Shards held at once: --micro-batches of each model are made, the others wait or are being checked, so
    /// that the device never idles between two.
    #[arg(long, value_name = "N", env = "FAIRLEAD_WORKER_CAPACITY", default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..=64))]
    pub capacity: u32,

    /// Device of the networks: cpu, or cuda:N in a build with that feature.
    #[arg(long, value_name = "DEVICE", env = "FAIRLEAD_WORKER_DEVICE", default_value = "cpu")]
    pub device: DeviceName,

    /// Threads of the CPU kernels; 0 takes one per core. The images do not depend on it.
    #[arg(long, value_name = "N", env = "FAIRLEAD_WORKER_THREADS", default_value_t = 0)]
    pub threads: usize,

    /// Most seconds an energy node may take for one answer. Then another node is asked if the shard
    /// was given one, else the shard fails and is tried again later.
    #[arg(long, value_name = "SECONDS", env = "FAIRLEAD_WORKER_ENERGY_TIMEOUT", default_value = "30", value_parser = seconds)]
    pub energy_timeout: Duration,

    /// Most seconds to finish running shards after the stop signal; then they are handed back.
    #[arg(long, value_name = "SECONDS", env = "FAIRLEAD_WORKER_DRAIN_TIMEOUT", default_value = "60", value_parser = seconds)]
    pub drain_timeout: Duration,

    /// Certificates, read by the caller.
    #[arg(skip)]
    pub tls: Tls,
}

impl WorkerArgs {
    /// The defaults for `models` at `coordinator`, as the command line would give them.
    pub fn new(models: Vec<PathBuf>, coordinator: impl Into<String>) -> Self {
        Self {
            models,
            coordinator: coordinator.into(),
            worker_id: None,
            max_batch: 4,
            micro_batches: 2,
            capacity: 3,
            device: DeviceName::Cpu,
            threads: 0,
            energy_timeout: Duration::from_secs(30),
            drain_timeout: Duration::from_secs(60),
            tls: Tls::default(),
        }
    }
}

fn seconds(text: &str) -> Result<Duration, String> {
    let value: f64 = text.parse().map_err(|_| format!("`{text}` is no number of seconds"))?;
    Duration::try_from_secs_f64(value)
        .ok()
        .filter(|duration| !duration.is_zero())
        .ok_or_else(|| format!("{text} is not a positive number of seconds"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser;

    #[derive(Parser)]
    struct Command {
        #[command(flatten)]
        worker: WorkerArgs,
    }

    fn parse(args: &[&str]) -> Result<WorkerArgs, clap::Error> {
        let args = ["fairlead", "--model", "a"].iter().chain(args);
        Command::try_parse_from(args).map(|command| command.worker)
    }

    #[test]
    fn the_constructor_and_the_command_line_have_the_same_defaults() {
        let parsed = parse(&[]).expect("one model is enough");
        let built = WorkerArgs::new(vec!["a".into()], "http://127.0.0.1:7100");
        assert_eq!(format!("{parsed:?}"), format!("{built:?}"));
    }

    #[test]
    fn bad_options_say_what_is_allowed() {
        let message = |args: &[&str]| parse(args).expect_err("it is refused").to_string();
        assert!(message(&["--device", "tpu"]).contains("cuda:N"));
        assert!(message(&["--max-batch", "0"]).contains("1..=64"));
        assert!(message(&["--energy-timeout", "0"]).contains("positive"));
        assert!(message(&["--energy-timeout", "soon"]).contains("seconds"));
    }
}
