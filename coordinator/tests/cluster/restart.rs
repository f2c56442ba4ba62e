//! Stops, kills and restarts.

use std::{path::Path, time::Duration};

use clap::Parser;
use fairlead_common::testing::RedisServer;
use fairlead_coordinator::{CoordinatorArgs, CoordinatorOptions, Data};
use fairlead_proto::v1::{self, CommitStatus, ImageStatus, JobState};
use tonic::Code;
use tonic_health::pb::{
    HealthCheckRequest, health_check_response::ServingStatus, health_client::HealthClient,
};

use crate::{
    cluster::{Cluster, assert_failed_naming, collect, options, patient, spec, statuses},
    node::{Node, Script},
    worker::{Worker, decode, pixels},
};

#[derive(Parser)]
struct Cli {
    #[command(flatten)]
    args: CoordinatorArgs,
}

fn on_disk(dir: &Path) -> CoordinatorOptions {
    CoordinatorOptions { data: Data::Dir(dir.to_owned()), ..options() }
}

/// One image released, one in work, one queued.
async fn halfway(cluster: &Cluster) -> (v1::Job, Worker) {
    let mut worker = Worker::attach(cluster, "w", 1).await;
    let job = cluster.submit(v1::JobSpec { max_shard_size: 1, ..spec(3) }).await.expect("valid");
    let first = worker.assignment().await;
    worker.complete(&first).await;
    assert_eq!(worker.commit_reply().await.status(), CommitStatus::Accepted);
    worker.assignment().await;
    (job, worker)
}

async fn ends_after_a_restart(dir: &Path, job: &v1::Job) {
    let cluster = Cluster::start(on_disk(dir)).await;
    let _node = Node::start(&cluster, "node", &["axe"], Script::Closed).await;
    let before = cluster.get(&job.job_id).await;
    assert_eq!(before.state(), JobState::Running);
    let released = cluster.image(&job.job_id, 0).await.expect("it was released");
    assert_eq!(decode(&released.png), pixels(0));
    Worker::attach(&cluster, "new", 1).await.complete_all();
    let events = collect(cluster.watch(&job.job_id, 3).await).await;
    let sequences: Vec<_> = events.iter().map(|event| event.sequence).collect();
    assert_eq!(sequences, [4, 5, 6], "events go on where they stopped");
    let job = cluster.get(&job.job_id).await;
    assert_eq!(job.state(), JobState::Completed);
    assert_eq!(statuses(&job), [ImageStatus::Released; 3]);
    let again = cluster.submit_with_key(spec(1), "").await.expect("it admits new jobs");
    assert_eq!(cluster.finished(&again.job_id).await.state(), JobState::Completed);
}

#[tokio::test]
async fn a_killed_coordinator_finishes_its_jobs_after_a_restart() {
    let dir = tempfile::tempdir().expect("a directory");
    let cluster = Cluster::start(on_disk(dir.path())).await;
    let _node = Node::start(&cluster, "node", &["axe"], Script::Closed).await;
    let (job, _worker) = halfway(&cluster).await;
    cluster.kill().await;
    ends_after_a_restart(dir.path(), &job).await;
}

/// Kills a coordinator of `options` while a shard is in work, again and again, then lets the shard be made.
async fn dies_often(options: CoordinatorOptions, times: u32) {
    let mut job_id = String::new();
    for life in 0..times {
        let cluster = Cluster::start(options.clone()).await;
        let _node = Node::start(&cluster, "node", &["axe"], Script::Closed).await;
        let mut worker = Worker::attach(&cluster, &format!("w{life}"), 1).await;
        if job_id.is_empty() {
            job_id = cluster.submit(spec(1)).await.expect("valid").job_id;
        }
        assert_eq!(worker.assignment().await.attempt, 1, "in life {life}");
        cluster.kill().await;
    }
    let cluster = Cluster::start(options).await;
    let _node = Node::start(&cluster, "node", &["axe"], Script::Closed).await;
    Worker::attach(&cluster, "last", 1).await.complete_all();
    assert_eq!(cluster.finished(&job_id).await.state(), JobState::Completed);
}

#[tokio::test]
async fn a_coordinator_that_is_killed_a_hundred_times_fails_no_job() {
    let dir = tempfile::tempdir().expect("a directory");
    dies_often(on_disk(dir.path()), 100).await;
}

