//! Stops, kills and restarts.

use std::path::Path;

use fairlead_coordinator::{CoordinatorOptions, Data};
use fairlead_proto::v1::{self, CommitStatus, ImageStatus, JobState};
use tonic::Code;

use crate::{
    cluster::{Cluster, collect, options, patient, spec, statuses},
    node::{Node, Script},
    worker::{Worker, decode, pixels},
};

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
