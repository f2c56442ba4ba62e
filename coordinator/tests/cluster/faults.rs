//! Workers that fail, vanish or come back with stale results.

use std::time::Duration;

use fairlead_coordinator::CoordinatorOptions;
use fairlead_proto::v1::{
    self, CommitStatus, ImageStatus, JobState, ShardFailure, attach_request::Message as Up,
    attach_response::Message as Down,
};
use tonic::Code;

use crate::{
    cluster::{
        Cluster, assert_failed_naming, collect, impatient, options, patient, spec, statuses,
    },
    node::{Node, Script},
    worker::{Worker, hello, lease, model, released},
};

async fn start() -> (Cluster, Node) {
    let cluster = Cluster::start(options()).await;
    let node = Node::start(&cluster, "node", &["axe"], Script::Closed).await;
    (cluster, node)
}

#[tokio::test]
async fn a_stale_token_is_aborted_and_the_same_token_again_is_fine() {
    let (cluster, _node) = start().await;
    let mut worker = Worker::attach(&cluster, "w", 1).await;
    let job = cluster.submit(spec(1)).await.expect("valid");
    let old = worker.assignment().await;
    worker.fail(&old, "out of memory", true).await;
    let new = worker.assignment().await;
    assert!(lease(&new).token > lease(&old).token);
    assert_eq!((old.attempt, new.attempt), (1, 2));
    worker.complete(&old).await;
    let reply = worker.commit_reply().await;
    assert_eq!((reply.status(), reply.lease), (CommitStatus::Aborted, old.lease.clone()));
    assert!(reply.reason.contains("stale"), "{}", reply.reason);
    worker.complete(&new).await;
    assert_eq!(worker.commit_reply().await.status(), CommitStatus::Accepted);
    worker.done(&lease(&new)).await;
    assert_eq!(worker.commit_reply().await.status(), CommitStatus::Accepted, "again is fine");
    worker.done(&lease(&old)).await;
    assert_eq!(worker.commit_reply().await.status(), CommitStatus::Aborted);
    // A worker that reconnects learns the same.
    drop(worker);
    let mut worker = Worker::attach(&cluster, "w", 1).await;
    worker.done(&lease(&new)).await;
    assert_eq!(worker.commit_reply().await.status(), CommitStatus::Accepted);
    assert_eq!(cluster.finished(&job.job_id).await.state(), JobState::Completed);
}

#[tokio::test]
async fn another_worker_finishes_what_a_lost_one_began() {
    let (cluster, _node) = start().await;
    let mut lost = Worker::attach(&cluster, "lost", 1).await;
    let job = cluster.submit(spec(2)).await.expect("valid");
    let begun = lost.assignment().await;
    lost.send(Up::Image(released(&lease(&begun), 0))).await;
    let mut other = Worker::attach(&cluster, "other", 1).await;
    drop(lost);
    let shard = other.assignment().await;
    assert_eq!((shard.attempt, shard.images.len()), (2, 2));
    other.complete(&shard).await;
    assert_eq!(other.commit_reply().await.status(), CommitStatus::Accepted);
    let job = cluster.finished(&job.job_id).await;
    assert_eq!(statuses(&job), [ImageStatus::Released; 2]);
    let record = cluster.record(&job.images[0].record_id).await.expect("it was stored");
    assert_eq!(record.worker_id, "other");
}

#[tokio::test]
async fn a_job_whose_generator_is_gone_does_not_wait_for_ever() {
    let cluster = Cluster::start(impatient()).await;
    let _node = Node::start(&cluster, "node", &["axe"], Script::Closed).await;
    let mut worker = Worker::attach(&cluster, "w", 1).await;
    let job = cluster.submit(spec(1)).await.expect("valid");
    worker.assignment().await;
    drop(worker);
    let job = cluster.finished(&job.job_id).await;
    assert_failed_naming(&job, &["generator `sd`", "hash-of-sd"]);
}

