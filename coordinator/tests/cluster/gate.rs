//! The release gate: nothing leaves without a sound check of every concept.

use std::time::Duration;

use fairlead_coordinator::CoordinatorOptions;
use fairlead_proto::v1::{
    self, CommitStatus, ImageStatus, JobState, attach_request::Message as Up,
};
use tonic::Code;

use crate::{
    cluster::{
        Cluster, assert_failed_naming, assert_status, impatient, options, policies, spec, statuses,
    },
    node::{Node, Script, THRESHOLD},
    worker::{Worker, decode, lease, released},
};

#[tokio::test]
async fn a_flagged_image_is_withheld_with_its_scores_and_its_pixels_are_nowhere() {
    let dir = tempfile::tempdir().expect("a directory");
    let data = fairlead_coordinator::Data::Dir(dir.path().to_owned());
    let cluster = Cluster::start(CoordinatorOptions { data, ..options() }).await;
    let _open = Node::start(&cluster, "open", &["axe"], Script::Open("axe")).await;
    let _closed = Node::start(&cluster, "closed", &["bomb"], Script::Closed).await;
    let mut worker = Worker::attach(&cluster, "w", 1).await;
    let job = cluster.submit(spec(1)).await.expect("valid");
    let shard = worker.assignment().await;
    worker.complete(&shard).await;
    assert_eq!(worker.commit_reply().await.status(), CommitStatus::Accepted);
    let job = cluster.finished(&job.job_id).await;
    assert_eq!((job.state(), statuses(&job)), (JobState::Completed, vec![ImageStatus::Withheld]));
    let open: Vec<_> =
        job.images[0].final_scores.iter().map(|s| (s.concept.as_str(), s.open)).collect();
    assert_eq!(open, [("axe", true), ("bomb", false)]);
    let refused = cluster.image(&job.job_id, 0).await.expect_err("it was withheld");
    assert_eq!(refused.code(), Code::FailedPrecondition);
    assert!(refused.message().contains("withheld; its safety record says why"), "{refused}");
    let record = cluster.record(&job.images[0].record_id).await.expect("it was stored");
    assert_eq!(record.status(), ImageStatus::Withheld);
    let stored = std::fs::read_dir(dir.path().join("outputs/jobs").join(&job.job_id));
    let stored: Vec<_> = stored.expect("its record is there").flatten().collect();
    assert!(!stored.is_empty());
    let is_record = |file: &std::fs::DirEntry| file.path().extension().is_some_and(|e| e == "json");
    assert!(stored.iter().all(is_record), "no pixels were stored: {stored:?}");
}

#[tokio::test]
async fn a_worker_can_withhold_by_itself() {
    let cluster = Cluster::start(options()).await;
    let node = Node::start(&cluster, "node", &["axe"], Script::Closed).await;
    let mut worker = Worker::attach(&cluster, "w", 1).await;
    let job = cluster.submit(spec(1)).await.expect("valid");
    let shard = worker.assignment().await;
    let score = v1::ConceptScore {
        concept: "axe".into(),
        energy: "clip".into(),
        z: 5.0,
        open: true,
        ..Default::default()
    };
    let report = v1::WorkerReport { final_scores: vec![score], reruns: 2, ..Default::default() };
    let mut outcome =
        v1::ImageOutcome { pixels: vec![], report: Some(report), ..released(&lease(&shard), 0) };
    outcome.set_status(ImageStatus::Withheld);
    worker.send(Up::Image(outcome)).await;
    worker.done(&lease(&shard)).await;
    let job = cluster.finished(&job.job_id).await;
    assert_eq!(statuses(&job), [ImageStatus::Withheld]);
    assert!(job.images[0].final_scores[0].open);
    assert!(node.asked().is_empty(), "there was nothing to check");
    let record = cluster.record(&job.images[0].record_id).await.expect("it was stored");
    assert!(record.withheld_by_worker && record.final_scores.is_empty(), "it is the worker's word");
    assert_eq!(record.reported_by_worker.expect("its report").final_scores.len(), 1);
}

/// A result whose report says, or hides, that the image was steered away from `axe`.
fn steered(shard: &v1::ShardAssignment, says_so: bool) -> v1::ImageOutcome {
    let mut outcome = released(&lease(shard), 0);
    let score = v1::ConceptScore {
        concept: "axe".into(),
        energy: "clip".into(),
        open: true,
        ..Default::default()
    };
    let step = v1::StepRecord { correction: 0.4, scores: vec![score], ..Default::default() };
    let report = outcome.report.as_mut().expect("there is one");
    report.trajectory = if says_so { vec![step] } else { Vec::new() };
    outcome
}

