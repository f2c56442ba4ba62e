//! Services that stand still, are cut off, die on their work or are told to stop; queues that are full.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use fairlead_common::grpc::Replicas;
use fairlead_proto::v1::{
    GetJobRequest, GetRecordRequest, Job, JobSpec, JobState, ListConceptsRequest, Priority,
    SubmitJobRequest, catalog_service_client::CatalogServiceClient,
    generation_service_client::GenerationServiceClient,
};
use fairlead_tests::{
    LENIENT, PATIENCE, Sandbox, asset, command, metrics,
    process::Process,
    proxy::{Flow, Proxy, Target},
};
use sha2::{Digest, Sha256};
use tokio::time::{sleep, timeout};
use tonic::{Code, Request, Status};
use tonic_types::StatusExt;

const POLL: Duration = Duration::from_millis(25);

/// A coordinator that shows metrics, with further arguments, an energy node "energy" and a worker "worker".
async fn sandbox(arguments: &[&str]) -> Result<Sandbox> {
    let policies = std::fs::read_to_string(asset("policies.toml"))? + LENIENT;
    let arguments = [arguments, &["--metrics-listen", "127.0.0.1:0"]].concat();
    let mut sandbox = Sandbox::with_policies(&policies, &arguments).await?;
    sandbox.energy("energy").await?;
    sandbox.worker("worker").await?;
    sandbox.ready().await?;
    Ok(sandbox)
}

/// One image that takes as long as so many steps.
fn spec(steps: u32) -> JobSpec {
    JobSpec {
        prompt: "an owl on a green background".to_owned(),
        n: 1,
        seed: Some(11),
        steps: Some(steps),
        policy: "lenient".to_owned(),
        ..Default::default()
    }
}

/// Waits until something holds.
async fn until(what: &str, holds: impl AsyncFn() -> Result<bool>) -> Result<()> {
    let wait = async {
        while !holds().await? {
            sleep(POLL).await;
        }
        Ok(())
    };
    timeout(PATIENCE, wait).await.with_context(|| format!("never: {what}"))?
}

/// How many deliveries of the coordinator had this outcome.
async fn deliveries(sandbox: &Sandbox, outcome: &str) -> Result<f64> {
    let (_, url) = sandbox.metrics().first().context("the coordinator shows metrics")?;
    let name = format!("fairlead_coordinator_deliveries_total{{outcome=\"{outcome}\"}}");
    Ok(metrics::scrape(url).await?.get(&name).copied().unwrap_or_default())
}

/// The pixels of a job's only image.
async fn pixels(sandbox: &Sandbox, job: &Job) -> Result<Vec<u8>> {
    ensure!(job.state() == JobState::Completed, "{:?}: {}", job.state(), job.reason);
    fairlead_tests::pixels(&sandbox.png(&job.job_id, 0).await?)
}

/// The worker that made a job's only image.
async fn maker(sandbox: &Sandbox, job: &Job) -> Result<String> {
    let record_id = job.images.first().context("an image")?.record_id.clone();
    let request = GetRecordRequest { record_id, ..Default::default() };
    let record = sandbox.client()?.get_record(request).await?.into_inner().record;
    Ok(record.context("a record")?.worker_id)
}

async fn calm(sandbox: &Sandbox, spec: JobSpec) -> Result<Vec<u8>> {
    let job = sandbox.finish(&sandbox.submit(spec).await?).await?;
    pixels(sandbox, &job).await
}

#[tokio::test]
async fn a_worker_that_stands_still_past_its_lease_worked_in_vain() -> Result<()> {
    let mut sandbox = sandbox(&["--lease-ttl", "1s"]).await?;
    let undisturbed = calm(&sandbox, spec(100)).await?;
    let job = sandbox.submit(spec(100)).await?;
    sandbox.until_step(&job, |_| true).await?;
    sandbox.signal("worker", "STOP").await?;
    sandbox.worker("other").await?;
    let job = sandbox.finish(&job).await?;
    assert_eq!(pixels(&sandbox, &job).await?, undisturbed);
    assert_eq!(maker(&sandbox, &job).await?, "other");
    assert_eq!(deliveries(&sandbox, "expired").await?, 1.0);

    // It drops what it was at and takes new work; what it dropped is committed by nobody.
    sandbox.kill("other").await?;
    sandbox.signal("worker", "CONT").await?;
    let next = sandbox.finish(&sandbox.submit(spec(25)).await?).await?;
    assert_eq!(maker(&sandbox, &next).await?, "worker");
    assert_eq!(deliveries(&sandbox, "committed").await?, 3.0);
    assert_eq!(maker(&sandbox, &job).await?, "other");
    Ok(())
}

