//! The services as processes: images, determinism, and an energy node that dies.

use anyhow::{Context, Result};
use fairlead_common::record;
use fairlead_proto::v1::{CancelJobRequest, GetRecordRequest, ImageStatus, JobSpec, JobState};
use fairlead_tests::{LENIENT, PATIENCE, Sandbox, asset};
use tokio::time::timeout;
use tonic::Code;

fn policies() -> Result<String> {
    let embedded = std::fs::read_to_string(asset("policies.toml"))?;
    let measuring = std::fs::read_to_string(asset("policies-measuring.toml"))?;
    Ok(embedded + &measuring + LENIENT)
}

async fn sandbox() -> Result<Sandbox> {
    sandbox_with(&[]).await
}

/// Further arguments of the coordinator.
async fn sandbox_with(arguments: &[&str]) -> Result<Sandbox> {
    let mut sandbox = Sandbox::with_policies(&policies()?, arguments).await?;
    sandbox.energy("energy").await?;
    sandbox.worker("worker").await?;
    sandbox.ready().await?;
    Ok(sandbox)
}

fn spec(prompt: &str, n: u32) -> JobSpec {
    JobSpec { prompt: prompt.to_owned(), n, seed: Some(11), ..Default::default() }
}

fn pixels(bytes: &[u8]) -> Vec<u8> {
    fairlead_tests::pixels(bytes).expect("a PNG")
}

fn all_pixels(pngs: &[Vec<u8>]) -> Vec<Vec<u8>> {
    pngs.iter().map(|png| pixels(png)).collect()
}

#[tokio::test]
async fn benign_images_are_identical_to_unsteered_ones() -> Result<()> {
    let sandbox = sandbox().await?;
    let benign = spec("a penguin on a blue background", 4);
    let (job, steered) = sandbox.images(benign.clone()).await?;
    let unsteered = JobSpec { policy: "unsteered".into(), ..benign };
    let (_, unsteered) = sandbox.images(unsteered).await?;
    assert!(job.images.iter().all(|image| !image.steered), "a benign image was steered");
    assert_eq!(job.policy.expect("a pinned policy").concepts.len(), 20);
    assert_eq!(all_pixels(&steered), all_pixels(&unsteered));
    let distinct: std::collections::BTreeSet<_> = all_pixels(&steered).into_iter().collect();
    assert_eq!(distinct.len(), 4, "four seeds give four images");
    Ok(())
}

#[tokio::test]
async fn an_unsteered_target_is_released_with_the_scores_that_condemn_it() -> Result<()> {
    let sandbox = sandbox().await?;
    let unsteered =
        JobSpec { policy: "unsteered".into(), ..spec("a kitchen knife on a white background", 4) };
    let (job, _) = sandbox.images(unsteered).await?;
    let scores = || job.images.iter().flat_map(|image| &image.final_scores);
    assert!(scores().any(|score| score.z > score.gate), "no knife was seen");
    assert!(scores().all(|score| score.gate > 0.0 && !score.open));
    Ok(())
}

#[tokio::test]
async fn a_target_is_steered_and_images_do_not_depend_on_sharding() -> Result<()> {
    let sandbox = sandbox().await?;
    let target = spec("a kitchen knife on a white background", 4);
    let mut records = Vec::new();
    for max_shard_size in [4, 1, 3] {
        let sharded = JobSpec { max_shard_size, ..target.clone() };
        let job = sandbox.finish(&sandbox.submit(sharded).await?).await?;
        assert_eq!(job.state(), JobState::Completed, "{}", job.reason);
        assert!(job.images.iter().any(|image| image.steered), "no image was steered");
        let mut outcome = Vec::new();
        for image in &job.images {
            outcome.push(match image.status() {
                ImageStatus::Released => pixels(&sandbox.png(&job.job_id, image.index).await?),
                ImageStatus::Withheld => Vec::new(),
                other => panic!("image {} is {other:?}", image.index),
            });
        }
        records.push(outcome);
    }
    assert_eq!(records[0], records[1]);
    assert_eq!(records[0], records[2]);
    Ok(())
}