#[tokio::test]
async fn a_shard_that_is_handed_back_is_not_counted_against_it() {
    let (cluster, _node) = start().await;
    let mut worker = Worker::attach(&cluster, "w", 1).await;
    let job = cluster.submit(spec(1)).await.expect("valid");
    for _ in 0..10 {
        let shard = worker.assignment().await;
        assert_eq!(shard.attempt, 1);
        let failure = ShardFailure {
            lease: Some(lease(&shard)),
            reason: "the worker is leaving".into(),
            retryable: true,
            handed_back: true,
            ..Default::default()
        };
        worker.send(Up::Failure(failure)).await;
    }
    worker.complete_all();
    assert_eq!(cluster.finished(&job.job_id).await.state(), JobState::Completed);
}

#[tokio::test]
async fn a_worker_that_leaves_after_its_commit_has_not_worked_in_vain() {
    let (cluster, _node) = start().await;
    let mut worker = Worker::attach(&cluster, "w", 1).await;
    let job = cluster.submit(spec(1)).await.expect("valid");
    let shard = worker.assignment().await;
    worker.complete(&shard).await;
    worker.commit_reply().await;
    drop(worker);
    assert_eq!(cluster.finished(&job.job_id).await.state(), JobState::Completed);
}

#[tokio::test]
async fn a_worker_that_attaches_twice_loses_its_old_stream() {
    let (cluster, _node) = start().await;
    let mut old = Worker::attach(&cluster, "w", 1).await;
    cluster.submit(spec(1)).await.expect("valid");
    old.assignment().await;
    let mut new = Worker::attach(&cluster, "w", 1).await;
    assert_eq!(new.assignment().await.attempt, 2);
    assert!(matches!(old.receive().await, Ok(None) | Err(_)));
}

#[tokio::test]
async fn a_lease_that_is_not_renewed_ends_and_the_shard_goes_on() {
    let options = CoordinatorOptions { lease_ttl: Duration::from_millis(400), ..options() };
    let cluster = Cluster::start(options).await;
    let _node = Node::start(&cluster, "node", &["axe"], Script::Closed).await;
    let mut stuck = Worker::attach(&cluster, "stuck", 1).await;
    let job = cluster.submit(spec(1)).await.expect("valid");
    let shard = stuck.assignment().await;
    Worker::attach(&cluster, "healthy", 1).await.complete_all();
    let cancel = stuck.cancelled().await;
    assert_eq!(cancel.lease, shard.lease);
    let leases = vec![lease(&shard)];
    stuck.send(Up::Renewal(v1::LeaseRenewal { leases: leases.clone() })).await;
    let renewed = stuck
        .until(|message| match message {
            Down::Renewed(renewed) => Some(renewed),
            _ => None,
        })
        .await;
    assert_eq!((renewed.renewed.len(), renewed.lost), (0, leases));
    assert_eq!(cluster.finished(&job.job_id).await.state(), JobState::Completed);
}

#[tokio::test]
async fn a_poison_shard_stops_after_five_deliveries() {
    let (cluster, _node) = start().await;
    let mut worker = Worker::attach(&cluster, "w", 1).await;
    let job = cluster.submit(spec(2)).await.expect("valid");
    for attempt in 1..=5 {
        let shard = worker.assignment().await;
        assert_eq!(shard.attempt, attempt);
        worker.fail(&shard, "kernel panic", true).await;
    }
    let job = cluster.finished(&job.job_id).await;
    assert_failed_naming(&job, &["images 0-1", "5 attempt(s)", "worker w: kernel panic"]);
}

#[tokio::test]
async fn a_failure_that_no_retry_helps_ends_the_shard_but_not_its_siblings() {
    let (cluster, _node) = start().await;
    let mut worker = Worker::attach(&cluster, "w", 2).await;
    let job = cluster.submit(v1::JobSpec { max_shard_size: 1, ..spec(2) }).await.expect("valid");
    let (bad, good) = (worker.assignment().await, worker.assignment().await);
    worker.fail(&bad, "latent is not finite", false).await;
    worker.complete(&good).await;
    let job = cluster.finished(&job.job_id).await;
    assert_eq!(job.state(), JobState::Failed);
    assert!(job.reason.contains("1 attempt(s)") && job.reason.contains("not finite"));
    assert_eq!(job.images[bad.images[0].index as usize].status(), ImageStatus::Failed);
    assert_eq!(job.images[good.images[0].index as usize].status(), ImageStatus::Released);
}