#[tokio::test]
async fn outside_its_calibrations_a_job_runs_where_the_policy_says_so_and_its_record_tells() {
    let spec = || v1::JobSpec { guidance_scale: Some(1.0), ..spec(1) };
    let strict = Cluster::start(options()).await;
    let _node = Node::start(&strict, "node", &["axe"], Script::Closed).await;
    let _worker = Worker::attach(&strict, "w", 1).await;
    let refused = strict.submit(spec()).await;
    assert_status(refused, Code::FailedPrecondition, "--size 32x32 --guidance 1,5`");

    let text = "[policies.a]\nconcepts = ['*']\noutside = 'withhold-unless-clear'";
    let cluster = Cluster::start(policies(text)).await;
    let node = Node::start(&cluster, "node", &["axe"], Script::Closed).await;
    let mut worker = Worker::attach(&cluster, "w", 1).await;
    let job = cluster.submit(spec()).await.expect("the policy lets it");
    let shard = worker.assignment().await;
    let ways = ["guidance 1, calibrated 5".to_owned()];
    assert_eq!(shard.policy.as_ref().expect("pinned").outside_envelope, ways);
    worker.complete(&shard).await;
    let job = cluster.finished(&job.job_id).await;
    assert_eq!(statuses(&job), [ImageStatus::Released]);
    let key = node.asked()[0].calibration.clone().expect("a calibration is asked for");
    let conditions = key.conditions.expect("a node checks them, too");
    assert!(conditions.may_leave_envelope && conditions.guidance_scale == 1.0);
    let record = cluster.record(&job.images[0].record_id).await.expect("it was stored");
    assert_eq!(record.policy.expect("pinned").outside_envelope, ways);
}

#[tokio::test]
async fn a_check_depends_on_nothing_that_a_worker_says() {
    let cluster = Cluster::start(options()).await;
    let node = Node::start(&cluster, "node", &["axe", "bomb"], Script::Closed).await;
    let mut worker = Worker::attach(&cluster, "w", 1).await;
    for says_so in [true, false] {
        let job = cluster.submit(spec(1)).await.expect("valid");
        let shard = worker.assignment().await;
        worker.send(Up::Image(steered(&shard, says_so))).await;
        worker.done(&lease(&shard)).await;
        assert_eq!(statuses(&cluster.finished(&job.job_id).await), [ImageStatus::Released]);
    }
    let [said, hidden] = node.asked().try_into().expect("two checks");
    // The record's id is in the file.
    let bare = |check: v1::CheckRequest| v1::CheckRequest { png: vec![], ..check };
    assert_eq!(bare(said.clone()), bare(hidden));
    assert!(said.open_concepts.is_empty());
}

#[tokio::test]
async fn crops_belong_to_the_pixels_and_to_a_secret() {
    let mut seeds = Vec::new();
    for _ in 0..2 {
        let cluster = Cluster::start(options()).await;
        let node = Node::start(&cluster, "node", &["axe"], Script::Closed).await;
        Worker::attach(&cluster, "w", 4).await.complete_all();
        for seed in [7, 8] {
            let job = v1::JobSpec { seed: Some(seed), ..spec(2) };
            let job = cluster.submit(job).await.expect("valid");
            cluster.finished(&job.job_id).await;
        }
        let of = |index: u8| -> Vec<u64> {
            let asked = node.asked().into_iter();
            let asked = asked.filter(|check| decode(&check.png)[0] == index);
            asked.map(|check| check.crop_seed).collect()
        };
        let (first, second) = (of(0), of(1));
        assert_eq!((first.len(), first[0]), (2, first[1]), "the same pixels, whatever the job");
        assert_ne!(first[0], second[0]);
        seeds.extend([first[0], second[0]]);
    }
    // Each cluster has a key of its own, and none of the seeds is the images'.
    let distinct: std::collections::BTreeSet<_> = seeds.iter().chain(&[7, 8, 9]).collect();
    assert_eq!(distinct.len(), 7, "{seeds:?}");
}

#[tokio::test]
async fn a_node_cannot_loosen_the_level_that_was_pinned() {
    let cluster = Cluster::start(options()).await;
    let _node = Node::start(&cluster, "node", &["axe"], Script::Lax("axe")).await;
    Worker::attach(&cluster, "w", 1).await.complete_all();
    let job = cluster.submit(spec(1)).await.expect("valid");
    let level = job.policy.clone().expect("pinned").levels.remove(0);
    assert_eq!((&*level.calibration_id, level.threshold), ("calibration-1", THRESHOLD));
    let job = cluster.finished(&job.job_id).await;
    assert_eq!(statuses(&job), [ImageStatus::Withheld]);
    let score = &job.images[0].final_scores[0];
    assert!(score.open && score.score > THRESHOLD && score.z < score.gate, "{score:?}");
}