/// The pool that candle has beside rayon's spins while it waits, on cores that the kernels need.
#[cfg(target_os = "linux")]
#[tokio::test]
async fn only_rayon_computes() -> Result<()> {
    let sandbox = sandbox().await?;
    sandbox.images(spec("a kitchen knife on a white background", 1)).await?;
    for name in ["worker", "energy"] {
        let threads = sandbox.process(name)?.threads()?;
        assert!(threads.iter().any(|thread| thread.contains(name)), "{threads:?}");
        assert!(!threads.iter().any(|thread| thread.contains("candle")), "{threads:?}");
    }
    Ok(())
}

#[tokio::test]
async fn an_energy_node_gone_mid_job_releases_nothing() -> Result<()> {
    // No other node will come: there is nothing to wait for.
    let mut sandbox = sandbox_with(&["--max-wait", "1ms"]).await?;
    let long = JobSpec {
        steps: Some(500),
        policy: "lenient".into(),
        ..spec("a cat and a kitchen knife", 2)
    };
    let job = sandbox.submit(long).await?;
    sandbox.until_step(&job, |step| !step.scores.is_empty()).await?;
    sandbox.kill("energy").await?;
    let job = sandbox.finish(&job).await?;
    assert_eq!(job.state(), JobState::Failed, "{job:?}");
    let concepts = job.policy.as_ref().expect("a pinned policy").concepts.iter();
    let named = concepts.clone().any(|concept| job.reason.contains(&concept.name));
    assert!(named, "the reason names a concept: {}", job.reason);
    for image in &job.images {
        let status = sandbox.png(&job.job_id, image.index).await.expect_err("nothing is released");
        assert_eq!(status.code(), Code::FailedPrecondition, "{status}");
    }
    Ok(())
}

/// The registration of a killed node lasts; its replica comes while the shard runs, which stays with the
/// node that it asks as long as that lives.
#[tokio::test]
async fn a_replica_takes_over_within_the_step() -> Result<()> {
    let mut sandbox = sandbox_with(&["--node-ttl", "1h"]).await?;
    let spec = JobSpec {
        // Enough for the replica to load.
        steps: Some(400),
        policy: "lenient".into(),
        ..spec("an owl on a green background", 1)
    };
    let (_, calm) = sandbox.images(spec.clone()).await?;
    let job = sandbox.submit(spec).await?;
    sandbox.until_step(&job, |step| !step.scores.is_empty()).await?;
    sandbox.energy("spare").await?;
    sandbox.served_by(2).await?;
    sandbox.kill("energy").await?;
    let job = sandbox.finish(&job).await?;
    assert_eq!(job.state(), JobState::Completed, "{}", job.reason);
    assert_eq!(pixels(&sandbox.png(&job.job_id, 0).await?), pixels(&calm[0]));
    let request =
        GetRecordRequest { record_id: job.images[0].record_id.clone(), ..Default::default() };
    let record = sandbox.client()?.get_record(request).await?.into_inner().record;
    let nodes = record::reported(&record.context("a record")?).energy_nodes.clone();
    let names: Vec<&str> = nodes.iter().filter_map(|node| node.split(' ').next()).collect();
    assert_eq!(names, ["energy", "spare"]);
    Ok(())
}

#[tokio::test]
async fn a_killed_worker_loses_no_job_and_changes_no_byte() -> Result<()> {
    let mut sandbox = sandbox().await?;
    let spec = JobSpec {
        // Enough for the replica to load.
        steps: Some(400),
        policy: "lenient".into(),
        ..spec("an owl on a green background", 2)
    };
    let (_, calm) = sandbox.images(spec.clone()).await?;
    let job = sandbox.submit(spec).await?;
    sandbox.until_step(&job, |_| true).await?;
    sandbox.kill("worker").await?;
    sandbox.worker("another").await?;
    let job = sandbox.finish(&job).await?;
    assert_eq!(job.state(), JobState::Completed, "{}", job.reason);
    for (image, calm) in job.images.iter().zip(&calm) {
        assert_eq!(pixels(&sandbox.png(&job.job_id, image.index).await?), pixels(calm));
    }
    Ok(())
}

