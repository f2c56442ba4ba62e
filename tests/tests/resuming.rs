//! A cluster in one process that dies and comes back.

use anyhow::{Context, Result};
use fairlead_proto::v1::{JobSpec, JobState};
use fairlead_tests::{Sandbox, pixels};

/// Killed with -9 while a job runs, `up` takes the job up again and ends with the bytes that an
/// undisturbed run has.
#[tokio::test]
async fn a_killed_up_finishes_its_jobs_with_the_same_bytes() -> Result<()> {
    let data = tempfile::tempdir()?;
    let spec = JobSpec {
        prompt: "a kitchen knife and a lemon".to_owned(),
        n: 3,
        seed: Some(11),
        ..Default::default()
    };
    let mut up = Sandbox::up(&data.path().join("killed")).await?;
    let job = up.submit(spec.clone()).await?;
    up.until_step(&job, |step| step.step >= 3).await?;
    up.kill("up").await?;

    let up = Sandbox::up(&data.path().join("killed")).await?;
    let job = up.finish(&job).await?;
    assert_eq!(job.state(), JobState::Completed, "{}", job.reason);
    let undisturbed = Sandbox::up(&data.path().join("other")).await?;
    let (same, pngs) = undisturbed.images(spec).await?;
    assert!(same.images.iter().any(|image| image.steered), "nothing was steered");
    for (image, other) in job.images.iter().zip(&same.images) {
        assert_eq!(image.index, other.index);
        let png = up.png(&job.job_id, image.index).await.context("a released image")?;
        // The record's id, which the PNG carries, is the job's own.
        let (png, other) = (pixels(&png)?, pixels(&pngs[image.index as usize])?);
        assert!(png == other, "image {} has other pixels", image.index);
    }
    Ok(())
}
