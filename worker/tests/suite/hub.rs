//! The hub against a coordinator and energy nodes over real gRPC.

use std::{sync::mpsc::Sender, time::Duration};

use fairlead_common::tls::Tls;
use fairlead_proto::v1::{
    CommitReply, CommitStatus, EnergyEndpoint, ImageStatus, ImageTask, JobSpec, LeaseRef,
    LeaseRenewed, NodeUpdate, PinnedPolicy, ShardAssignment, ShardCancel, ShardFailure,
    SteeringParams, attach_request::Message, attach_response::Message as Reply,
};
use fairlead_worker::{Engine, EngineHandle, Hub, HubOptions, Result};
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

use crate::{
    cluster::{Attachment, Coordinator, Flaw, Node},
    toy::{Fault, ToyGenerator, concept},
};

const GATE: f32 = 1.0;

/// Lower than any z.
const ALWAYS_OPEN: f32 = -100.0;

/// Higher than any z.
const NEVER_OPEN: f32 = 100.0;

const TTL: Duration = Duration::from_secs(30);

fn lease(token: u64) -> LeaseRef {
    LeaseRef { shard_id: "shard-1".into(), token }
}

fn assignment(token: u64, n: u32, energies: Vec<EnergyEndpoint>) -> ShardAssignment {
    let images = (0..n)
        .map(|index| ImageTask {
            index,
            seed: 100 + u64::from(index),
            record_id: format!("record-{index}"),
        })
        .collect();
    ShardAssignment {
        lease: Some(lease(token)),
        job_id: "job-1".into(),
        spec: Some(JobSpec {
            model: "toy".into(),
            prompt: "a rose".into(),
            width: Some(16),
            height: Some(16),
            steps: Some(20),
            guidance_scale: Some(1.5),
            ..Default::default()
        }),
        policy: Some(PinnedPolicy {
            concepts: vec![concept("red")],
            steering: Some(SteeringParams {
                eta: Some(0.6),
                smoothing: Some(0.5),
                cap: Some(10.0),
                ..Default::default()
            }),
            ..Default::default()
        }),
        images,
        energies,
        traceparent: String::new(),
        attempt: 1,
    }
}

/// A worker with the toy model; its denoiser takes a permit at every call if `permits` is given.
struct Worker {
    shutdown: CancellationToken,
    task: JoinHandle<Result<()>>,
}

impl Worker {
    async fn start(coordinator: &Coordinator) -> Self {
        Self::with(coordinator, ToyGenerator::new()).await
    }

    async fn stepwise(coordinator: &Coordinator) -> (Self, Sender<()>) {
        let (permit, permits) = std::sync::mpsc::channel();
        let mut generator = ToyGenerator::new();
        generator.permits = Some(permits.into());
        (Self::with(coordinator, generator).await, permit)
    }

    async fn with(coordinator: &Coordinator, generator: ToyGenerator) -> Self {
        let load = move || Ok(Engine::new(Box::new(generator), 4));
        let engine = EngineHandle::spawn("toy", 0, 1, load).await.expect("the toy loads");
        let options = HubOptions {
            tls: Tls::default(),
            coordinator: coordinator.address.clone(),
            worker_id: "worker-a".into(),
            capacity: 2,
            energy_timeout: Duration::from_millis(1500),
            drain_timeout: Duration::from_secs(20),
        };
        let shutdown = CancellationToken::new();
        let task = tokio::spawn(Hub::new(options, vec![engine]).run(shutdown.clone()));
        Self { shutdown, task }
    }

    /// Stops a worker that holds nothing; it ends the stream.
    async fn stop(self, mut attachment: Attachment) {
        self.shutdown.cancel();
        assert!(matches!(attachment.result().await, Some(Message::Draining(_))));
        assert!(attachment.result().await.is_none());
        drop(attachment);
        self.task.await.expect("no panic").expect("a clean end");
    }

