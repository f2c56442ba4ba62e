//! The rules of the final check: which answers of an energy node and which results of a worker
//! are acceptable. Whatever is not is no reason to release. Pure.

use std::collections::{BTreeMap, BTreeSet};

use fairlead_common::probe::Probe;
use fairlead_proto::v1::{self, ImageStatus};

/// Most reruns.
const MAX_RERUNS: u32 = 2;
/// Most text entries (nodes, calibrations, notices) taken from a worker, and their length.
const MAX_ENTRIES: usize = 64;
const MAX_ENTRY_BYTES: usize = 1_024;

/// What a node was asked in one check.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Question<'a> {
    pub(crate) concepts: &'a [v1::ConceptRef],
    pub(crate) image_sha256: &'a str,
    pub(crate) policy: &'a v1::PinnedPolicy,
}

/// Accepts a node's answer or says what is wrong with it. An accepted answer has exactly one finite
/// score per concept asked, for exactly the bytes sent, and agrees with itself.
pub(crate) fn accept_answer(
    question: Question<'_>,
    answer: &v1::CheckResponse,
) -> Result<(), String> {
    if answer.image_sha256 != question.image_sha256 {
        return Err(format!("it judged other bytes (sha256 {})", answer.image_sha256));
    }
    let asked: BTreeSet<&str> = question.concepts.iter().map(|c| c.name.as_str()).collect();
    let answered: BTreeSet<&str> = answer.scores.iter().map(|s| s.concept.as_str()).collect();
    if asked != answered || answer.scores.len() != asked.len() {
        return Err(format!("it was asked for {asked:?} and answered for {answered:?}"));
    }
    for score in &answer.scores {
        finite(score)?;
        // Who only observes is told where a score stands, and no gate opens.
        if score.z > score.gate && !score.open && !question.policy.observe_only {
            let v1::ConceptScore { concept, z, gate, .. } = score;
            return Err(format!("it calls `{concept}` closed at z {z} above its gate {gate}"));
        }
    }
    let open = answer.scores.iter().any(|score| score.open);
    if question.policy.observe_only {
        return if open || answer.flagged {
            Err("it flagged a request for scores only".to_owned())
        } else {
            Ok(())
        };
    }
    if open != answer.flagged {
        return Err("its flag contradicts its gates".to_owned());
    }
    if answer.calibration_ids.is_empty() && answer.calibration_fallbacks.is_empty() {
        return Err("it names no calibration".to_owned());
    }
    match answer.calibration_fallbacks.first() {
        Some(fallback) if !question.policy.allow_calibration_fallback => {
            Err(format!("it fell back to `{fallback}`, which the policy does not allow"))
        }
        _ => Ok(()),
    }
}

/// Accepts a worker's result for one image, or says what is wrong with it.
pub(crate) fn accept_outcome(
    spec: &v1::JobSpec,
    policy: &v1::PinnedPolicy,
    outcome: &v1::ImageOutcome,
) -> Result<(), String> {
    let record = outcome.record.as_ref().ok_or("it has no safety record")?;
    if record.reruns > MAX_RERUNS {
        return Err(format!("it claims {} reruns; at most {MAX_RERUNS}", record.reruns));
    }
    for step in &record.trajectory {
        step.scores.iter().try_for_each(finite)?;
        if !step.correction.is_finite() || !step.time.is_finite() {
            return Err(format!("step {} of its trajectory is not finite", step.step));
        }
    }
    let texts = record.energy_nodes.iter().chain(&record.calibrations).chain(&outcome.notices);
    if texts.clone().count() > 3 * MAX_ENTRIES || texts.clone().any(|t| t.len() > MAX_ENTRY_BYTES) {
        return Err("its lists of nodes, calibrations or notices are too long".to_owned());
    }
    match outcome.status() {
        ImageStatus::Released => accept_png(spec, &outcome.png, &record.pixels_sha256),
        ImageStatus::Withheld => accept_withheld(policy, outcome, record),
        other => Err(format!("its status is {}; send RELEASED or WITHHELD", other.as_str_name())),
    }
}