/// It finishes the shard while it is cut off, so that its result arrives when another's has been accepted.
#[tokio::test]
async fn the_late_result_of_a_worker_that_was_cut_off_is_refused() -> Result<()> {
    let mut sandbox = sandbox(&["--lease-ttl", "8s"]).await?;
    let undisturbed = calm(&sandbox, spec(25)).await?;
    sandbox.kill("worker").await?;
    let line = Proxy::start(Some(Target::url(sandbox.address()))).await?;
    sandbox.worker_at("far", &line.url(), &[]).await?;
    sandbox.ready().await?;
    let job = sandbox.submit(spec(25)).await?;
    // It ends the shard before it gives up its stream, but not before the silence.
    sandbox.until_step(&job, |step| step.step >= 12).await?;
    line.set(Flow::Silent);
    sandbox.worker("near").await?;
    let job = sandbox.finish(&job).await?;
    assert_eq!(maker(&sandbox, &job).await?, "near");
    line.set(Flow::Open);
    until("a refused result", async || Ok(deliveries(&sandbox, "refused").await? == 1.0)).await?;
    assert_eq!(deliveries(&sandbox, "committed").await?, 2.0);
    assert_eq!(pixels(&sandbox, &job).await?, undisturbed);
    Ok(())
}

#[tokio::test]
async fn a_shard_waits_for_the_last_node_of_its_concepts_to_come_back() -> Result<()> {
    let mut sandbox = sandbox(&["--node-ttl", "1s", "--retry-delay", "100ms"]).await?;
    let undisturbed = calm(&sandbox, spec(100)).await?;
    let job = sandbox.submit(spec(100)).await?;
    sandbox.until_step(&job, |step| !step.scores.is_empty()).await?;
    sandbox.kill("energy").await?;
    let catalog = CatalogServiceClient::new(sandbox.channel()?);
    until("a node that is missed", async || {
        let served = catalog.clone().list_concepts(ListConceptsRequest {}).await?.into_inner();
        let failed = deliveries(&sandbox, "failed").await? >= 1.0;
        Ok(served.concepts.is_empty() && !served.absent.is_empty() && failed)
    })
    .await?;
    let request = GetJobRequest { job_id: job.job_id.clone() };
    let waiting = sandbox.client()?.get_job(request).await?.into_inner().job.context("a job")?;
    assert_eq!(waiting.state(), JobState::Running, "{}", waiting.reason);
    sandbox.energy("another").await?;
    let job = sandbox.finish(&job).await?;
    assert_eq!(pixels(&sandbox, &job).await?, undisturbed);
    Ok(())
}

#[tokio::test]
async fn a_shard_that_every_worker_dies_on_is_given_up() -> Result<()> {
    let mut sandbox = sandbox(&[]).await?;
    let job = sandbox.submit(spec(500)).await?;
    let mut deaths = 0;
    // Ends with the job.
    while sandbox.until_step(&job, |_| true).await.is_ok() {
        deaths += 1;
        sandbox.kill("worker").await?;
        sandbox.worker("worker").await?;
    }
    let job = sandbox.finish(&job).await?;
    assert_eq!(job.state(), JobState::Failed);
    assert!(deaths >= 5, "{deaths} deaths");
    for words in ["5 attempt(s)", "worker worker", "went away"] {
        assert!(job.reason.contains(words), "`{words}` is not in: {}", job.reason);
    }
    // The workers were not to blame: the last one takes the next job.
    sandbox.ready().await?;
    calm(&sandbox, spec(25)).await.map(drop)
}

