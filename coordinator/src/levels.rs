//! Levels of the final check: the raw score of each pinned concept above which a finished image must
//! not leave. They are pinned when a job is admitted and held against every answer, so that no node can
//! loosen them afterwards. Pure.

use std::collections::BTreeSet;

use fairlead_proto::v1::{
    CalibrationInfo, CheckResponse, ConceptRef, ConceptScore, NodeInfo, PinnedLevel, PinnedPolicy,
};

use crate::routing::{LiveNode, Run, check_threshold};

/// Outside their envelope the calibrations promise nothing, so a finished image must be clear: its level is
/// this share of the one inside.
const STRICTEST: f32 = 0.5;

/// The strictest level of each concept of `policy` among the calibrations that live nodes have for `run`,
/// and a part of it where the job lies outside their envelope. A concept without any has none: then its
/// nodes' own thresholds decide. A policy that only observes needs none.
pub(crate) fn pin(policy: &PinnedPolicy, nodes: &[LiveNode], run: &Run) -> Vec<PinnedLevel> {
    if policy.observe_only {
        return Vec::new();
    }
    let share = if policy.outside_envelope.is_empty() { 1.0 } else { STRICTEST };
    let level = |concept: &ConceptRef| {
        let serving = nodes.iter().filter(|node| node.serves(concept));
        let calibrations = serving.flat_map(|node| node.calibrations_for(concept, run));
        let levels = calibrations.filter_map(|calibration| {
            Some((check_threshold(calibration, &concept.name)?, &calibration.id))
        });
        let strictest = levels.min_by(|(a, id), (b, other)| a.total_cmp(b).then(id.cmp(other)));
        strictest.map(|(threshold, calibration_id)| PinnedLevel {
            concept: concept.name.clone(),
            energy: concept.energy.clone(),
            calibration_id: calibration_id.clone(),
            // A level below zero is strict already.
            threshold: threshold.min(share * threshold),
        })
    };
    policy.concepts.iter().filter_map(level).collect()
}

/// `score`, open if it lies above the level that `policy` pins, whatever the node says of it. A policy
/// that only observes opens nothing.
pub(crate) fn hold(policy: &PinnedPolicy, score: ConceptScore) -> ConceptScore {
    let level = find(policy, &score.concept, &score.energy);
    let above = level.is_some_and(|level| score.score > level.threshold);
    ConceptScore { open: (score.open || above) && !policy.observe_only, ..score }
}

/// What an answer rests on that the job was not admitted with, if anything: a calibration that is not
/// the pinned one.
pub(crate) fn change(
    policy: &PinnedPolicy,
    asked: &[ConceptRef],
    answer: &CheckResponse,
) -> Option<String> {
    if policy.observe_only {
        return None;
    }
    asked.iter().find_map(|concept| {
        let pinned = &find(policy, &concept.name, &concept.energy)?.calibration_id;
        let differs = !answer.calibration_ids.contains(pinned);
        differs.then(|| {
            format!(
                "concept `{}` was pinned with calibration {pinned} and checked with {:?}",
                concept.name, answer.calibration_ids
            )
        })
    })
}

/// Where `node` contradicts the others about a concept that they serve at the same version: an energy
/// model of another hash, or another calibration for the same run.
pub(crate) fn contradictions(node: &NodeInfo, others: &[LiveNode]) -> BTreeSet<String> {
    let mut found = BTreeSet::new();
    let refs = node.concepts.iter().filter_map(|info| info.concept.as_ref());
    for concept in refs {
        for other in others.iter().filter(|other| other.info.node_id != node.node_id) {
            if !other.serves(concept) {
                continue;
            }
            let (id, name) = (&other.info.node_id, &concept.name);
            if other.info.model_hash != node.model_hash {
                found.insert(format!(
                    "energy nodes `{}` and `{id}` serve `{name}` at one version with models of \
                     different hashes, {} and {}",
                    node.node_id, node.model_hash, other.info.model_hash
                ));
            }
            let level = |calibration| check_threshold(calibration, name);
            let mine = node.calibrations.iter().filter(|c| is_for(c, concept));
            for (a, b) in mine.flat_map(|a| other.calibrations(concept).map(move |b| (a, b))) {
                if same_run(a, b) && (a.id != b.id || level(a) != level(b)) {
                    found.insert(format!(
                        "energy nodes `{}` and `{id}` have different calibrations of `{name}` for the \
                         same run, {} and {}",
                        node.node_id, a.id, b.id
                    ));
                }
            }
        }
    }
    found
}

fn find<'a>(policy: &'a PinnedPolicy, concept: &str, energy: &str) -> Option<&'a PinnedLevel> {
    policy.levels.iter().find(|level| level.concept == concept && level.energy == energy)
}

fn is_for(calibration: &CalibrationInfo, concept: &ConceptRef) -> bool {
    calibration.concepts.is_empty() || calibration.concepts.contains(&concept.name)
}