#[tokio::test]
async fn with_two_checks_one_lying_replica_gets_nothing_released() {
    let text = "[policies.default]\nconcepts = ['*']\nchecks = 2";
    let policies = fairlead_coordinator::Policies::parse(text).expect("it is right");
    let cluster = Cluster::start(CoordinatorOptions { policies, ..options() }).await;
    let _liar = Node::start(&cluster, "aaa", &["axe"], Script::Closed).await;
    Worker::attach(&cluster, "w", 2).await.complete_all();
    let refused = cluster.submit(spec(1)).await.expect_err("one node is not two");
    assert_eq!(refused.code(), Code::Unavailable);
    assert!(refused.message().contains("wants 2 checks of it, and 1 live"), "{refused}");
    let _honest = Node::start(&cluster, "zzz", &["axe"], Script::Open("axe")).await;
    let job = cluster.submit(spec(8)).await.expect("valid");
    let job = cluster.finished(&job.job_id).await;
    assert_eq!(statuses(&job), [ImageStatus::Withheld; 8]);
    let record = cluster.record(&job.images[0].record_id).await.expect("it was stored");
    assert_eq!(record.energy_nodes, ["aaa hash-of-clip", "zzz hash-of-clip"]);
}

#[tokio::test]
async fn every_energy_of_a_concept_must_be_satisfied() {
    let cluster = Cluster::start(options()).await;
    let clip = Node::start(&cluster, "clip", &["axe"], Script::Closed).await;
    let siglip =
        Node::start_energy(&cluster, "siglip", "siglip", &["axe"], Script::Open("axe")).await;
    Worker::attach(&cluster, "w", 1).await.complete_all();
    let job = cluster.submit(spec(1)).await.expect("valid");
    let pinned = job.policy.clone().expect("pinned").concepts;
    let energies: Vec<_> = pinned.iter().map(|c| (c.name.as_str(), c.energy.as_str())).collect();
    assert_eq!(energies, [("axe", "clip"), ("axe", "siglip")]);
    let job = cluster.finished(&job.job_id).await;
    assert_eq!(statuses(&job), [ImageStatus::Withheld], "one of the two flags it");
    let scores = &job.images[0].final_scores;
    let open: Vec<_> = scores.iter().map(|s| (s.energy.as_str(), s.open)).collect();
    assert_eq!(open, [("clip", false), ("siglip", true)]);
    assert_eq!((clip.asked().len(), siglip.asked().len()), (1, 1));

    // The last node of one energy leaves: the other one does not stand in for it.
    siglip.leave(&cluster).await;
    let refused = cluster.submit(spec(1)).await.expect_err("siglip is gone");
    assert_eq!(refused.code(), Code::Unavailable);
    assert!(refused.message().contains("concept `axe` with `siglip`"), "{refused}");
}

/// A job whose only node of `bomb` behaves like `script`.
async fn job_with(script: Script) -> (Cluster, v1::Job) {
    let cluster = Cluster::start(options()).await;
    let _good = Node::start(&cluster, "good", &["axe"], Script::Closed).await;
    let _bad = Node::start(&cluster, "bad", &["bomb"], script).await;
    Worker::attach(&cluster, "w", 1).await.complete_all();
    let job = cluster.submit(spec(2)).await.expect("valid");
    let job = cluster.finished(&job.job_id).await;
    (cluster, job)
}

async fn releases_nothing(script: Script, problem: &str) {
    let (cluster, job) = job_with(script).await;
    assert_failed_naming(&job, &["after 5 attempt(s)", "concept `bomb`", "`bad`", problem]);
    for image in &job.images {
        cluster.image(&job.job_id, image.index).await.expect_err("nothing is released");
        cluster.record(&image.record_id).await.expect_err("there is no verdict");
    }
}

#[tokio::test]
async fn a_score_that_is_not_a_number_releases_nothing() {
    releases_nothing(Script::NotANumber, "not finite").await;
}

#[tokio::test]
async fn a_check_of_other_bytes_releases_nothing() {
    releases_nothing(Script::OtherBytes, "other bytes").await;
}

#[tokio::test]
async fn a_missing_score_releases_nothing() {
    releases_nothing(Script::Forgetful, "answered for ``").await;
}

