//! The rules of the final check: which answers of an energy node and which results of a worker
//! are acceptable. Whatever is not is no reason to release. Pure.

use std::collections::BTreeSet;

use fairlead_common::{
    bounds::{self, MAX_CONCEPTS},
    limits::MAX_RERUNS,
    picture::Rgb8,
    probe::Probe,
};
use fairlead_proto::{
    MAX_PREVIEW_SIDE,
    v1::{self, ImageStatus},
};
use prost::Message;

/// Most text entries (nodes, calibrations) taken from a worker, and their length.
const MAX_ENTRIES: usize = 64;
const MAX_ENTRY_BYTES: usize = bounds::MAX_TEXT_CHARS;
/// Largest report of a worker about one image.
const MAX_REPORT_BYTES: usize = 8 << 20;

/// What all nodes are asked in one check.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Question<'a> {
    pub(crate) image_sha256: &'a str,
    pub(crate) policy: &'a v1::PinnedPolicy,
}

/// Accepts a node's answer about `concepts` or says what is wrong with it. An accepted answer has
/// exactly one finite score per concept asked, for exactly the bytes sent, and agrees with itself.
pub(crate) fn accept_answer(
    question: Question<'_>,
    concepts: &[v1::ConceptRef],
    answer: &v1::CheckResponse,
) -> Result<(), String> {
    if answer.image_sha256 != question.image_sha256 {
        let hash = bounds::shown(&answer.image_sha256);
        return Err(format!("it judged other bytes (sha256 {hash})"));
    }
    bounds::answer(&answer.calibration_ids, &answer.calibration_fallbacks)
        .map_err(|problem| format!("its answer {problem}"))?;
    let asked: BTreeSet<&str> = concepts.iter().map(|c| c.name.as_str()).collect();
    let answered: BTreeSet<&str> = answer.scores.iter().map(|s| s.concept.as_str()).collect();
    if asked != answered || answer.scores.len() != asked.len() {
        let answered = answered.into_iter().take(MAX_CONCEPTS).collect::<Vec<_>>().join(", ");
        let answered = bounds::shown(&answered);
        return Err(format!("it was asked for {asked:?} and answered for {answered}"));
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

/// What a worker's result for one image comes to.
#[derive(Debug, PartialEq)]
pub(crate) enum Outcome {
    /// Pixels of the size asked for, which nobody has checked.
    Proposed(Rgb8),
    /// The worker withheld it; its report says for which pinned concepts.
    Withheld,
}

/// Accepts a worker's result for one image, or says what is wrong with it.
pub(crate) fn accept_outcome(
    spec: &v1::JobSpec,
    policy: &v1::PinnedPolicy,
    mut outcome: v1::ImageOutcome,
) -> Result<(Outcome, v1::WorkerReport), String> {
    let report = outcome.report.take().ok_or("it has no report")?;
    accept_report(spec, policy, &report)?;
    let texts = report.energy_nodes.iter().chain(&report.calibrations);
    if texts.clone().count() > 2 * MAX_ENTRIES || texts.clone().any(|t| t.len() > MAX_ENTRY_BYTES) {
        return Err("its lists of nodes or calibrations are too long".to_owned());
    }
    match outcome.status() {
        ImageStatus::Released => {
            let (width, height) = (spec.width(), spec.height());
            let bytes = outcome.pixels.len();
            let picture = Rgb8::new(width, height, outcome.pixels).ok_or_else(|| {
                format!("its image has {bytes} bytes of pixels; asked was {width}x{height} RGB")
            })?;
            Ok((Outcome::Proposed(picture), report))
        }
        ImageStatus::Withheld => {
            accept_withheld(policy, &outcome, &report)?;
            Ok((Outcome::Withheld, report))
        }
        other => Err(format!("its status is {}; send RELEASED or WITHHELD", other.as_str_name())),
    }
}

/// A report is a worker's word, and must at least be one that an honest worker could give: of this job's
/// steps and of concepts that the policy pins.
fn accept_report(
    spec: &v1::JobSpec,
    policy: &v1::PinnedPolicy,
    report: &v1::WorkerReport,
) -> Result<(), String> {
    let bytes = report.encoded_len();
    if bytes > MAX_REPORT_BYTES {
        return Err(format!("its report has {bytes} bytes; at most {MAX_REPORT_BYTES}"));
    }
    if report.reruns > MAX_RERUNS {
        return Err(format!("it claims {} reruns; at most {MAX_RERUNS}", report.reruns));
    }
    let (steps, most) = (report.trajectory.len(), spec.steps() * (MAX_RERUNS + 1));
    if steps > most as usize {
        return Err(format!("its trajectory has {steps} steps; at most {most}"));
    }
    let pinned: BTreeSet<Probe> = policy.concepts.iter().map(Probe::from).collect();
    for step in &report.trajectory {
        if !step.correction.is_finite() || !step.time.is_finite() {
            return Err(format!("step {} of its trajectory is not finite", step.step));
        }
        accept_scores(&pinned, &step.scores)?;
    }
    accept_scores(&pinned, &report.final_scores)
}

/// At most one finite score of each concept and energy that is `pinned`.
fn accept_scores(pinned: &BTreeSet<Probe>, scores: &[v1::ConceptScore]) -> Result<(), String> {
    let mut seen = BTreeSet::new();
    for score in scores {
        finite(score)?;
        let probe = Probe::from(score);
        if !pinned.contains(&probe) {
            return Err(format!("it scores {:?}, which the policy does not pin", score.concept));
        }
        if !seen.insert(probe) {
            return Err(format!("it scores `{}` twice", score.concept));
        }
    }
    Ok(())
}

fn accept_withheld(
    policy: &v1::PinnedPolicy,
    outcome: &v1::ImageOutcome,
    report: &v1::WorkerReport,
) -> Result<(), String> {
    if policy.observe_only {
        return Err("it withheld an image of an observe-only policy".to_owned());
    }
    if !outcome.pixels.is_empty() {
        return Err("it sent the pixels of a withheld image".to_owned());
    }
    match report.final_scores.iter().any(|score| score.open) {
        true => Ok(()),
        false => Err("it withheld an image without saying for which concept".to_owned()),
    }
}

/// Accepts a preview of a job's image at a step, or says what is wrong with it.
pub(crate) fn accept_preview(spec: &v1::JobSpec, preview: v1::Preview) -> Result<Rgb8, String> {
    let v1::Preview { step, width, height, pixels, .. } = preview;
    if step >= spec.steps() {
        return Err(format!("it is of step {step}, and there are {}", spec.steps()));
    }
    if width > MAX_PREVIEW_SIDE || height > MAX_PREVIEW_SIDE {
        return Err(format!("it is {width}x{height}; at most {MAX_PREVIEW_SIDE} a side"));
    }
    let bytes = pixels.len();
    Rgb8::new(width, height, pixels).ok_or_else(|| {
        format!("it has {bytes} bytes of pixels and says it is {width}x{height} RGB")
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
        accept_answer(Question { image_sha256: "aa", policy }, &concepts, answer)
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
            (|a| a.scores.truncate(1), "answered for `axe`"),
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

    fn policy() -> v1::PinnedPolicy {
        let concept =
            v1::ConceptRef { name: "axe".into(), version: "1".into(), ..Default::default() };
        v1::PinnedPolicy { concepts: vec![concept], ..Default::default() }
    }

    fn spec() -> v1::JobSpec {
        v1::JobSpec { width: Some(4), height: Some(2), steps: Some(2), ..Default::default() }
    }

    fn outcome() -> v1::ImageOutcome {
        v1::ImageOutcome {
            status: ImageStatus::Released.into(),
            pixels: vec![7; 24],
            report: Some(v1::WorkerReport {
                trajectory: vec![v1::StepRecord {
                    scores: vec![score("axe", 1.0)],
                    ..Default::default()
                }],
                ..Default::default()
            }),
            ..Default::default()
        }
    }

    fn accept(outcome: v1::ImageOutcome) -> Result<Outcome, String> {
        accept_outcome(&spec(), &policy(), outcome).map(|(outcome, _)| outcome)
    }

    #[test]
    fn a_workers_result_must_be_sound() {
        let picture = Rgb8::new(4, 2, vec![7; 24]).expect("as many as it takes");
        assert_eq!(accept(outcome()), Ok(Outcome::Proposed(picture)));
        type Spoil = fn(&mut v1::ImageOutcome, &mut v1::WorkerReport);
        let cases: [(Spoil, &str); 13] = [
            (|o, _| o.pixels.clear(), "has 0 bytes of pixels; asked was 4x2"),
            (|o, _| o.pixels.push(0), "25 bytes"),
            (|_, r| r.reruns = 3, "3 reruns"),
            (|_, r| r.trajectory[0].scores[0].score = f32::NAN, "not finite"),
            (|_, r| r.trajectory[0].correction = f32::INFINITY, "not finite"),
            (|_, r| r.trajectory = vec![v1::StepRecord::default(); 7], "7 steps; at most 6"),
            (|_, r| r.trajectory[0].scores[0].concept = "cat".into(), "does not pin"),
            (|_, r| r.final_scores = vec![score("cat", 1.0)], "\"cat\", which the policy does not"),
            (|_, r| r.final_scores = vec![score("axe", 1.0); 2], "`axe` twice"),
            (|_, r| r.calibrations = vec!["x".repeat(2_000)], "too long"),
            (|_, r| r.calibrations = vec!["x".repeat(9 << 20)], "bytes; at most 8388608"),
            (|o, _| o.set_status(ImageStatus::Failed), "IMAGE_STATUS_FAILED"),
            (|o, _| o.set_status(ImageStatus::Withheld), "pixels of a withheld image"),
        ];
        for (spoil, expected) in cases {
            let mut outcome = outcome();
            let mut report = outcome.report.take().expect("there is one");
            spoil(&mut outcome, &mut report);
            outcome.report = Some(report);
            let problem = accept(outcome).expect_err(expected);
            assert!(problem.contains(expected), "{problem}");
        }
        assert!(accept(v1::ImageOutcome { report: None, ..outcome() }).is_err());
    }

    #[test]
    fn a_withheld_image_says_for_which_pinned_concept() {
        let mut withheld = v1::ImageOutcome { pixels: vec![], ..outcome() };
        withheld.set_status(ImageStatus::Withheld);
        let with = |scores: Vec<v1::ConceptScore>| {
            let mut withheld = withheld.clone();
            withheld.report.as_mut().expect("there is one").final_scores = scores;
            withheld
        };
        assert_eq!(accept(with(vec![score("axe", 4.0)])), Ok(Outcome::Withheld));
        for scores in [vec![], vec![score("axe", 1.0)], vec![score("cat", 4.0)]] {
            let problem = accept(with(scores.clone())).expect_err("it gives no reason");
            assert!(problem.contains("with") || problem.contains("pin"), "{problem}");
        }
        let observe = v1::PinnedPolicy { observe_only: true, ..policy() };
        let observed = accept_outcome(&spec(), &observe, with(vec![score("axe", 4.0)]));
        assert!(observed.is_err());
    }

    #[test]
    fn a_preview_is_small_and_of_a_step_that_there_is() {
        let preview = v1::Preview { index: 0, step: 1, width: 2, height: 1, pixels: vec![1; 6] };
        assert!(accept_preview(&spec(), preview.clone()).is_ok());
        let large = v1::Preview { width: 256, pixels: vec![0; 768], ..preview.clone() };
        for (wrong, expected) in [
            (v1::Preview { step: 2, ..preview.clone() }, "step 2"),
            (v1::Preview { pixels: vec![1; 5], ..preview.clone() }, "5 bytes"),
            (v1::Preview { width: 0, pixels: vec![], ..preview.clone() }, "0x1"),
            (large, "256x1; at most 128"),
        ] {
            let problem = accept_preview(&spec(), wrong).expect_err(expected);
            assert!(problem.contains(expected), "{problem}");
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
        fuzz(spoiled(outcome().encode_to_vec()), |bytes| {
            let Ok(outcome) = v1::ImageOutcome::decode(&*bytes) else { return };
            let status = outcome.status();
            match bounded(bytes.len(), || accept(outcome)) {
                Ok(Outcome::Proposed(picture)) => {
                    assert_eq!(status, ImageStatus::Released);
                    assert_eq!((picture.width(), picture.height()), (4, 2));
                }
                Ok(Outcome::Withheld) => assert_eq!(status, ImageStatus::Withheld),
                Err(_) => {}
            }
        });
    }
}
