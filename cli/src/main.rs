//! The `fairlead` binary: every service of the cluster and the client's commands.

mod arguments;
mod assets;
mod client;
mod cluster;
mod commands;
mod credentials;
mod journal;
mod output;
mod pace;
mod pairs;
mod preflight;
mod progress;
mod prompts;
mod provenance;
mod share;
mod sheet;
mod ssim;
mod table;
mod values;
mod waiting;

use std::process::ExitCode;

use clap::{Parser, Subcommand};
use client::Interrupted;
use commands::services::ServiceArgs;
use fairlead_common::telemetry::{self, LogFormat};
use output::tell;

/// Exit status after Ctrl-C, as shells have it.
const INTERRUPTED: u8 = 130;

// The engine allocates and frees activations of many megabytes at every step; with the system
// allocator these go back to the kernel each time and cost more than the arithmetic.
#[cfg(not(test))] // Tests count allocations.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// Generate images from text and steer each one, while it is being sampled, away from concepts
/// you forbid.
///
/// Start with `fairlead generate "a cat and a kitchen knife"`: it runs a whole cluster on this
/// machine for the length of the command, on the small models that ship with the project.
/// `fairlead up` keeps such a cluster running; `coordinator`, `worker` and `energy` start one
/// service each, for clusters of several machines.
#[derive(Parser)]
#[command(name = "fairlead", version, max_term_width = 100, propagate_version = true)]
pub(crate) struct Cli {
    /// How log lines look: human or json.
    #[arg(long, global = true, env = "FAIRLEAD_LOG_FORMAT", default_value = "human")]
    log_format: LogFormat,
    /// Send traces to this OTLP receiver's gRPC endpoint, e.g. http://127.0.0.1:4317.
    #[arg(long, global = true, value_name = "URL", env = "OTEL_EXPORTER_OTLP_ENDPOINT")]
    otlp: Option<String>,
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Run a whole cluster on loopback: coordinator, worker and energy node.
    Up(commands::up::UpArgs),
    /// Turn prompts into steered images.
    Generate(commands::generate::GenerateArgs),
    /// Run the coordinator: admission, shards, leases, release.
    Coordinator(ServiceArgs<fairlead_coordinator::CoordinatorArgs>),
    /// Run a generator worker attached to a coordinator.
    Worker(ServiceArgs<fairlead_worker::WorkerArgs>),
    /// Run an energy node: a frozen model that scores concepts and answers with gradients.
    Energy(ServiceArgs<fairlead_energy::EnergyArgs>),
    /// List the concepts a cluster steers away from and who serves them.
    Concepts(commands::concepts::ConceptsArgs),
    /// Measure a generator's benign images and set the gate from them.
    Calibrate(commands::calibrate::CalibrateArgs),
    /// Show what a PNG says about itself and check it against its safety record.
    Inspect(commands::inspect::InspectArgs),
    /// Check that a cluster that you trust released these very files.
    Verify(commands::verify::VerifyArgs),
    /// Make certificates, clients' keys and signing keys.
    Keys(commands::keys::KeysArgs),
    /// Draw the demonstration sheet: unsteered and steered pairs with their score curves.
    Demo(commands::demo::DemoArgs),
    /// Measure steering with a judge that does not steer.
    Evaluate(commands::evaluate::EvaluateArgs),
}

impl Command {
    /// Services log what they do; commands talk through their own output.
    fn default_filter(&self) -> &'static str {
        match self {
            Self::Up(_) | Self::Coordinator(_) | Self::Worker(_) | Self::Energy(_) => "info",
            _ => "error",
        }
    }

    /// What the process is called in traces.
    fn service(&self) -> &'static str {
        match self {
            Self::Coordinator(_) => "fairlead-coordinator",
            Self::Worker(_) => "fairlead-worker",
            Self::Energy(_) => "fairlead-energy",
            _ => "fairlead",
        }
    }
}

fn main() -> ExitCode {
    // What a panic says may be text of others, too; with a backtrace somebody looks for a fault of ours.
    if std::env::var_os("RUST_BACKTRACE").is_none() {
        std::panic::set_hook(Box::new(|panic| tell!("error: {panic}; please report this")));
    }
    // SAFETY: no other thread runs before the runtime starts.
    #[allow(unsafe_code)]
    unsafe {
        fairlead_models::prepare_process();
    }
    start()
}

#[tokio::main]
async fn start() -> ExitCode {
    let cli: Cli = match arguments::parse() {
        Ok(cli) => cli,
        Err(error) => return arguments::refuse(error),
    };
    let options = telemetry::Options {
        format: cli.log_format,
        filter: cli.command.default_filter(),
        service: cli.command.service(),
        otlp: cli.otlp.as_deref().filter(|endpoint| !endpoint.is_empty()),
    };
    let telemetry = match telemetry::init(options) {
        Ok(telemetry) => telemetry,
        Err(error) => {
            tell!("error: {error}");
            return ExitCode::FAILURE;
        }
    };
    let code = run(cli.command).await.unwrap_or_else(|error| {
        if error.is::<Interrupted>() {
            tell!("{}", output::chain(&error));
            return ExitCode::from(INTERRUPTED);
        }
        tell!("error: {}", output::chain(&error));
        ExitCode::FAILURE
    });
    telemetry.stop().await;
    code
}

async fn run(command: Command) -> anyhow::Result<ExitCode> {
    match command {
        Command::Up(args) => commands::up::run(args).await,
        Command::Generate(args) => commands::generate::run(args).await,
        Command::Coordinator(args) => commands::services::coordinator(args).await,
        Command::Worker(args) => commands::services::worker(args).await,
        Command::Energy(args) => commands::services::energy(args).await,
        Command::Concepts(args) => commands::concepts::run(args).await,
        Command::Calibrate(args) => commands::calibrate::run(args).await,
        Command::Inspect(args) => commands::inspect::run(args).await,
        Command::Verify(args) => commands::verify::run(args).await,
        Command::Keys(args) => commands::keys::run(args),
        Command::Demo(args) => commands::demo::run(args).await,
        Command::Evaluate(args) => commands::evaluate::run(args).await,
    }
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn help_lists_options_under_headings_of_their_own() {
        let cli = Cli::command();
        for (command, option, heading) in [
            ("generate", "out", None),
            ("generate", "server", None),
            ("generate", "seed", Some("Request")),
            ("generate", "key_file", Some("Access to --server")),
            ("calibrate", "out", None),
            ("calibrate", "workers", None),
            ("evaluate", "out", None),
            ("demo", "out", None),
            ("up", "listen", None),
            ("up", "metrics_listen", Some("Metrics")),
            ("worker", "metrics_listen", Some("Metrics")),
            ("energy", "model", None),
        ] {
            let of = cli.find_subcommand(command).expect(command);
            let mut options = of.get_arguments();
            let found = options.find(|argument| argument.get_id() == option).expect(option);
            assert_eq!(found.get_help_heading(), heading, "{command} --{option}");
        }
    }
}
