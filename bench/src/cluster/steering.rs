//! What steering costs: whole images on a local cluster.

use anyhow::Result;

use super::jobs::{self, BENIGN, TARGET, client, engine_ms, finished};
use super::service::{Service, fairlead, policies};
use crate::report::{self, median};

const GENERATORS: [&str; 2] = ["emojiland-sd", "emojiland-sd3"];
const ENERGY: &str = "emojiland-clip";
/// Images of one job.
const IMAGES: u32 = 4;

/// Milliseconds of the engine for an image.
pub(super) async fn run(rounds: usize) -> Result<()> {
    let mut rows = Vec::new();
    for generator in GENERATORS {
        let data = tempfile::tempdir()?;
        let mut command = fairlead(None)?;
        command.args(["up", "--listen", "127.0.0.1:0", "--model", generator, "--energy", ENERGY]);
        command.arg("--data-dir").arg(data.path().join("data"));
        command.arg("--policies").arg(policies(data.path())?);
        let service = Service::start(command, "cluster ready at ").await?;
        let client = client(service.channel()?);
        let cases = [("plain", BENIGN), ("", BENIGN), ("", TARGET)];
        let mut times: [Vec<f64>; 3] = Default::default();
        for round in 0..=rounds {
            for (times, (policy, prompt)) in times.iter_mut().zip(cases) {
                let job = finished(&client, jobs::spec(policy, prompt, IMAGES, 0)).await?;
                let took = engine_ms(&client, &job).await?;
                // The first of each is warming up.
                times.extend((round > 0).then_some(took));
            }
        }
        let [plain, closed, open] = times.map(|times| median(&times).unwrap_or(f64::NAN));
        rows.push(vec![
            generator.to_owned(),
            format!("{plain:.0}"),
            format!("{closed:.0}"),
            format!("{:.2}", closed / plain),
            format!("{open:.0}"),
            format!("{:.2}", open / plain),
        ]);
    }
    println!(
        "\nmilliseconds an image, {IMAGES} images a job, {rounds} jobs of each in turns; medians"
    );
    report::table(
        &["generator", "no energy", "gates closed", "ratio", "gate open", "ratio"],
        &rows,
    );
    Ok(())
}
