//! Jobs that go as planned.

use fairlead_proto::v1::{
    self, CommitStatus, ImageStatus, JobState, attach_request::Message as Up,
    attach_response::Message as Down, watch_job_response::Event,
};
use sha2::{Digest, Sha256};

use crate::{
    cluster::{Cluster, collect, options, patient, policies, spec, statuses},
    node::{Node, Script},
    worker::{Worker, decode, lease, pixels, released},
};

#[tokio::test]
async fn a_job_is_split_made_checked_and_released() {
    let cluster = Cluster::start(options()).await;
    let node = Node::start(&cluster, "node", &["axe", "bomb"], Script::Closed).await;
    let mut worker = Worker::attach(&cluster, "worker-1", 2).await;
    let job = cluster.submit(v1::JobSpec { max_shard_size: 2, ..spec(3) }).await.expect("valid");
    assert_eq!(job.state(), JobState::Queued);

    let (first, second) = (worker.assignment().await, worker.assignment().await);
    let tasks = |shard: &v1::ShardAssignment| -> Vec<_> {
        shard.images.iter().map(|image| (image.index, image.seed)).collect()
    };
    let mut all = [tasks(&first), tasks(&second)].concat();
    all.sort_unstable();
    assert_eq!(all, [(0, 7), (1, 8), (2, 9)]);
    let energies: Vec<_> =
        first.energies.iter().map(|e| (e.node.clone(), e.concepts.len())).collect();
    assert_eq!(energies, [(Some(node.info.clone()), 2)]);
    assert_eq!(first.spec.as_ref().expect("a spec").steps(), 25);
    for shard in [&first, &second] {
        worker.complete(shard).await;
        assert_eq!(worker.commit_reply().await.status(), CommitStatus::Accepted);
    }

    let events = collect(cluster.watch(&job.job_id, 0).await).await;
    let sequences: Vec<_> = events.iter().map(|event| event.sequence).collect();
    assert_eq!(sequences, (1..=6).collect::<Vec<_>>());
    let job = cluster.get(&job.job_id).await;
    assert_eq!(job.state(), JobState::Completed);
    for image in &job.images {
        let found = cluster.image(&job.job_id, image.index).await.expect("it was released");
        assert_eq!(decode(&found.png), pixels(image.index));
        assert_eq!(found.image_sha256, hex::encode(Sha256::digest(&found.png)));
        assert_eq!(found.image_sha256, image.image_sha256);
        let record = cluster.record(&image.record_id).await.expect("it was stored");
        assert_eq!(record.image_sha256, image.image_sha256);
        assert_eq!(record.status(), ImageStatus::Released);
        assert_eq!((record.prompt.as_str(), record.seed), ("a cat", 7 + u64::from(image.index)));
        let hash = hex::encode(Sha256::digest(pixels(image.index)));
        assert_eq!((record.pixels_sha256, &*record.worker_id), (hash, "worker-1"));
        assert_eq!(record.energy_nodes, ["node hash-of-clip"]);
        assert_eq!(record.calibrations, ["calibration-1"]);
        // The worker's word stands apart.
        let reported = record.reported_by_worker.expect("the worker's report");
        assert_eq!(reported.energy_nodes, ["steering-node hash"]);
        let scored: Vec<_> = record.final_scores.iter().map(|s| s.concept.as_str()).collect();
        assert_eq!(scored, ["axe", "bomb"]);
    }
    let checked: Vec<_> = node.asked().into_iter().map(|check| check.crop_seed).collect();
    assert_eq!(checked.len(), 3, "each image is checked once: {checked:?}");
}

#[tokio::test]
async fn the_catalog_shows_models_concepts_and_health() {
    let cluster = Cluster::start(options()).await;
    let _one = Node::start(&cluster, "one", &["axe"], Script::Closed).await;
    let _two = Node::start(&cluster, "two", &["axe", "bomb"], Script::Closed).await;
    let _a = Worker::attach(&cluster, "a", 1).await;
    let _b = Worker::attach(&cluster, "b", 1).await;
    let models = patient(cluster.catalog().list_models(v1::ListModelsRequest {})).await;
    let models = models.expect("an answer").into_inner().models;
    let seen: Vec<_> = models.iter().map(|model| (model.name.as_str(), model.workers)).collect();
    assert_eq!(seen, [("sd", 2)]);
    let concepts = patient(cluster.catalog().list_concepts(v1::ListConceptsRequest {})).await;
    let concepts = concepts.expect("an answer").into_inner().concepts;
    let nodes: Vec<usize> = concepts.iter().map(|concept| concept.nodes.len()).collect();
    assert_eq!(nodes, [2, 1]);
    let mut health = tonic_health::pb::health_client::HealthClient::new(cluster.channel());
    let service = "fairlead.v1.GenerationService".to_owned();
    let request = tonic_health::pb::HealthCheckRequest { service };
    let status = patient(health.check(request)).await.expect("it is known").into_inner().status();
    assert_eq!(status, tonic_health::pb::health_check_response::ServingStatus::Serving);
}