#[tokio::test]
async fn what_dead_coordinators_of_a_redis_held_is_not_counted() {
    let dir = tempfile::tempdir().expect("a directory");
    let redis = RedisServer::start(dir.path());
    let mut arguments = vec!["fairlead", "--data-dir", dir.path().to_str().expect("text")];
    let url = redis.url();
    arguments.extend(["--redis", &url]);
    let Cli { args } = Cli::parse_from(arguments);
    let data = args.options().expect("no file is read").data;
    let lease_ttl = Duration::from_millis(300);
    dies_often(CoordinatorOptions { data, lease_ttl, ..options() }, 7).await;
}

/// Where the worker dies with its coordinator, the shard may be what killed both.
#[tokio::test]
async fn a_shard_that_kills_the_whole_process_stops_after_five_deliveries() {
    let dir = tempfile::tempdir().expect("a directory");
    let options = CoordinatorOptions { has_own_workers: true, ..on_disk(dir.path()) };
    let mut job_id = String::new();
    for attempt in 1..=5 {
        let cluster = Cluster::start(options.clone()).await;
        let _node = Node::start(&cluster, "node", &["axe"], Script::Closed).await;
        let mut worker = Worker::attach(&cluster, "w", 1).await;
        if job_id.is_empty() {
            job_id = cluster.submit(spec(1)).await.expect("valid").job_id;
        }
        assert_eq!(worker.assignment().await.attempt, attempt);
        cluster.kill().await;
    }
    let cluster = Cluster::start(options).await;
    assert_failed_naming(&cluster.finished(&job_id).await, &["5 attempt(s)", "process died"]);
}

#[tokio::test]
async fn a_stopped_coordinator_ends_its_streams_and_finishes_after_a_restart() {
    let dir = tempfile::tempdir().expect("a directory");
    let cluster = Cluster::start(on_disk(dir.path())).await;
    let _node = Node::start(&cluster, "node", &["axe"], Script::Closed).await;
    let (job, mut worker) = halfway(&cluster).await;
    let mut watch = cluster.watch(&job.job_id, 3).await;
    cluster.stop().await;
    let ended = patient(watch.message()).await.expect_err("the stream says why it ends");
    assert_eq!(ended.code(), Code::Unavailable);
    while let Ok(Some(_)) = worker.receive().await {}
    ends_after_a_restart(dir.path(), &job).await;
}

#[tokio::test]
async fn a_directory_that_is_held_or_no_directory_is_named() {
    let dir = tempfile::tempdir().expect("a directory");
    let first = Cluster::start(on_disk(dir.path())).await;
    let _up = Worker::attach(&first, "w", 1).await;
    let file = dir.path().join("a-file");
    std::fs::write(&file, "not a directory").expect("it is written");
    for (path, part) in [(dir.path(), "held by another coordinator"), (&file, "a-file")] {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("a free port");
        let run = fairlead_coordinator::run(listener, on_disk(path), Default::default());
        let error = patient(run).await.expect_err(part).to_string();
        assert!(error.contains(part), "{error}");
    }
}

async fn health(cluster: &Cluster) -> ServingStatus {
    let mut client = HealthClient::new(cluster.channel());
    let service = "fairlead.v1.GenerationService".to_owned();
    let answer = patient(client.check(HealthCheckRequest { service })).await;
    answer.expect("it is known").into_inner().status()
}

#[tokio::test]
async fn a_data_folder_that_is_taken_away_is_noticed() {
    let dir = tempfile::tempdir().expect("a directory");
    let (data, aside) = (dir.path().join("data"), dir.path().join("aside"));
    let cluster = Cluster::start(on_disk(&data)).await;
    let _node = Node::start(&cluster, "node", &["axe"], Script::Closed).await;
    let _worker = Worker::attach(&cluster, "w", 1).await;
    assert_eq!(health(&cluster).await, ServingStatus::Serving);
    let job = cluster.submit(spec(1)).await.expect("valid");
    std::fs::rename(&data, &aside).expect("it is moved");
    let refused = cluster.submit(spec(1)).await.expect_err("nothing can be stored");
    assert_eq!(refused.code(), Code::Unavailable, "{refused}");
    assert!(refused.message().contains("store"), "{refused}");
    assert!(!refused.message().contains(dir.path().to_str().expect("text")), "{refused}");
    let until = async |wanted| {
        while health(&cluster).await != wanted {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    patient(until(ServingStatus::NotServing)).await;
    assert!(!data.exists(), "nothing is made anew");
    std::fs::rename(&aside, &data).expect("it is put back");
    patient(until(ServingStatus::Serving)).await;
    assert_eq!(cluster.get(&job.job_id).await.job_id, job.job_id);
}