    /// Stops a worker that is about to be done with token 1.
    async fn stop_after_commit(self, mut attachment: Attachment) {
        assert!(matches!(attachment.result().await, Some(Message::Done(_))));
        let lease = Some(lease(1));
        attachment.send(Reply::Commit(CommitReply { lease, ..Default::default() })).await;
        self.stop(attachment).await;
    }

    /// Stops a worker whose coordinator is gone.
    async fn stop_alone(self) {
        self.shutdown.cancel();
        self.task.await.expect("no panic").expect("a clean end");
    }
}

async fn failure(attachment: &mut Attachment) -> ShardFailure {
    match attachment.result().await {
        Some(Message::Failure(failure)) => failure,
        other => panic!("expected a failure, got {other:?}"),
    }
}

/// Waits for the next step of a shard.
async fn step(attachment: &mut Attachment) {
    loop {
        match attachment.next().await {
            Some(Message::Progress(_)) => return,
            Some(Message::Renewal(_)) => {}
            other => panic!("expected a step, got {other:?}"),
        }
    }
}

#[tokio::test]
async fn a_shard_becomes_images_then_done_then_a_commit() {
    let mut coordinator = Coordinator::start().await;
    let node = Node::start("node-a", GATE, Flaw::None).await;
    let worker = Worker::start(&coordinator).await;
    let mut attachment = coordinator.greet(TTL).await;
    for token in [1, 2] {
        let energies = vec![node.endpoint.clone()];
        attachment.send(Reply::Assignment(assignment(token, 3, energies))).await;
        let mut seen = Vec::new();
        loop {
            match attachment.result().await {
                Some(Message::Image(image)) => {
                    assert_eq!(image.lease, Some(lease(token)));
                    let record = image.report.as_ref().expect("a report");
                    assert_eq!(record.energy_nodes, ["node-a toy-energy"]);
                    assert_eq!(record.calibrations, ["calibration-1"]);
                    assert_eq!(image.status() == ImageStatus::Withheld, image.pixels.is_empty());
                    seen.push(image.index);
                }
                Some(Message::Done(done)) => {
                    assert_eq!(done.lease, Some(lease(token)));
                    break;
                }
                other => panic!("unexpected {other:?}"),
            }
        }
        seen.sort_unstable();
        assert_eq!(seen, [0, 1, 2]);
        let lease = Some(lease(token));
        let status = CommitStatus::Accepted.into();
        attachment.send(Reply::Commit(CommitReply { lease, status, reason: String::new() })).await;
    }
    worker.stop(attachment).await;
}

#[tokio::test]
async fn an_energy_node_that_cannot_be_trusted_fails_the_shard_and_releases_nothing() {
    let mut coordinator = Coordinator::start().await;
    let worker = Worker::start(&coordinator).await;
    let mut attachment = coordinator.greet(TTL).await;
    let cases = [
        (Flaw::NanScore, "not all finite", true),
        (Flaw::NanGradient, "not finite", true),
        (Flaw::ZeroGradient, "zero", true),
        (Flaw::WrongShape, "shape", true),
        (Flaw::NoGradient, "missing", true),
        (Flaw::MissingConcept, "no score for concept red", true),
        (Flaw::Gone, "going away", true),
        (Flaw::Late, "no answer within", true),
        (Flaw::NoCalibration, "fairlead calibrate", false),
        (Flaw::OtherBytes, "judged image", true),
    ];
    for (i, (flaw, reason, retryable)) in cases.into_iter().enumerate() {
        let node = Node::start("node-a", ALWAYS_OPEN, flaw).await;
        let energies = vec![node.endpoint.clone()];
        attachment.send(Reply::Assignment(assignment(i as u64, 2, energies))).await;
        let failure = failure(&mut attachment).await;
        assert!(failure.reason.contains(reason), "{flaw:?}: {}", failure.reason);
        assert!(failure.reason.contains("node-a") && failure.reason.contains("red"), "{flaw:?}");
        assert_eq!(failure.retryable, retryable, "{flaw:?}");
        assert!(!failure.cancelled);
    }
    worker.stop(attachment).await;
}