/// A step of image `index`, as a worker would have it seen: scored, closed and with a preview.
fn step(index: u32, step: u32) -> v1::StepProgress {
    let score =
        v1::ConceptScore { concept: "axe".into(), energy: "clip".into(), ..Default::default() };
    v1::StepProgress {
        index,
        step,
        steps: 25,
        scores: vec![score],
        preview_png: b"forged".to_vec(),
        ..Default::default()
    }
}

fn preview(index: u32, step: u32) -> v1::Preview {
    v1::Preview { index, step, width: 2, height: 1, pixels: vec![9; 6] }
}

/// What a client sees of `steps` and `previews`: steps, and the pixels of their previews. The shard is
/// completed once `first` of them were seen and the node was asked `checks` times; then the job ends.
async fn shown(
    (script, wanted): (Script, bool),
    steps: Vec<v1::StepProgress>,
    previews: Vec<v1::Preview>,
    (first, checks): (usize, usize),
) -> Vec<(u32, Option<Vec<u8>>)> {
    let cluster = Cluster::start(options()).await;
    let node = Node::start(&cluster, "node", &["axe"], script).await;
    let mut worker = Worker::attach(&cluster, "w", 1).await;
    let job = cluster.submit(v1::JobSpec { previews: wanted, ..spec(1) }).await.expect("valid");
    let shard = worker.assignment().await;
    let mut stream = cluster.watch(&job.job_id, 0).await;
    let mut next = async || patient(stream.message()).await.expect("healthy").expect("open");
    assert_eq!((next().await.sequence, next().await.sequence), (1, 2));
    let lease = shard.lease.clone();
    worker.send(Up::Progress(v1::ShardProgress { lease, steps, previews })).await;
    let mut seen = Vec::new();
    let mut completed = false;
    loop {
        if seen.len() == first && !completed {
            node.asked_times(checks).await;
            worker.complete(&shard).await;
            completed = true;
        }
        let event = next().await;
        match event.event {
            Some(Event::Progress(step)) => {
                assert_eq!(event.sequence, 2, "progress does not count");
                let png = Some(step.preview_png).filter(|png| !png.is_empty());
                seen.push((step.step, png.map(|png| decode(&png))));
            }
            Some(Event::Job(job)) if job.state() == JobState::Completed => return seen,
            _ => {}
        }
    }
}

#[tokio::test]
async fn a_preview_is_shown_once_a_node_has_passed_it() {
    let foreign = (step(9, 3), preview(9, 3));
    let (steps, previews) = (vec![step(0, 0), foreign.0], vec![preview(0, 0), foreign.1]);
    let seen = shown((Script::Closed, true), steps, previews, (2, 1)).await;
    assert_eq!(seen, [(0, None), (0, Some(vec![9; 6]))], "the step, then its preview");
}

#[tokio::test]
async fn a_preview_that_a_node_flags_is_not_shown_whatever_the_worker_says() {
    let (steps, previews) = (vec![step(0, 0)], vec![preview(0, 0)]);
    let seen = shown((Script::Open("axe"), true), steps, previews, (1, 1)).await;
    assert_eq!(seen, [(0, None)]);
}

#[tokio::test]
async fn a_preview_that_nobody_can_check_is_not_shown() {
    let lies = vec![v1::Preview { width: 999, ..preview(0, 0) }, preview(0, 24)];
    let seen = shown((Script::Closed, true), vec![step(0, 0)], lies, (1, 0)).await;
    assert_eq!(seen, [(0, None)], "of another size, and of a step that was not told of");
}

#[tokio::test]
async fn a_preview_that_was_not_asked_for_is_not_shown() {
    let (steps, previews) = (vec![step(0, 0)], vec![preview(0, 0)]);
    let seen = shown((Script::Closed, false), steps, previews, (1, 0)).await;
    assert_eq!(seen, [(0, None)]);
}

