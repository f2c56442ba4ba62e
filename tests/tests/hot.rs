//! Concepts that come while the cluster runs, without a restart of anything.

use std::path::PathBuf;

use anyhow::{Context, Result, ensure};
use fairlead_proto::v1::{
    GetRecordRequest, Job, JobSpec, JobState, ListConceptsRequest, SafetyRecord,
    catalog_service_client::CatalogServiceClient,
};
use fairlead_tests::{PATIENCE, Sandbox, asset, command, process::LISTENING};
use tokio::time::timeout;

/// The new concept has no calibration: its pack says from where on its gate is open.
const POLICIES: &str = "[policies.default]\nconcepts = ['*']\nallow_calibration_fallback = true\n";

const UMBRELLA: &str = r#"
[[concept]]
name = "umbrella"
group = "weather"
targets = ["an umbrella"]
anchors = ["a picture of something", "nothing"]
fallback_threshold = 0.9
"#;

fn spec() -> JobSpec {
    JobSpec { prompt: "a penguin".into(), n: 1, seed: Some(5), ..Default::default() }
}

async fn cluster() -> Result<(Sandbox, PathBuf)> {
    // No registration ends by itself here.
    let mut sandbox = Sandbox::with_policies(POLICIES, &["--node-ttl", "10m"]).await?;
    energy(&mut sandbox).await?;
    sandbox.worker("worker").await?;
    sandbox.ready().await?;
    let pack = sandbox.folder().join("umbrella.toml");
    std::fs::write(&pack, UMBRELLA)?;
    Ok((sandbox, pack))
}

/// Starts the node "energy", which keeps what is added, and returns its address.
async fn energy(sandbox: &mut Sandbox) -> Result<String> {
    let mut node = command();
    node.args(["energy", "--listen", "127.0.0.1:0", "--node-id", "energy", "--model"])
        .arg(asset("emojiland-clip"))
        .arg("--concepts")
        .arg(asset("concepts"))
        .arg("--calibrations")
        .arg(asset("calibrations"))
        .arg("--added-concepts")
        .arg(sandbox.folder().join("kept"))
        .args(["--coordinator", sandbox.address()]);
    sandbox.spawn("energy", node, LISTENING).await
}

fn concepts(job: &Job) -> Vec<&str> {
    let policy = job.policy.as_ref().expect("a pinned policy");
    policy.concepts.iter().map(|concept| concept.name.as_str()).collect()
}

/// The job's end and the record of its image.
async fn finished(sandbox: &Sandbox, job: &Job) -> Result<(Job, SafetyRecord)> {
    let job = sandbox.finish(job).await?;
    ensure!(job.state() == JobState::Completed, "{:?}: {}", job.state(), job.reason);
    let request =
        GetRecordRequest { record_id: job.images[0].record_id.clone(), ..Default::default() };
    let record = sandbox.client()?.get_record(request).await?.into_inner().record;
    Ok((job, record.context("a released image has a record")?))
}

fn checked(record: &SafetyRecord) -> Vec<&str> {
    record.final_scores.iter().map(|score| score.concept.as_str()).collect()
}

/// Waits until the umbrella is served by the node at `address` alone.
async fn umbrella_served_at(sandbox: &Sandbox, address: &str) -> Result<()> {
    let catalog = CatalogServiceClient::connect(sandbox.address().to_owned()).await?;
    let served = async {
        loop {
            let answer = catalog.clone().list_concepts(ListConceptsRequest {}).await?.into_inner();
            let umbrella = answer.concepts.iter().find(|served| {
                let concept = served.concept.as_ref().and_then(|info| info.concept.as_ref());
                concept.is_some_and(|concept| concept.name == "umbrella")
            });
            let nodes = umbrella.map_or(&[][..], |served| &served.nodes);
            if matches!(nodes, [only] if only.address == address) {
                return anyhow::Ok(());
            }
            tokio::time::sleep(std::time::Duration::from_millis(25)).await;
        }
    };
    timeout(PATIENCE, served).await.context("the umbrella is not served")?
}

#[tokio::test]
async fn a_node_that_starts_beside_a_running_cluster_serves_new_jobs() -> Result<()> {
    let (mut sandbox, pack) = cluster().await?;
    let before = sandbox.submit(JobSpec { n: 2, ..spec() }).await?;
    sandbox.until_step(&before, |_| true).await?;
    let mut node = command();
    node.args(["energy", "--listen", "127.0.0.1:0", "--node-id", "umbrellas", "--model"])
        .arg(asset("emojiland-clip"))
        .arg("--concepts")
        .arg(pack)
        .args(["--coordinator", sandbox.address()]);
    let address = sandbox.spawn("umbrellas", node, LISTENING).await?;
    umbrella_served_at(&sandbox, &address).await?;
    let (job, record) = finished(&sandbox, &sandbox.submit(spec()).await?).await?;
    assert!(concepts(&job).contains(&"umbrella"), "{:?}", concepts(&job));
    assert!(checked(&record).contains(&"umbrella"), "{:?}", checked(&record));
    assert!(record.energy_nodes.iter().any(|node| node.starts_with("umbrellas ")));

    // What was admitted before keeps the concepts that it was admitted with.
    let (before, record) = finished(&sandbox, &before).await?;
    assert_eq!(concepts(&before).len(), 20);
    assert!(!checked(&record).contains(&"umbrella"));
    Ok(())
}

#[tokio::test]
async fn concepts_are_given_to_running_nodes_and_outlive_them() -> Result<()> {
    let (mut sandbox, pack) = cluster().await?;
    let concepts_command = async |arguments: &[&std::ffi::OsStr]| {
        let mut concepts = command();
        concepts.args(["concepts", "--server", sandbox.address()]).args(arguments);
        let output = concepts.output().await?;
        let text = String::from_utf8(output.stdout)? + &String::from_utf8(output.stderr)?;
        anyhow::Ok((output.status.success(), text))
    };
    let add = ["--add".as_ref(), pack.as_os_str()];
    let (done, text) = concepts_command(&add).await?;
    assert!(!done && text.contains("no calibration of these very concepts"), "{text}");
    let add = [add[0], add[1], "--uncalibrated".as_ref()];
    let (done, text) = concepts_command(&add).await?;
    assert!(done && text.contains("energy (emojiland-clip) serves umbrella"), "{text}");
    assert!(text.contains("fairlead calibrate"), "{text}");

    let (job, record) = finished(&sandbox, &sandbox.submit(spec()).await?).await?;
    assert!(concepts(&job).contains(&"umbrella") && checked(&record).contains(&"umbrella"));
    assert_eq!(record.energy_nodes.len(), 1, "one node answers for both sets");
    assert_eq!(record.calibrations.len(), 2, "{:?}", record.calibrations);

    let (done, text) = concepts_command(&[]).await?;
    for part in ["umbrella", "no calibration", "emojiland-sd: ddim, 25 steps, 4 crops", "gate"] {
        assert!(done && text.contains(part), "{part}: {text}");
    }
    let nobody = ["--add".as_ref(), pack.as_os_str(), "--node".as_ref(), "nobody".as_ref()];
    let (done, text) = concepts_command(&nobody).await?;
    assert!(!done && text.contains("`nobody`"), "{text}");

    // It comes back under its name and at another address.
    sandbox.kill("energy").await?;
    let address = energy(&mut sandbox).await?;
    umbrella_served_at(&sandbox, &address).await?;
    let (_, again) = finished(&sandbox, &sandbox.submit(spec()).await?).await?;
    assert_eq!(again.pixels_sha256, record.pixels_sha256);
    assert_eq!(again.calibrations, record.calibrations);
    Ok(())
}