#[tokio::test]
async fn a_concept_that_no_node_serves_fails_the_shard() {
    let mut coordinator = Coordinator::start().await;
    let worker = Worker::start(&coordinator).await;
    let mut attachment = coordinator.greet(TTL).await;
    attachment.send(Reply::Assignment(assignment(1, 1, Vec::new()))).await;
    let failure = failure(&mut attachment).await;
    assert!(failure.reason.contains("red") && failure.retryable, "{}", failure.reason);
    worker.stop(attachment).await;
}

#[tokio::test]
async fn another_node_takes_over_within_the_step() {
    let mut coordinator = Coordinator::start().await;
    let worker = Worker::start(&coordinator).await;
    let mut attachment = coordinator.greet(TTL).await;
    for (token, flaw) in [(1, Flaw::Gone), (2, Flaw::NanGradient), (3, Flaw::Late)] {
        let broken = Node::start("node-a", ALWAYS_OPEN, flaw).await;
        let sound = Node::start("node-b", ALWAYS_OPEN, Flaw::None).await;
        let energies = vec![broken.endpoint.clone(), sound.endpoint.clone()];
        attachment.send(Reply::Assignment(assignment(token, 1, energies))).await;
        let Some(Message::Image(image)) = attachment.result().await else {
            panic!("{flaw:?}: no image");
        };
        let nodes = &image.report.as_ref().expect("a report").energy_nodes;
        assert_eq!(nodes, &["node-a toy-energy", "node-b toy-energy"]);
        assert!(matches!(attachment.result().await, Some(Message::Done(_))));
        let lease = Some(lease(token));
        attachment.send(Reply::Commit(CommitReply { lease, ..Default::default() })).await;
    }
    worker.stop(attachment).await;
}

#[tokio::test]
async fn a_node_update_saves_a_shard_whose_node_went_away() {
    let mut coordinator = Coordinator::start().await;
    let (worker, permit) = Worker::stepwise(&coordinator).await;
    let mut attachment = coordinator.greet(TTL).await;
    let broken = Node::start("node-a", GATE, Flaw::Gone).await;
    let energies = vec![broken.endpoint.clone()];
    attachment.send(Reply::Assignment(assignment(1, 1, energies))).await;
    permit.send(()).expect("the engine waits");
    step(&mut attachment).await;
    let sound = Node::start("node-b", GATE, Flaw::None).await;
    let update = NodeUpdate { shard_id: "shard-1".into(), energies: vec![sound.endpoint.clone()] };
    attachment.send(Reply::Nodes(update)).await;
    for _ in 0..100 {
        permit.send(()).expect("the engine waits");
    }
    assert!(matches!(attachment.result().await, Some(Message::Image(_))));
    worker.stop_after_commit(attachment).await;
}

#[tokio::test]
async fn a_cancelled_shard_stops_within_a_step_and_says_so() {
    let mut coordinator = Coordinator::start().await;
    let node = Node::start("node-a", NEVER_OPEN, Flaw::None).await;
    let (worker, permit) = Worker::stepwise(&coordinator).await;
    let mut attachment = coordinator.greet(TTL).await;
    attachment.send(Reply::Assignment(assignment(1, 1, vec![node.endpoint.clone()]))).await;
    permit.send(()).expect("the engine waits");
    step(&mut attachment).await;
    let stale = ShardCancel { lease: Some(lease(0)), reason: "another attempt".into() };
    attachment.send(Reply::Cancel(stale)).await;
    let confirmed = failure(&mut attachment).await;
    assert!(confirmed.cancelled && confirmed.lease == Some(lease(0)));
    permit.send(()).expect("the engine waits");
    step(&mut attachment).await;
    let cancel = ShardCancel { lease: Some(lease(1)), reason: "the client left".into() };
    attachment.send(Reply::Cancel(cancel)).await;
    // An unknown shard's failure comes after the cancellation was read.
    let mut other = assignment(9, 1, Vec::new());
    other.spec.as_mut().expect("a spec").model = "unknown".into();
    attachment.send(Reply::Assignment(other)).await;
    assert!(failure(&mut attachment).await.reason.contains("unknown"));
    for _ in 0..100 {
        permit.send(()).expect("the engine waits");
    }
    let failure = failure(&mut attachment).await;
    assert!(failure.cancelled && failure.reason == "the client left", "{failure:?}");
    // Steps 0 and 1 were evaluated; the third was under way when the cancellation came.
    assert!(node.evaluations.load(std::sync::atomic::Ordering::SeqCst) <= 3);
    worker.stop(attachment).await;
}