#[tokio::test]
async fn a_watcher_sees_progress_and_can_resume() {
    let cluster = Cluster::start(options()).await;
    let _node = Node::start(&cluster, "node", &["axe"], Script::Closed).await;
    let mut worker = Worker::attach(&cluster, "w", 1).await;
    let job = cluster.submit(spec(1)).await.expect("valid");
    let shard = worker.assignment().await;
    let mut stream = cluster.watch(&job.job_id, 0).await;
    let mut next = async || patient(stream.message()).await.expect("healthy").expect("open");
    assert_eq!(next().await.sequence, 1);
    assert_eq!(next().await.sequence, 2);
    let (lease, steps) = (shard.lease.clone(), vec![step(0, 0), step(9, 1), step(0, 2)]);
    worker.send(Up::Progress(v1::ShardProgress { lease, steps, previews: vec![] })).await;
    for expected in [0, 2] {
        let event = next().await;
        assert_eq!(event.sequence, 2, "progress does not count");
        match event.event {
            Some(Event::Progress(step)) => {
                assert_eq!((step.step, step.preview_png.len()), (expected, 0));
            }
            other => panic!("{other:?}"),
        }
    }
    worker.complete(&shard).await;
    let rest: Vec<_> = [next().await, next().await].map(|event| event.sequence).into();
    assert_eq!(rest, [3, 4]);
    assert!(patient(stream.message()).await.expect("healthy").is_none(), "it ends");
    let resumed = collect(cluster.watch(&job.job_id, 2).await).await;
    assert_eq!(resumed.iter().map(|event| event.sequence).collect::<Vec<_>>(), [3, 4]);
    assert!(collect(cluster.watch(&job.job_id, 4).await).await.is_empty());
}

#[tokio::test]
async fn notices_reach_the_job() {
    let cluster = Cluster::start(options()).await;
    let _node = Node::start(&cluster, "node", &["axe"], Script::Closed).await;
    let mut worker = Worker::attach(&cluster, "w", 1).await;
    let job = cluster.submit(spec(2)).await.expect("valid");
    let shard = worker.assignment().await;
    for index in 0..2 {
        let notices = vec!["the prompt was encoded in 2 chunks".to_owned()];
        let outcome = v1::ImageOutcome { notices, ..released(&lease(&shard), index) };
        worker.send(Up::Image(outcome)).await;
    }
    worker.done(&lease(&shard)).await;
    let job = cluster.finished(&job.job_id).await;
    assert_eq!(job.notices, ["the prompt was encoded in 2 chunks"]);
}

#[tokio::test]
async fn an_observe_only_job_is_scored_and_never_withheld() {
    let text = "[policies.observe]\nconcepts = ['*']\nobserve_only = true";
    let cluster = Cluster::start(policies(text)).await;
    let node = Node::start(&cluster, "node", &["axe"], Script::Open("axe")).await;
    let worker = Worker::attach(&cluster, "w", 1).await;
    worker.complete_all();
    let job = cluster.submit(v1::JobSpec { steps: Some(3), ..spec(1) }).await.expect("valid");
    let job = cluster.finished(&job.job_id).await;
    assert_eq!(statuses(&job), [ImageStatus::Released]);
    assert!(node.asked().iter().all(|check| check.scores_only));
    assert_eq!(job.images[0].final_scores.len(), 1);
}

#[tokio::test]
async fn an_idle_worker_comes_before_a_busy_one_and_a_draining_one_gets_nothing() {
    let cluster = Cluster::start(options()).await;
    let _node = Node::start(&cluster, "node", &["axe"], Script::Closed).await;
    let mut busy = Worker::attach(&cluster, "busy", 2).await;
    cluster.submit(spec(1)).await.expect("valid");
    busy.assignment().await;
    let mut idle = Worker::attach(&cluster, "idle", 2).await;
    cluster.submit(spec(1)).await.expect("valid");
    idle.assignment().await;
    idle.send(Up::Draining(v1::WorkerDraining {})).await;
    // The answer to a later message shows that the coordinator has read the one before.
    idle.send(Up::Renewal(v1::LeaseRenewal::default())).await;
    idle.until(|message| matches!(message, Down::Renewed(_)).then_some(())).await;
    cluster.submit(spec(1)).await.expect("valid");
    busy.assignment().await;
}

#[tokio::test]
async fn a_worker_is_told_of_new_nodes_when_one_of_its_own_leaves() {
    let cluster = Cluster::start(options()).await;
    let first = Node::start(&cluster, "a-first", &["axe"], Script::Closed).await;
    let mut worker = Worker::attach(&cluster, "w", 1).await;
    cluster.submit(spec(1)).await.expect("valid");
    let shard = worker.assignment().await;
    assert_eq!(shard.energies[0].node, Some(first.info.clone()));
    let spare = Node::start(&cluster, "b-spare", &["axe"], Script::Closed).await;
    let told = |message| match message {
        Down::Nodes(update) => Some(update),
        _ => None,
    };
    let joined = worker.until(told).await;
    assert_eq!(joined.shard_id, lease(&shard).shard_id);
    let nodes = |update: &v1::NodeUpdate| -> Vec<String> {
        let nodes = update.energies.iter().filter_map(|endpoint| endpoint.node.as_ref());
        nodes.map(|node| node.node_id.clone()).collect()
    };
    assert_eq!(nodes(&joined), ["a-first", "b-spare"], "the shard stays with its node");
    first.leave(&cluster).await;
    let left = worker.until(told).await;
    assert_eq!(left.energies[0].node, Some(spare.info.clone()), "the spare takes over");
    assert_eq!(nodes(&left), ["b-spare"]);
}
