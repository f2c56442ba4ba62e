//! Concepts that come to a node while it runs.

use fairlead_proto::v1::{AddConceptsRequest, AddConceptsResponse};
use tonic::Code;

use super::*;
use crate::{ConceptSet, testing::Fault};

const HAT: &str = r#"
    concept = [
        { name = "hat", group = "clothes", targets = ["a hat"], anchors = ["nothing"], fallback_threshold = 0.3 },
    ]
"#;

pub(super) fn hat() -> AddConceptsRequest {
    let set = ConceptSet::parse(Path::new("hat.toml"), HAT).expect("it parses");
    AddConceptsRequest { concepts: set.definitions(), allow_uncalibrated: true }
}

impl TestNode {
    async fn add(&mut self, request: AddConceptsRequest) -> Result<AddConceptsResponse, Status> {
        self.client.add_concepts(request).await.map(tonic::Response::into_inner)
    }
}

fn names(info: &NodeInfo) -> Vec<&str> {
    let refs = info.concepts.iter().filter_map(|info| info.concept.as_ref());
    refs.map(|concept| concept.name.as_str()).collect()
}

/// Calibrates the hat alone, into the folder of a node's calibrations.
async fn calibrate_hat(node: &Path) {
    let folder = tempfile::tempdir().expect("a folder");
    fs::write(folder.path().join("concepts.toml"), HAT).expect("written");
    calibrate(folder.path()).await;
    for file in fs::read_dir(folder.path().join("calibrations")).expect("made") {
        let file = file.expect("a file");
        fs::copy(file.path(), node.join("calibrations").join(file.file_name())).expect("copied");
    }
}

#[tokio::test]
async fn a_concept_is_served_from_now_on_and_leaves_the_others_as_they_were() {
    let (folder, mut node, _) = TestNode::calibrated().await;
    let old = node.request(&[axe(), TestScorer::image_of(3, 0.02)]).await;
    let before = node.evaluate(old.clone()).await.expect("evaluated");
    let careful = AddConceptsRequest { allow_uncalibrated: false, ..hat() };
    let status = node.add(careful.clone()).await.expect_err("no calibration yet");
    assert_refused(&status, Code::FailedPrecondition, "fairlead calibrate --concepts");
    calibrate_hat(folder.path()).await;
    let added = node.add(careful).await.expect("added");
    assert_eq!(added.concepts.len(), 1);
    assert_eq!(added.calibrations[0].concepts, ["hat"]);
    assert_eq!(names(&node.describe().await), ["axe", "pill", "skull", "hat"]);
    node.until("fairlead.concept.hat", ServingStatus::Serving).await;
    assert_eq!(node.evaluate(old.clone()).await.expect("evaluated"), before);

    let all = EvaluateRequest { concepts: node.refs().await, ..old };
    let answer = node.evaluate(all).await.expect("both sets are calibrated");
    assert_eq!(answer.calibration_ids.len(), 2);
    let scores = |image: usize| &answer.samples[image].scores;
    assert_eq!(scores(0)[..3], before.samples[0].scores[..]);
    let open = |image| scores(image).iter().map(|score| score.open).collect::<Vec<_>>();
    assert_eq!(open(0), [true, false, false, false]);
    assert_eq!(open(1), [false, false, false, true]);
}

#[tokio::test]
async fn without_a_calibration_of_its_own_set_it_needs_the_policys_leave() {
    let (_folder, mut node, _) = TestNode::calibrated().await;
    assert!(node.add(hat()).await.expect("added").calibrations.is_empty());
    let mut all = node.request(&[axe()]).await;
    let status = node.evaluate(all.clone()).await.expect_err("not calibrated");
    assert_refused(&status, Code::FailedPrecondition, "fairlead calibrate");
    all.allow_calibration_fallback = true;
    let answer = node.evaluate(all).await.expect("evaluated");
    assert_eq!((answer.calibration_ids.len(), answer.calibration_fallbacks.len()), (1, 1));
    assert!(answer.samples[0].scores[0].open && !answer.samples[0].scores[3].open);
}

#[tokio::test]
async fn who_observes_sees_where_the_calibrated_ones_stand_beside_another() {
    let (_folder, mut node, _) = TestNode::calibrated().await;
    let gated = node.request(&[axe()]).await;
    let before = node.evaluate(gated.clone()).await.expect("evaluated").samples.remove(0).scores;
    node.add(hat()).await.expect("added");
    let raw = EvaluateRequest { scores_only: true, concepts: node.refs().await, ..gated };
    let raw = node.evaluate(raw).await.expect("no calibration is needed").samples.remove(0).scores;
    for (raw, gated) in raw.iter().zip(&before) {
        assert_eq!((raw.z, raw.gate), (gated.z, gated.gate));
    }
    assert_eq!((raw[3].z, raw[3].gate), (0.0, 0.0));
    assert!(before[0].z != 0.0 && raw.iter().all(|score| !score.open));
}