#[tokio::test]
async fn leases_are_renewed_while_the_device_is_busy() {
    let mut coordinator = Coordinator::start().await;
    let node = Node::start("node-a", NEVER_OPEN, Flaw::None).await;
    let (worker, permit) = Worker::stepwise(&coordinator).await;
    let mut attachment = coordinator.greet(Duration::from_millis(600)).await;
    attachment.send(Reply::Assignment(assignment(1, 1, vec![node.endpoint.clone()]))).await;
    // The engine waits for a permit; renewals come nevertheless.
    for _ in 0..4 {
        match attachment.next().await {
            Some(Message::Renewal(renewal)) => {
                assert_eq!(renewal.leases, [lease(1)]);
                let renewed = LeaseRenewed { renewed: renewal.leases, lost: Vec::new() };
                attachment.send(Reply::Renewed(renewed)).await;
            }
            other => panic!("unexpected {other:?}"),
        }
    }
    for _ in 0..20 {
        permit.send(()).expect("the engine waits");
    }
    assert!(matches!(attachment.result().await, Some(Message::Image(_))));
    worker.stop_after_commit(attachment).await;
}

#[tokio::test]
async fn a_lost_lease_is_dropped_without_a_word() {
    let mut coordinator = Coordinator::start().await;
    let node = Node::start("node-a", NEVER_OPEN, Flaw::None).await;
    let (worker, permit) = Worker::stepwise(&coordinator).await;
    let mut attachment = coordinator.greet(TTL).await;
    attachment.send(Reply::Assignment(assignment(1, 1, vec![node.endpoint.clone()]))).await;
    permit.send(()).expect("the engine waits");
    step(&mut attachment).await;
    let lost = LeaseRenewed { renewed: Vec::new(), lost: vec![lease(1)] };
    attachment.send(Reply::Renewed(lost)).await;
    // The same shard comes back under a new token; only that attempt is heard of.
    attachment.send(Reply::Assignment(assignment(2, 1, vec![node.endpoint.clone()]))).await;
    for _ in 0..100 {
        permit.send(()).expect("the engine waits");
    }
    match attachment.result().await {
        Some(Message::Image(image)) => assert_eq!(image.lease, Some(lease(2))),
        other => panic!("unexpected {other:?}"),
    }
    drop(attachment);
    drop(coordinator);
    worker.stop_alone().await;
}

#[tokio::test]
async fn a_broken_stream_ends_the_work_and_the_worker_attaches_again() {
    let mut coordinator = Coordinator::start().await;
    let node = Node::start("node-a", NEVER_OPEN, Flaw::None).await;
    let (worker, permit) = Worker::stepwise(&coordinator).await;
    let mut attachment = coordinator.greet(TTL).await;
    attachment.send(Reply::Assignment(assignment(1, 1, vec![node.endpoint.clone()]))).await;
    permit.send(()).expect("the engine waits");
    step(&mut attachment).await;
    drop(attachment);
    let mut attachment = coordinator.greet(TTL).await;
    for _ in 0..100 {
        permit.send(()).expect("the engine waits");
    }
    attachment.send(Reply::Assignment(assignment(2, 1, vec![node.endpoint.clone()]))).await;
    match attachment.result().await {
        Some(Message::Image(image)) => assert_eq!(image.lease, Some(lease(2))),
        other => panic!("unexpected {other:?}"),
    }
    assert!(matches!(attachment.result().await, Some(Message::Done(_))));
    drop(attachment);
    drop(coordinator);
    worker.stop_alone().await;
}

