//! Coordinators that share a Redis: any of them may die, and the Redis itself may.

use std::time::Duration;

use anyhow::{Context, Result, bail};
use fairlead_common::{grpc, tls::Tls};
use fairlead_proto::v1::{
    CancelJobRequest, Job, JobSpec, JobState, SubmitJobRequest, WatchJobRequest,
    generation_service_client::GenerationServiceClient, watch_job_response::Event,
};
use fairlead_tests::{PATIENCE, Sandbox, pixels};
use tokio::time::timeout;
use tonic::{Code, Status, transport::Channel};

async fn cluster(coordinators: &[&str]) -> Result<Sandbox> {
    let mut sandbox = Sandbox::shared(coordinators).await?;
    sandbox.energy("energy").await?;
    sandbox.worker("worker").await?;
    sandbox.ready().await?;
    Ok(sandbox)
}

fn spec(n: u32) -> JobSpec {
    JobSpec {
        prompt: "a kitchen knife on a white background".to_owned(),
        n,
        seed: Some(11),
        max_shard_size: 1,
        ..Default::default()
    }
}

/// What is on the images of a job; nothing where one was withheld.
async fn outcome(sandbox: &Sandbox, job: &Job) -> Result<Vec<Vec<u8>>> {
    let mut outcome = Vec::new();
    for image in &job.images {
        outcome.push(match sandbox.png(&job.job_id, image.index).await {
            Ok(png) => pixels(&png)?,
            Err(status) if status.code() == Code::FailedPrecondition => Vec::new(),
            Err(status) => return Err(status.into()),
        });
    }
    Ok(outcome)
}

async fn completed(sandbox: &Sandbox, spec: JobSpec) -> Result<Vec<Vec<u8>>> {
    let job = sandbox.finish(&sandbox.submit(spec).await?).await?;
    assert_eq!(job.state(), JobState::Completed, "{}", job.reason);
    outcome(sandbox, &job).await
}

fn each(sandbox: &Sandbox) -> Result<Vec<GenerationServiceClient<Channel>>> {
    let addresses = sandbox.address().split(',');
    addresses
        .map(|address| {
            Ok(GenerationServiceClient::new(grpc::channel(address, PATIENCE, &Tls::default())?))
        })
        .collect()
}

/// The worker is attached to one of two coordinators; the job is watched and cancelled at either.
#[tokio::test]
async fn any_coordinator_watches_and_cancels_any_job() -> Result<()> {
    let sandbox = cluster(&["one", "other"]).await?;
    for mut coordinator in each(&sandbox)? {
        let job = sandbox.submit(spec(64)).await?;
        let watch = WatchJobRequest { job_id: job.job_id.clone(), after_sequence: 0 };
        let mut events = coordinator.watch_job(watch).await?.into_inner();
        let step = async {
            while let Some(response) = events.message().await? {
                if matches!(response.event, Some(Event::Progress(_))) {
                    return Ok(());
                }
            }
            bail!("the watch ended")
        };
        timeout(PATIENCE, step).await.context("no progress was heard")??;
        coordinator.cancel_job(CancelJobRequest { job_id: job.job_id.clone() }).await?;
        let job = sandbox.finish(&job).await?;
        assert_eq!(job.state(), JobState::Cancelled);
    }
    // The worker was told to stop: it has room.
    completed(&sandbox, spec(1)).await.map(drop)
}

/// A job in whose middle something dies ends with the images of a calm one.
async fn outlives(kill: impl AsyncFnOnce(&mut Sandbox) -> Result<()>) -> Result<()> {
    let mut sandbox = cluster(&["one", "other"]).await?;
    let calm = completed(&sandbox, spec(4)).await?;
    let job = sandbox.submit(spec(4)).await?;
    sandbox.until_step(&job, |_| true).await?;
    kill(&mut sandbox).await?;
    let job = sandbox.finish(&job).await?;
    assert_eq!(job.state(), JobState::Completed, "{}", job.reason);
    assert_eq!(outcome(&sandbox, &job).await?, calm);
    Ok(())
}

#[tokio::test]
async fn a_job_outlives_the_coordinators_that_are_killed() -> Result<()> {
    outlives(async |sandbox| sandbox.kill("one").await).await
}

#[tokio::test]
async fn a_job_outlives_a_redis_that_is_killed() -> Result<()> {
    outlives(async |sandbox| {
        sandbox.redis_mut().kill();
        sandbox.redis_mut().restart();
        Ok(())
    })
    .await
}