#[tokio::test]
async fn a_worker_that_is_told_to_stop_finishes_or_hands_back() -> Result<()> {
    let mut sandbox = sandbox(&[]).await?;
    let finished = sandbox.submit(spec(100)).await?;
    sandbox.until_step(&finished, |_| true).await?;
    let mut worker = sandbox.take("worker")?;
    worker.signal("TERM").await?;
    assert!(worker.ended(PATIENCE).await?.success());
    let finished = sandbox.finish(&finished).await?;
    assert_eq!(maker(&sandbox, &finished).await?, "worker");

    let address = sandbox.address().to_owned();
    sandbox.worker_at("hasty", &address, &["--drain-timeout", "0.01"]).await?;
    sandbox.ready().await?;
    let handed_back = sandbox.submit(spec(100)).await?;
    sandbox.until_step(&handed_back, |_| true).await?;
    let mut hasty = sandbox.take("hasty")?;
    hasty.signal("TERM").await?;
    assert!(hasty.ended(PATIENCE).await?.success());
    sandbox.worker("another").await?;
    let handed_back = sandbox.finish(&handed_back).await?;
    assert_eq!(maker(&sandbox, &handed_back).await?, "another");
    assert_eq!(pixels(&sandbox, &handed_back).await?, pixels(&sandbox, &finished).await?);
    assert_eq!(deliveries(&sandbox, "failed").await?, 0.0, "handing back is no failure");
    Ok(())
}

/// Tells a process to stop until it does; says how it ended.
async fn insist(mut process: Process) -> Result<Option<i32>> {
    let ended = async {
        loop {
            process.signal("TERM").await?;
            if let Ok(status) = process.ended(POLL).await {
                return anyhow::Ok(status.code());
            }
        }
    };
    timeout(PATIENCE, ended).await.context("it does not listen")?
}

#[tokio::test]
async fn a_second_signal_ends_a_service_at_once() -> Result<()> {
    let mut sandbox = sandbox(&["--drain-timeout", "1h"]).await?;
    sandbox.kill("worker").await?;
    let address = sandbox.address().to_owned();
    sandbox.worker_at("patient", &address, &["--drain-timeout", "3600"]).await?;
    sandbox.ready().await?;
    let job = sandbox.submit(JobSpec { n: 16, max_shard_size: 16, ..spec(500) }).await?;
    sandbox.until_step(&job, |_| true).await?;
    assert_eq!(insist(sandbox.take("patient")?).await?, Some(130));
    sandbox.worker("worker").await?;
    sandbox.until_step(&job, |_| true).await?;
    assert_eq!(insist(sandbox.take("coordinator")?).await?, Some(130));
    Ok(())
}

/// Shards that a worker holds at once unless it is told otherwise.
const CAPACITY: usize = 3;

#[tokio::test]
async fn a_full_queue_says_when_to_come_back() -> Result<()> {
    let sandbox = sandbox(&["--max-queued", "2"]).await?;
    // It holds as many shards as it is said to; once it has them, the others wait.
    sandbox.signal("worker", "STOP").await?;
    let mut accepted = Vec::new();
    for _ in 0..CAPACITY {
        let job = sandbox.submit(spec(25)).await?;
        sandbox.until_running(&job).await?;
        accepted.push(job);
    }
    let refused = loop {
        match sandbox.submit(spec(25)).await {
            Ok(job) => accepted.push(job),
            Err(status) => break status,
        }
        ensure!(accepted.len() < CAPACITY + 10, "the queue has no end");
    };
    assert_eq!(refused.code(), Code::ResourceExhausted, "{refused}");
    assert!(refused.message().contains("--max-queued"), "{}", refused.message());
    let retry = refused.get_details_retry_info().and_then(|info| info.retry_delay);
    assert!(retry.context("it does not say when")? > Duration::ZERO);

    // A command comes back by itself, and again.
    let mut generate = command();
    generate
        .args(["generate", "a banana", "--seed", "5", "--out", ".", "--server", sandbox.address()])
        .current_dir(sandbox.folder());
    let generate = tokio::spawn(timeout(PATIENCE, generate.output()));
    let (_, url) = sandbox.metrics().first().context("the coordinator shows metrics")?;
    until("a second refusal of the command", async || {
        let refused = "fairlead_coordinator_jobs_refused_total";
        Ok(metrics::scrape(url).await?.get(refused).is_some_and(|count| *count >= 3.0))
    })
    .await?;
    sandbox.signal("worker", "CONT").await?;
    let output = generate.await???;
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    for job in &accepted {
        assert_eq!(sandbox.finish(job).await?.state(), JobState::Completed);
    }
    Ok(())
}