#[tokio::test]
async fn a_cancelled_job_stops_its_worker_and_refuses_what_comes_late() {
    let (cluster, node) = start().await;
    let mut worker = Worker::attach(&cluster, "w", 1).await;
    let spec = v1::JobSpec { max_shard_size: 1, ..spec(2) };
    let job = cluster.submit(spec).await.expect("valid");
    let running = worker.assignment().await;
    let watch = cluster.watch(&job.job_id, 0).await;
    let cancelled = cluster.cancel(&job.job_id).await.expect("it runs");
    assert_eq!(cancelled.state(), JobState::Cancelled);
    assert_eq!(statuses(&cancelled), [ImageStatus::Cancelled; 2]);
    assert_eq!(worker.cancelled().await.lease, running.lease);
    worker.complete(&running).await;
    assert_eq!(worker.commit_reply().await.status(), CommitStatus::Aborted);
    let last = collect(watch).await.pop().expect("events");
    let again = cluster.cancel(&job.job_id).await.expect("cancelling twice is fine");
    assert_eq!(last.event, Some(v1::watch_job_response::Event::Job(again)));
    cluster.image(&job.job_id, 0).await.expect_err("nothing is released");
    assert!(node.asked().is_empty(), "a late image is not even checked");
    // The worker is free for the next job.
    let next = cluster.submit(super::cluster::spec(1)).await.expect("valid");
    assert_eq!(worker.assignment().await.job_id, next.job_id);
}

#[tokio::test]
async fn strangers_are_refused_with_the_reason() {
    let (cluster, _node) = start().await;
    let _first = Worker::attach(&cluster, "first", 1).await;
    let mut old = hello("old", 1);
    old.protocol_version = 99;
    let mut twice = hello("twice", 1);
    twice.models.push(model());
    let cases = [
        (old, Code::FailedPrecondition, "speaks protocol 99"),
        (hello("w\u{1b}[2J", 1), Code::InvalidArgument, "hello.worker_id: `w\\u{1b}[2J`"),
        (twice, Code::InvalidArgument, "`sd` twice"),
        (hello("", 1), Code::InvalidArgument, "hello.worker_id"),
        (hello("idle", 0), Code::InvalidArgument, "hello.capacity: is 0"),
    ];
    for (hello, code, expected) in cases {
        let mut worker = Worker::open(&cluster, Up::Hello(hello)).await;
        let status = worker.receive().await.expect_err(expected);
        assert_eq!(status.code(), code, "{status}");
        assert!(status.message().contains(expected), "{status}");
    }
    let mut rude = Worker::open(&cluster, Up::Draining(v1::WorkerDraining {})).await;
    let status = rude.receive().await.expect_err("it said no hello");
    assert!(status.message().contains("hello: must be the first message"), "{status}");
}

#[tokio::test]
async fn a_worker_that_took_a_models_name_first_keeps_nobody_out() {
    let (cluster, _node) = start().await;
    let mut impostor = hello("aaa", 1);
    impostor.models[0].hash = "other-weights".into();
    impostor.models[0].max_side = 8;
    let mut impostor = Worker::open(&cluster, Up::Hello(impostor)).await;
    impostor.welcome().await;
    let mut worker = Worker::attach(&cluster, "worker", 1).await;
    let job = cluster.submit(super::cluster::spec(1)).await.expect("the real model is there");
    assert!(job.notices[0].contains("`sd@hash-of-sd`"), "{:?}", job.notices);
    assert_eq!(worker.assignment().await.job_id, job.job_id);
    let listed = patient(cluster.catalog().list_models(v1::ListModelsRequest {})).await;
    assert_eq!(listed.expect("a list").into_inner().models.len(), 2);
}

#[tokio::test]
async fn a_result_that_tells_more_than_there_was_is_not_taken() {
    let (cluster, node) = start().await;
    let mut worker = Worker::attach(&cluster, "worker", 2).await;
    let job = cluster.submit(super::cluster::spec(1)).await.expect("valid");
    let assignment = worker.assignment().await;
    let mut outcome = released(&assignment.lease.clone().expect("a lease"), 0);
    outcome.notices = vec!["read this".into(); 65];
    worker.send(Up::Image(outcome)).await;
    let again = worker.assignment().await;
    assert_eq!((again.job_id, again.attempt), (job.job_id, 2));
    assert!(node.asked().is_empty(), "it is not even checked");
}