#[tokio::test]
async fn a_cancelled_job_ends_cancelled_and_the_worker_goes_on() -> Result<()> {
    let sandbox = sandbox().await?;
    let long = JobSpec { steps: Some(500), policy: "lenient".into(), ..spec("a star", 4) };
    let job = sandbox.submit(long).await?;
    let request = CancelJobRequest { job_id: job.job_id.clone() };
    sandbox.client()?.cancel_job(request).await?;
    let job = sandbox.finish(&job).await?;
    assert_eq!(job.state(), JobState::Cancelled);
    assert!(job.images.iter().all(|image| image.status() == ImageStatus::Cancelled));
    let (job, _) = sandbox.images(spec("a star on a blue background", 1)).await?;
    assert_eq!(job.state(), JobState::Completed);
    Ok(())
}

#[tokio::test]
async fn bad_requests_say_what_where_and_what_to_do() -> Result<()> {
    let sandbox = sandbox().await?;
    let good = spec("a cat", 1);
    let cases: Vec<(&str, JobSpec, &[&str])> = vec![
        ("empty prompt", JobSpec { prompt: " ".into(), ..good.clone() }, &["prompt"]),
        ("size 63", JobSpec { width: Some(63), ..good.clone() }, &["width", "63", "64"]),
        ("steps 0", JobSpec { steps: Some(0), ..good.clone() }, &["steps", "0"]),
        ("n 0", JobSpec { n: 0, ..good.clone() }, &["n", "0"]),
        ("n 10000", JobSpec { n: 10_000, ..good.clone() }, &["n", "10000"]),
        (
            "unknown concept",
            JobSpec { extra_concepts: vec!["kitchen-knive".into()], ..good.clone() },
            &["kitchen-knive", "kitchen-knife"],
        ),
        (
            "unknown policy",
            JobSpec { policy: "strict".into(), ..good.clone() },
            &["strict", "default"],
        ),
        (
            "unknown model",
            JobSpec { model: "sdxl".into(), ..good.clone() },
            &["sdxl", "emojiland-sd"],
        ),
    ];
    for (name, spec, words) in cases {
        let status = sandbox.submit(spec).await.expect_err(name);
        assert!(
            matches!(status.code(), Code::InvalidArgument | Code::NotFound | Code::Unavailable),
            "{name}: {status:?}"
        );
        for word in words {
            assert!(status.message().contains(word), "{name} lacks `{word}`: {}", status.message());
        }
    }
    let uncalibrated = JobSpec { steps: Some(17), ..good.clone() };
    let status = sandbox.submit(uncalibrated).await.expect_err("17 steps are not calibrated");
    assert_eq!(status.code(), Code::FailedPrecondition);
    assert!(status.message().contains("fairlead calibrate"), "{}", status.message());
    Ok(())
}

#[tokio::test]
async fn a_long_prompt_is_encoded_in_chunks_and_the_answer_says_so() -> Result<()> {
    let sandbox = sandbox().await?;
    let prompt = "a cat on a blue background, ".repeat(90);
    let job = sandbox.finish(&sandbox.submit(spec(&prompt, 1)).await?).await?;
    assert_eq!(job.state(), JobState::Completed, "{}", job.reason);
    let notice = job.notices.first().context("a notice about the prompt")?;
    assert!(notice.contains("chunks"), "{notice}");
    Ok(())
}

#[tokio::test]
async fn without_an_energy_node_nothing_is_admitted() -> Result<()> {
    let mut sandbox = Sandbox::with_policies(&policies()?, &[]).await?;
    sandbox.worker("worker").await?;
    let submit = async {
        loop {
            match sandbox.submit(spec("a cat", 1)).await {
                // The worker is still loading.
                Err(status) if status.message().contains("worker") => {
                    tokio::time::sleep(std::time::Duration::from_millis(50)).await;
                }
                other => return other,
            }
        }
    };
    let status = timeout(PATIENCE, submit).await?.expect_err("no concept is served");
    assert_eq!(status.code(), Code::Unavailable, "{status}");
    assert!(status.message().contains("energy"), "{}", status.message());
    Ok(())
}