fn same_run(a: &CalibrationInfo, b: &CalibrationInfo) -> bool {
    a.key == b.key && a.crops == b.crops
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use fairlead_proto::v1::{self, CalibrationKey, CheckThreshold, ConceptInfo};
    use proptest::prelude::*;

    fn concept() -> ConceptRef {
        ConceptRef { name: "axe".into(), version: "1".into(), energy: "clip".into() }
    }

    fn run() -> Run {
        let conditions = v1::RunConditions {
            size: Some(v1::ImageSize { width: 32, height: 32 }),
            guidance_scale: 5.0,
            // So that every envelope will do.
            may_leave_envelope: true,
            ..Default::default()
        };
        let key = CalibrationKey {
            generator: "g".into(),
            sampler: "ddim".into(),
            steps: 25,
            conditions: Some(conditions),
        };
        Run { key, crops: 4, window: (1.0, 0.6) }
    }

    fn node(id: &str, calibration: &str, threshold: f32) -> LiveNode {
        let calibration = CalibrationInfo {
            key: Some(CalibrationKey { conditions: None, ..run().key }),
            id: calibration.into(),
            crops: 4,
            window_start: 1.0,
            check_thresholds: vec![CheckThreshold { concept: "axe".into(), score: threshold }],
            ..Default::default()
        };
        let info = NodeInfo {
            node_id: id.into(),
            model_hash: "m".into(),
            concepts: vec![ConceptInfo { concept: Some(concept()), ..Default::default() }],
            calibrations: vec![calibration],
            ..Default::default()
        };
        LiveNode { info: Arc::new(info), since_unix_ms: 0, load: 0 }
    }

    fn policy(threshold: f32) -> PinnedPolicy {
        let policy = PinnedPolicy { concepts: vec![concept()], ..Default::default() };
        let levels = pin(&policy, &[node("a", "c", threshold)], &run());
        PinnedPolicy { levels, ..policy }
    }

    #[test]
    fn outside_the_envelope_the_level_is_stricter() {
        let outside = PinnedPolicy {
            concepts: vec![concept()],
            outside_envelope: vec!["size 64x64, calibrated 32x32".into()],
            ..Default::default()
        };
        for (inside, expected) in [(0.4, 0.2), (0.0, 0.0), (-0.4, -0.4)] {
            let levels = pin(&outside, &[node("a", "c", inside)], &run());
            assert_eq!(levels[0].threshold, expected);
        }
    }

    #[test]
    fn the_strictest_of_several_levels_is_pinned() {
        let policy = |concept| PinnedPolicy { concepts: vec![concept], ..Default::default() };
        for nodes in [
            [node("a", "lax", 0.9), node("b", "strict", 0.3)],
            [node("a", "strict", 0.3), node("b", "lax", 0.9)],
        ] {
            let levels = pin(&policy(concept()), &nodes, &run());
            assert_eq!((&*levels[0].calibration_id, levels[0].threshold), ("strict", 0.3));
        }
        let other = ConceptRef { version: "2".into(), ..concept() };
        assert_eq!(pin(&policy(other), &[node("a", "c", 0.3)], &run()), []);
    }

    proptest! {
        #[test]
        fn no_answer_loosens_a_pinned_level(
            threshold in -1.0f32..1.0, score in -1.0f32..1.0, open: bool, z in -9.0f32..9.0,
        ) {
            let answer = ConceptScore {
                concept: "axe".into(), energy: "clip".into(), score, z, gate: 1e9, open,
            };
            let held = hold(&policy(threshold), answer.clone());
            prop_assert_eq!(held.open, open || score > threshold);
            let observing = PinnedPolicy { observe_only: true, ..policy(threshold) };
            prop_assert!(!hold(&observing, answer).open);
        }
    }

    #[test]
    fn a_calibration_that_came_after_admission_is_told_of() {
        let answer =
            |id: &str| CheckResponse { calibration_ids: vec![id.into()], ..Default::default() };
        assert_eq!(change(&policy(0.3), &[concept()], &answer("c")), None);
        let told = change(&policy(0.3), &[concept()], &answer("d")).expect("it is another");
        assert!(told.contains("`axe`") && told.contains("\"d\""), "{told}");
        let observing = PinnedPolicy { observe_only: true, ..policy(0.3) };
        assert_eq!(change(&observing, &[concept()], &CheckResponse::default()), None);
    }

    #[test]
    fn replicas_that_contradict_each_other_are_told_of() {
        let honest = node("a", "c", 0.3);
        let others = [honest.clone()];
        assert_eq!(contradictions(&node("b", "c", 0.3).info, &others), BTreeSet::new());
        assert_eq!(contradictions(&honest.info, &others), BTreeSet::new(), "it is the same node");
        let lax = contradictions(&node("b", "d", 0.9).info, &others);
        assert!(lax.iter().any(|told| told.contains("different calibrations")), "{lax:?}");
        let claimed = contradictions(&node("b", "c", 0.9).info, &others);
        assert_eq!(claimed.len(), 1, "the same id with another level");
        let mut other = node("b", "c", 0.3);
        Arc::make_mut(&mut other.info).model_hash = "n".into();
        let told = contradictions(&other.info, &others);
        assert!(told.iter().any(|told| told.contains("different hashes")), "{told:?}");
    }
}