#[tokio::test]
async fn a_leaving_worker_finishes_what_it_began_and_hands_back_the_rest() {
    let mut coordinator = Coordinator::start().await;
    let node = Node::start("node-a", NEVER_OPEN, Flaw::None).await;
    let (worker, permit) = Worker::stepwise(&coordinator).await;
    let mut attachment = coordinator.greet(TTL).await;
    attachment.send(Reply::Assignment(assignment(1, 1, vec![node.endpoint.clone()]))).await;
    permit.send(()).expect("the engine waits");
    step(&mut attachment).await;
    let mut second = assignment(1, 1, vec![node.endpoint.clone()]);
    second.lease = Some(LeaseRef { shard_id: "shard-2".into(), token: 1 });
    attachment.send(Reply::Assignment(second)).await;
    // More than the capacity of 2 is refused; the answer also tells that shard-2 was read.
    let mut third = assignment(1, 1, vec![node.endpoint.clone()]);
    third.lease = Some(LeaseRef { shard_id: "shard-3".into(), token: 1 });
    attachment.send(Reply::Assignment(third)).await;
    let refused = failure(&mut attachment).await;
    assert_eq!(refused.lease.expect("a lease").shard_id, "shard-3");
    assert!(refused.retryable && refused.reason.contains("holds 2 shards"));
    worker.shutdown.cancel();
    assert!(matches!(attachment.result().await, Some(Message::Draining(_))));
    for _ in 0..100 {
        permit.send(()).expect("the engine waits");
    }
    let (mut images, mut done, mut handed_back) = (0, 0, 0);
    while done + handed_back < 2 {
        match attachment.result().await {
            Some(Message::Image(image)) => {
                assert_eq!(image.lease, Some(lease(1)));
                images += 1;
            }
            Some(Message::Done(_)) => done += 1,
            Some(Message::Failure(failure)) => {
                assert_eq!(failure.lease.expect("a lease").shard_id, "shard-2");
                assert!(failure.retryable && !failure.cancelled);
                handed_back += 1;
            }
            other => panic!("unexpected {other:?}"),
        }
    }
    assert_eq!((images, done, handed_back), (1, 1, 1));
    let lease = Some(lease(1));
    attachment.send(Reply::Commit(CommitReply { lease, ..Default::default() })).await;
    assert!(attachment.result().await.is_none(), "the worker ends the stream");
    drop(attachment);
    worker.task.await.expect("no panic").expect("a clean end");
}

#[tokio::test]
async fn a_device_that_fails_ends_the_worker_and_not_the_job() {
    let mut coordinator = Coordinator::start().await;
    let worker = Worker::with(&coordinator, ToyGenerator::with_fault(Fault::Device)).await;
    let mut attachment = coordinator.greet(TTL).await;
    attachment.send(Reply::Assignment(assignment(1, 1, Vec::new()))).await;
    let failure = failure(&mut attachment).await;
    assert!(failure.retryable && failure.reason.contains("OUT_OF_MEMORY"), "{failure:?}");
    assert!(attachment.result().await.is_none(), "it takes nothing more");
    drop(attachment);
    let ended = worker.task.await.expect("no panic").expect_err("its supervisor must see it");
    assert!(ended.is_fatal() && ended.to_string().contains("OUT_OF_MEMORY"), "{ended}");
}

#[tokio::test]
async fn a_bad_request_names_its_field_and_is_not_retried() {
    let mut coordinator = Coordinator::start().await;
    let worker = Worker::start(&coordinator).await;
    let mut attachment = coordinator.greet(TTL).await;
    let mut bad = assignment(1, 1, Vec::new());
    bad.spec.as_mut().expect("a spec").width = Some(63);
    attachment.send(Reply::Assignment(bad)).await;
    let failure = failure(&mut attachment).await;
    assert!(failure.reason.contains("width: is 63") && !failure.retryable, "{}", failure.reason);
    worker.stop(attachment).await;
}