fn accept_withheld(
    policy: &v1::PinnedPolicy,
    outcome: &v1::ImageOutcome,
    record: &v1::SafetyRecord,
) -> Result<(), String> {
    if policy.observe_only {
        return Err("it withheld an image of an observe-only policy".to_owned());
    }
    if !outcome.png.is_empty() {
        return Err("it sent the pixels of a withheld image".to_owned());
    }
    let scores = withheld_scores(record);
    if scores.is_empty() {
        return Err("it withheld an image without saying for which scores".to_owned());
    }
    scores.iter().try_for_each(finite)
}

/// The scores for which a worker withheld an image: its final check, else its last step.
pub(crate) fn withheld_scores(record: &v1::SafetyRecord) -> &[v1::ConceptScore] {
    if !record.final_scores.is_empty() {
        return &record.final_scores;
    }
    let last = record.trajectory.iter().rev().find(|step| !step.scores.is_empty());
    last.map(|step| step.scores.as_slice()).unwrap_or_default()
}

/// A PNG signature, an IHDR of the size asked for, and a pixel hash that is one.
fn accept_png(spec: &v1::JobSpec, png: &[u8], pixels_sha256: &str) -> Result<(), String> {
    const SIGNATURE: &[u8] = b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR";
    let Some(header) = png.strip_prefix(SIGNATURE).and_then(|rest| rest.first_chunk::<8>()) else {
        return Err("its image is no PNG".to_owned());
    };
    let [w0, w1, w2, w3, h0, h1, h2, h3] = *header;
    let found = (u32::from_be_bytes([w0, w1, w2, w3]), u32::from_be_bytes([h0, h1, h2, h3]));
    if found != (spec.width(), spec.height()) {
        let (width, height) = (spec.width(), spec.height());
        return Err(format!("its PNG is {}x{}, asked was {width}x{height}", found.0, found.1));
    }
    let hex = |b: u8| b.is_ascii_digit() || (b'a'..=b'f').contains(&b);
    if pixels_sha256.len() != 64 || !pixels_sha256.bytes().all(hex) {
        return Err("its record has no pixels_sha256 in lower-case hex".to_owned());
    }
    Ok(())
}

/// Whether a preview may go out: every concept scored in this step, no gate open.
pub(crate) fn preview_allowed(policy: &v1::PinnedPolicy, step: &v1::StepProgress) -> bool {
    let scores: BTreeMap<Probe, &v1::ConceptScore> =
        step.scores.iter().map(|score| (score.into(), score)).collect();
    policy.observe_only
        || policy.concepts.iter().all(|concept| {
            let score = scores.get(&concept.into());
            score.is_some_and(|score| !score.open && finite(score).is_ok())
        })
}