#[tokio::test]
async fn adding_twice_is_adding_once_and_nonsense_changes_nothing() {
    let folder = folder();
    let (mut node, _) = TestNode::start(options(folder.path())).await;
    let first = node.add(hat()).await.expect("added");
    assert_eq!(node.add(hat()).await.expect("known"), first);
    let described = node.describe().await;
    let other = |change: fn(&mut AddConceptsRequest)| {
        let mut request = hat();
        change(&mut request);
        request
    };
    for (code, part, request) in [
        (Code::AlreadyExists, "`hat`", other(|r| r.concepts[0].targets = vec!["a cap".into()])),
        (Code::AlreadyExists, "`axe`", other(|r| r.concepts[0].name = "axe".into())),
        (Code::InvalidArgument, "0 concepts", other(|r| r.concepts.clear())),
        (Code::InvalidArgument, "kebab-case", other(|r| r.concepts[0].name = "A Hat".into())),
        (Code::InvalidArgument, "targets", other(|r| r.concepts[0].targets.clear())),
    ] {
        let status = node.add(request).await.expect_err(part);
        assert_refused(&status, code, part);
    }
    assert_eq!(node.describe().await, described);
}

#[tokio::test]
async fn what_was_added_is_kept_for_the_next_start() {
    let folder = folder();
    let added = folder.path().join("added");
    let keeping =
        || EnergyOptions { added_concepts: Some(added.clone()), ..options(folder.path()) };
    let (mut node, _) = TestNode::start(keeping()).await;
    node.add(hat()).await.expect("added");
    let refs = node.refs().await;
    node.shutdown.cancel();
    node.task.await.expect("no panic").expect("stopped in order");
    let (mut again, _) = TestNode::start(keeping()).await;
    assert_eq!(again.refs().await, refs);
    assert_eq!(again.add(hat()).await.expect("known").concepts.len(), 1);
    again.shutdown.cancel();
    again.task.await.expect("no panic").expect("stopped in order");

    // Made permanent: in the file of the others, it is in their set.
    let hat = HAT.split_once('[').expect("a list").1.rsplit_once(']').expect("a list").0;
    let all = CONCEPTS.trim_end().strip_suffix(']').expect("a list").to_owned() + hat + "]";
    fs::write(folder.path().join("concepts.toml"), all).expect("written");
    let (mut permanent, _) = TestNode::start(keeping()).await;
    assert_eq!(permanent.refs().await, refs);

    fs::write(folder.path().join("concepts.toml"), HAT.replace("a hat", "a cap")).expect("written");
    let refused = TestNode::spawn(keeping(), TestScorer::loader().0).await;
    let error = refused.task.await.expect("no panic").expect_err("two hats").to_string();
    assert!(error.contains("--added-concepts") && error.contains("`hat`"), "{error}");
}

#[tokio::test]
async fn what_cannot_be_kept_is_served_and_said() {
    let folder = folder();
    let added = folder.path().join("added");
    let keeping = EnergyOptions { added_concepts: Some(added.clone()), ..options(folder.path()) };
    let (mut node, _) = TestNode::start(keeping).await;
    // A file where the folder should be.
    fs::write(&added, "").expect("written");
    for _ in 0..2 {
        let status = node.add(hat()).await.expect_err("not kept");
        assert_refused(&status, Code::Internal, "served until the node stops");
        assert_eq!(names(&node.describe().await), ["axe", "pill", "skull", "hat"]);
    }
    fs::remove_file(&added).expect("removed");
    node.add(hat()).await.expect("now it is kept");
    assert_eq!(fs::read_dir(&added).expect("a folder").count(), 1);
}

#[tokio::test]
async fn a_model_that_panics_over_a_new_concept_serves_no_longer() {
    let folder = folder();
    let (mut node, probe) = TestNode::start(options(folder.path())).await;
    probe.set(Fault::Panic);
    let status = node.add(hat()).await.expect_err("panicked");
    assert_refused(&status, Code::Unavailable, "the test asked for a panic");
    node.until("", ServingStatus::NotServing).await;
    assert_eq!(node.describe().await.concepts.len(), 3);
}
