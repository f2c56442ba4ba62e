//! Clusters of real processes: the `fairlead` binary's services on free loopback ports, a Redis, proxies
//! that harm what passes between them, and a soak run that does all of it at random.

use std::{
    path::{Path, PathBuf},
    process::Stdio,
    time::Duration,
};

use anyhow::{Context, Result};
use tokio::process::Command;

pub mod metrics;
pub mod process;
pub mod proxy;
mod sandbox;
pub mod soak;

pub use sandbox::Sandbox;

/// Anything a test waits for comes within this time on a busy machine, or never.
pub const PATIENCE: Duration = Duration::from_secs(120);

/// A policy for step counts nobody calibrated, to be put beside the embedded ones.
pub const LENIENT: &str = r#"
[policies.lenient]
concepts = ["*"]
allow_calibration_fallback = true
"#;

/// The `fairlead` binary that was built with this test.
pub fn binary() -> PathBuf {
    let this = std::env::current_exe().expect("a program has a path");
    // A test is in target/PROFILE/deps, a program in target/PROFILE.
    let profile = this.ancestors().skip(1).take(2).map(|folder| folder.join("fairlead"));
    let binary = profile.into_iter().find(|binary| binary.is_file());
    binary.unwrap_or_else(|| {
        panic!("no `fairlead` near {}: build the whole workspace", this.display())
    })
}

/// A path inside `assets/`.
pub fn asset(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../assets").join(name)
}

/// The binary with logs silenced and no settings from outside.
pub fn command() -> Command {
    let mut command = Command::new(binary());
    for (name, _) in std::env::vars().filter(|(name, _)| name.starts_with("FAIRLEAD_")) {
        command.env_remove(name);
    }
    command.env("FAIRLEAD_LOG", "warn").kill_on_drop(true).stdin(Stdio::null());
    command
}

/// The pixels of an RGB8 PNG.
pub fn pixels(bytes: &[u8]) -> Result<Vec<u8>> {
    let mut reader = png::Decoder::new(std::io::Cursor::new(bytes)).read_info()?;
    let mut pixels = vec![0; reader.output_buffer_size().context("the image is too large")?];
    reader.next_frame(&mut pixels)?;
    Ok(pixels)
}