#[tokio::test]
async fn a_broken_node_releases_nothing() {
    releases_nothing(Script::Broken, "the energy model is broken").await;
}

#[tokio::test]
async fn a_silent_node_releases_nothing() {
    let check_timeout = Duration::from_millis(50);
    let cluster = Cluster::start(CoordinatorOptions { check_timeout, ..options() }).await;
    let _node = Node::start(&cluster, "silent", &["axe"], Script::Silent).await;
    Worker::attach(&cluster, "w", 1).await.complete_all();
    let job = cluster.submit(spec(1)).await.expect("valid");
    let job = cluster.finished(&job.job_id).await;
    assert_failed_naming(&job, &["concept `axe`", "`silent`", "no answer within 50ms"]);
}

#[tokio::test]
async fn a_node_that_dies_before_the_release_releases_nothing() {
    let cluster = Cluster::start(options()).await;
    let mut node = Node::start(&cluster, "mortal", &["axe"], Script::Closed).await;
    let mut worker = Worker::attach(&cluster, "w", 1).await;
    let job = cluster.submit(spec(1)).await.expect("valid");
    let shard = worker.assignment().await;
    node.die().await;
    worker.complete(&shard).await;
    let reply = worker.commit_reply().await;
    assert_eq!(reply.status(), CommitStatus::Aborted);
    assert!(reply.reason.contains("concept `axe`"), "{}", reply.reason);
    worker.complete_all();
    let job = cluster.finished(&job.job_id).await;
    assert_failed_naming(&job, &["concept `axe`", "`mortal`"]);
}

#[tokio::test]
async fn a_node_that_leaves_before_the_release_releases_nothing() {
    let cluster = Cluster::start(impatient()).await;
    let node = Node::start(&cluster, "leaver", &["axe"], Script::Closed).await;
    let mut worker = Worker::attach(&cluster, "w", 1).await;
    let job = cluster.submit(spec(1)).await.expect("valid");
    let shard = worker.assignment().await;
    node.leave(&cluster).await;
    worker.complete(&shard).await;
    let job = cluster.finished(&job.job_id).await;
    assert_failed_naming(
        &job,
        &["concept `axe`", "no live energy node with clip serves version clip-v1"],
    );
    assert!(node.asked().is_empty());
}

#[tokio::test]
async fn a_replica_takes_over_from_a_broken_node() {
    let cluster = Cluster::start(options()).await;
    let broken = Node::start(&cluster, "a-broken", &["axe"], Script::Broken).await;
    let healthy = Node::start(&cluster, "b-healthy", &["axe"], Script::Closed).await;
    Worker::attach(&cluster, "w", 1).await.complete_all();
    let job = cluster.submit(spec(1)).await.expect("valid");
    let job = cluster.finished(&job.job_id).await;
    assert_eq!(statuses(&job), [ImageStatus::Released]);
    let record = cluster.record(&job.images[0].record_id).await.expect("it was stored");
    assert!(record.energy_nodes.contains(&"b-healthy hash-of-clip".to_owned()), "{record:?}");
    assert_eq!(healthy.asked().len(), 1);
    assert!(broken.asked().len() <= 1);
}

#[tokio::test]
async fn results_that_are_not_sound_release_nothing() {
    type Spoil = fn(&mut v1::ImageOutcome);
    let cases: [(Spoil, &str); 4] = [
        (|outcome| outcome.pixels.truncate(6), "6 bytes of pixels; asked was 32x32 RGB"),
        (|outcome| outcome.report = None, "no report"),
        (|outcome| outcome.index = 5, "image 5 twice or unasked"),
        (|outcome| outcome.set_status(ImageStatus::Failed), "IMAGE_STATUS_FAILED"),
    ];
    let cluster = Cluster::start(options()).await;
    let node = Node::start(&cluster, "node", &["axe"], Script::Closed).await;
    let mut worker = Worker::attach(&cluster, "w", 1).await;
    for (spoil, expected) in cases {
        let job = cluster.submit(spec(1)).await.expect("valid");
        for _ in 0..5 {
            let shard = worker.assignment().await;
            assert_eq!(shard.job_id, job.job_id);
            let mut outcome = released(&lease(&shard), 0);
            spoil(&mut outcome);
            worker.send(Up::Image(outcome)).await;
            worker.done(&lease(&shard)).await;
        }
        assert_failed_naming(&cluster.finished(&job.job_id).await, &["worker w", expected]);
    }
    assert!(node.asked().is_empty());
}