/// It answers nothing for longer than a call waits, and for less than all calls together do.
#[tokio::test]
async fn a_job_outlives_a_redis_that_stands_still() -> Result<()> {
    outlives(async |sandbox| {
        sandbox.redis().signal("STOP");
        tokio::time::sleep(std::time::Duration::from_secs(3)).await;
        sandbox.redis().signal("CONT");
        Ok(())
    })
    .await
}

#[tokio::test]
async fn queued_jobs_outlive_a_redis_that_is_killed() -> Result<()> {
    let mut sandbox = cluster(&["one", "other"]).await?;
    let calm = completed(&sandbox, spec(1)).await?;
    let mut jobs = Vec::new();
    for _ in 0..6 {
        jobs.push(sandbox.submit(spec(1)).await?);
    }
    sandbox.redis_mut().kill();
    sandbox.redis_mut().restart();
    for job in &jobs {
        let job = sandbox.finish(job).await?;
        assert_eq!(job.state(), JobState::Completed, "{}", job.reason);
        assert_eq!(outcome(&sandbox, &job).await?, calm);
    }
    Ok(())
}

/// Submits a job again while members are missed.
async fn admitted(submit: impl AsyncFn() -> Result<Job, Status>) -> Result<Job> {
    let admitted = async {
        loop {
            match submit().await {
                Err(status) if status.code() == Code::Unavailable => {
                    tokio::time::sleep(Duration::from_millis(20)).await;
                }
                answer => return answer,
            }
        }
    };
    Ok(timeout(PATIENCE, admitted).await.context("the job is never admitted")??)
}

/// It takes calls and answers none. Worker and node are each with one of the two, by chance.
#[tokio::test]
async fn a_coordinator_that_freezes_is_left() -> Result<()> {
    let sandbox = cluster(&["one", "other"]).await?;
    let calm = completed(&sandbox, spec(1)).await?;
    let coordinators = each(&sandbox)?;
    for (frozen, awake) in [("one", &coordinators[1]), ("other", &coordinators[0])] {
        sandbox.signal(frozen, "STOP").await?;
        let job = admitted(async || {
            let request = SubmitJobRequest { spec: Some(spec(1)), ..Default::default() };
            let answer = awake.clone().submit_job(request).await?.into_inner();
            answer.job.ok_or_else(|| Status::internal("no job"))
        });
        let watch = WatchJobRequest { job_id: job.await?.job_id, after_sequence: 0 };
        let mut events = awake.clone().watch_job(watch).await?.into_inner();
        let ended = async {
            while let Some(response) = events.message().await? {
                match response.event {
                    Some(Event::Job(job)) if job.state() == JobState::Completed => return Ok(job),
                    Some(Event::Job(job)) if job.state() == JobState::Failed => bail!(job.reason),
                    _ => {}
                }
            }
            bail!("the watch ended")
        };
        let job = timeout(PATIENCE, ended).await.with_context(|| format!("without {frozen}"))??;
        sandbox.signal(frozen, "CONT").await?;
        assert_eq!(outcome(&sandbox, &job).await?, calm);
    }
    Ok(())
}

/// What a flush deletes is gone, but the cluster goes on.
#[tokio::test]
async fn a_flushed_redis_serves_new_jobs() -> Result<()> {
    let sandbox = cluster(&["one"]).await?;
    let calm = completed(&sandbox, spec(1)).await?;
    let lost = sandbox.submit(spec(8)).await?;
    sandbox.until_step(&lost, |_| true).await?;
    let mut watch = sandbox.watch(&lost).await?;
    assert_eq!(sandbox.redis().command("FLUSHALL")?, "+OK\r\n");
    let end = async {
        loop {
            if let Err(status) = watch.message().await {
                return status;
            }
        }
    };
    // Whoever watches what is lost hears of it.
    let status = tokio::time::timeout(PATIENCE, end).await?;
    assert_eq!(status.code(), tonic::Code::NotFound, "{status}");
    // The worker and the node are members again in a moment; until then jobs are refused.
    admitted(async || sandbox.submit(spec(1)).await).await?;
    assert_eq!(completed(&sandbox, spec(1)).await?, calm);
    Ok(())
}

/// Streams that somebody deletes come back from the records of the jobs.
#[tokio::test]
async fn lost_queues_come_back() -> Result<()> {
    let sandbox = cluster(&["one"]).await?;
    let job = sandbox.submit(spec(8)).await?;
    sandbox.until_step(&job, |_| true).await?;
    for key in ["places", "shards", "waits", "leases"] {
        let deleted = sandbox.redis().command(&format!("DEL {{fairlead}}:{key}"))?;
        assert_eq!(deleted, ":1\r\n", "{key}");
    }
    let job = sandbox.finish(&job).await?;
    assert_eq!(job.state(), JobState::Completed, "{}", job.reason);
    Ok(())
}