fn finite(score: &v1::ConceptScore) -> Result<(), String> {
    if score.score.is_finite() && score.z.is_finite() && score.gate.is_finite() {
        return Ok(());
    }
    let v1::ConceptScore { concept, score, z, gate, .. } = score;
    Err(format!("its score of `{concept}` is not finite (score {score}, z {z}, gate {gate})"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use fairlead_fuzz::{bounded, fuzz, spoiled};
    use proptest::prelude::*;
    use prost::Message;

    fn score(concept: &str, z: f32) -> v1::ConceptScore {
        v1::ConceptScore {
            concept: concept.into(),
            score: 0.1,
            z,
            gate: 3.0,
            open: z > 3.0,
            ..Default::default()
        }
    }

    fn answer(scores: Vec<v1::ConceptScore>) -> v1::CheckResponse {
        v1::CheckResponse {
            flagged: scores.iter().any(|score| score.open),
            scores,
            image_sha256: "aa".into(),
            calibration_ids: vec!["c".into()],
            ..Default::default()
        }
    }

    fn judge(policy: &v1::PinnedPolicy, answer: &v1::CheckResponse) -> Result<(), String> {
        let concept = |name: &str| v1::ConceptRef {
            name: name.into(),
            version: "1".into(),
            ..Default::default()
        };
        let concepts = [concept("axe"), concept("bomb")];
        accept_answer(Question { concepts: &concepts, image_sha256: "aa", policy }, answer)
    }

    #[test]
    fn a_sound_answer_is_accepted_open_or_closed() {
        let policy = v1::PinnedPolicy::default();
        assert_eq!(judge(&policy, &answer(vec![score("axe", 1.0), score("bomb", 2.0)])), Ok(()));
        assert_eq!(judge(&policy, &answer(vec![score("axe", 1.0), score("bomb", 4.0)])), Ok(()));
    }

    #[test]
    fn an_unsound_answer_is_refused() {
        type Spoil = fn(&mut v1::CheckResponse);
        let cases: [(Spoil, &str); 10] = [
            (|a| a.image_sha256 = "bb".into(), "other bytes"),
            (|a| a.scores.truncate(1), "answered for {\"axe\"}"),
            (|a| a.scores.push(score("axe", 0.0)), "answered for"),
            (|a| a.scores[0].concept = "dog".into(), "answered for"),
            (|a| a.scores[1].z = f32::NAN, "`bomb` is not finite"),
            (|a| a.scores[1].score = f32::INFINITY, "`bomb` is not finite"),
            (|a| a.scores[0].z = 5.0, "closed at z 5 above its gate 3"),
            (|a| a.flagged = true, "contradicts"),
            (|a| a.calibration_ids.clear(), "no calibration"),
            (|a| a.calibration_fallbacks = vec!["fixed 3".into()], "fell back to `fixed 3`"),
        ];
        for (spoil, expected) in cases {
            let mut answer = answer(vec![score("axe", 1.0), score("bomb", 2.0)]);
            spoil(&mut answer);
            let problem = judge(&v1::PinnedPolicy::default(), &answer).expect_err(expected);
            assert!(problem.contains(expected), "{problem}");
        }
    }

    #[test]
    fn a_fallback_and_raw_scores_need_the_policys_leave() {
        let fallback = v1::CheckResponse {
            calibration_fallbacks: vec!["fixed 3".into()],
            calibration_ids: Vec::new(),
            ..answer(vec![score("axe", 1.0), score("bomb", 2.0)])
        };
        let lenient = v1::PinnedPolicy { allow_calibration_fallback: true, ..Default::default() };
        assert_eq!(judge(&lenient, &fallback), Ok(()));
        let observe = v1::PinnedPolicy { observe_only: true, ..Default::default() };
        let mut raw = answer(vec![score("axe", 0.0), score("bomb", 0.0)]);
        raw.calibration_ids.clear();
        assert_eq!(judge(&observe, &raw), Ok(()));
        raw.scores[0].z = 5.0;
        assert_eq!(judge(&observe, &raw), Ok(()), "above the gate, and merely said");
        raw.scores[0].open = true;
        assert!(judge(&observe, &raw).is_err());
    }

    fn png(width: u32, height: u32) -> Vec<u8> {
        let mut png = b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR".to_vec();
        png.extend(width.to_be_bytes());
        png.extend(height.to_be_bytes());
        png
    }

    fn outcome() -> v1::ImageOutcome {
        v1::ImageOutcome {
            status: ImageStatus::Released.into(),
            png: png(32, 16),
            record: Some(v1::SafetyRecord {
                pixels_sha256: "0a".repeat(32),
                trajectory: vec![v1::StepRecord {
                    scores: vec![score("axe", 1.0)],
                    ..Default::default()
                }],
                ..Default::default()
            }),
            ..Default::default()
        }
    }

    #[test]
    fn a_workers_result_must_be_sound() {
        let spec = v1::JobSpec { width: Some(32), height: Some(16), ..Default::default() };
        let policy = v1::PinnedPolicy::default();
        assert_eq!(accept_outcome(&spec, &policy, &outcome()), Ok(()));
        type Spoil = fn(&mut v1::ImageOutcome, &mut v1::SafetyRecord);
        let cases: [(Spoil, &str); 9] = [
            (|o, _| o.png.clear(), "no PNG"),
            (|o, _| o.png = png(16, 32), "16x32, asked was 32x16"),
            (|_, r| r.pixels_sha256 = "0A".repeat(32), "pixels_sha256"),
            (|_, r| r.reruns = 3, "3 reruns"),
            (|_, r| r.trajectory[0].scores[0].score = f32::NAN, "not finite"),
            (|_, r| r.trajectory[0].correction = f32::INFINITY, "not finite"),
            (|_, r| r.calibrations = vec!["x".repeat(2_000)], "too long"),
            (|o, _| o.set_status(ImageStatus::Failed), "IMAGE_STATUS_FAILED"),
            (|o, _| o.set_status(ImageStatus::Withheld), "pixels of a withheld image"),
        ];
        for (spoil, expected) in cases {
            let mut outcome = outcome();
            let mut record = outcome.record.take().expect("there is one");
            spoil(&mut outcome, &mut record);
            outcome.record = Some(record);
            let problem = accept_outcome(&spec, &policy, &outcome).expect_err(expected);
            assert!(problem.contains(expected), "{problem}");
        }
        let bare = v1::ImageOutcome { record: None, ..outcome() };
        assert!(accept_outcome(&spec, &policy, &bare).is_err());
    }

    #[test]
    fn a_withheld_image_says_why() {
        let spec = v1::JobSpec::default();
        let mut withheld = v1::ImageOutcome { png: vec![], ..outcome() };
        withheld.set_status(ImageStatus::Withheld);
        let policy = v1::PinnedPolicy::default();
        assert_eq!(accept_outcome(&spec, &policy, &withheld), Ok(()));
        let observe = v1::PinnedPolicy { observe_only: true, ..Default::default() };
        assert!(accept_outcome(&spec, &observe, &withheld).is_err());
        withheld.record.as_mut().expect("there is one").trajectory.clear();
        assert!(accept_outcome(&spec, &policy, &withheld).is_err());
    }

    proptest! {
        #[test]
        fn a_preview_goes_out_only_if_every_concept_was_scored_and_closed(
            scored in prop::collection::btree_map("[a-d]", 0f32..6.0, 0..4),
            wanted in prop::collection::btree_set("[a-d]", 0..4),
        ) {
            let concept = |name: &String| v1::ConceptRef { name: name.clone(), version: "1".into(), ..Default::default() };
            let policy = v1::PinnedPolicy {
                concepts: wanted.iter().map(concept).collect(), ..Default::default()
            };
            let step = v1::StepProgress {
                scores: scored.iter().map(|(name, z)| score(name, *z)).collect(),
                ..Default::default()
            };
            let closed = wanted.iter().all(|name| scored.get(name).is_some_and(|z| *z <= 3.0));
            prop_assert_eq!(preview_allowed(&policy, &step), closed);
        }
    }

    #[test]
    fn spoiled_answers_of_nodes_are_sound_or_refused() {
        let valid = answer(vec![score("axe", 1.0), score("bomb", 4.0)]).encode_to_vec();
        fuzz(spoiled(valid), |bytes| {
            let Ok(answer) = v1::CheckResponse::decode(&*bytes) else { return };
            if bounded(bytes.len(), || judge(&v1::PinnedPolicy::default(), &answer)).is_ok() {
                assert_eq!((answer.scores.len(), answer.image_sha256.as_str()), (2, "aa"));
                let above = answer.scores.iter().any(|score| score.z > score.gate);
                assert!(answer.flagged || !above);
                assert!(answer.scores.iter().all(|score| score.score.is_finite()));
            }
        });
    }

    #[test]
    fn spoiled_results_of_workers_are_sound_or_refused() {
        let spec = v1::JobSpec { width: Some(32), height: Some(16), ..Default::default() };
        let policy = v1::PinnedPolicy::default();
        fuzz(spoiled(outcome().encode_to_vec()), |bytes| {
            let Ok(outcome) = v1::ImageOutcome::decode(&*bytes) else { return };
            if bounded(bytes.len(), || accept_outcome(&spec, &policy, &outcome)).is_ok() {
                let released = outcome.status() == ImageStatus::Released;
                assert!(released || outcome.png.is_empty());
                assert!(!released || outcome.png.starts_with(&png(32, 16)));
            }
        });
    }
}