type Clients = GenerationServiceClient<Replicas>;

/// A call with a tenant's key, repeated while the cluster is not ready.
async fn as_tenant<T: Clone, R>(
    key: &str,
    message: T,
    call: impl AsyncFn(Request<T>) -> Result<R, Status>,
) -> Result<R> {
    let attempts = async {
        loop {
            let mut request = Request::new(message.clone());
            request.metadata_mut().insert("authorization", format!("Bearer {key}").parse()?);
            match call(request).await {
                Err(status) if status.code() == Code::Unavailable => sleep(POLL).await,
                answer => return anyhow::Ok(answer?),
            }
        }
    };
    timeout(PATIENCE, attempts).await.context("no answer")?
}

async fn submitted(clients: &Clients, key: &str, spec: JobSpec) -> Result<String> {
    let message = SubmitJobRequest { spec: Some(spec), ..Default::default() };
    let answer = as_tenant(key, message, async |request| clients.clone().submit_job(request).await);
    Ok(answer.await?.into_inner().job.context("a job")?.job_id)
}

/// When a job was completed.
async fn completed(clients: &Clients, key: &str, job_id: &str) -> Result<i64> {
    let wait = async {
        loop {
            let message = GetJobRequest { job_id: job_id.to_owned() };
            let call = async |request| clients.clone().get_job(request).await;
            let job = as_tenant(key, message, call).await?.into_inner().job.context("a job")?;
            match job.state() {
                JobState::Completed => return Ok(job.updated_unix_ms),
                JobState::Queued | JobState::Running => sleep(POLL).await,
                other => anyhow::bail!("{other:?}: {}", job.reason),
            }
        }
    };
    timeout(PATIENCE, wait).await.context("the job did not end")?
}

#[tokio::test]
async fn a_tenant_with_two_jobs_need_not_wait_for_another_with_ten() -> Result<()> {
    let mut policies = std::fs::read_to_string(asset("policies.toml"))?;
    for tenant in ["many", "few"] {
        let hash = hex::encode(Sha256::digest(tenant));
        policies += &format!("\n[tenants.{tenant}]\nkeys = [\"sha256:{hash}\"]\n");
    }
    let mut sandbox = Sandbox::with_policies(&policies, &[]).await?;
    sandbox.energy("energy").await?;
    sandbox.worker("worker").await?;
    let clients = sandbox.client()?;
    let spec = JobSpec {
        prompt: "an owl on a green background".to_owned(),
        n: 1,
        priority: Priority::Normal.into(),
        ..Default::default()
    };
    let first = submitted(&clients, "many", spec.clone()).await?;
    completed(&clients, "many", &first).await?;
    // Nothing is made before all have asked.
    sandbox.signal("worker", "STOP").await?;
    let (mut many, mut few) = (Vec::new(), Vec::new());
    for _ in 0..10 {
        many.push(submitted(&clients, "many", spec.clone()).await?);
    }
    for _ in 0..2 {
        few.push(submitted(&clients, "few", spec.clone()).await?);
    }
    sandbox.signal("worker", "CONT").await?;
    let (mut ends, mut last) = (Vec::new(), 0);
    for job in &few {
        last = last.max(completed(&clients, "few", job).await?);
    }
    for job in &many {
        ends.push(completed(&clients, "many", job).await?);
    }
    let after = ends.iter().filter(|end| **end > last).count();
    assert!(after >= 5, "{last}: {ends:?}");
    Ok(())
}
