//! What makes an energy node's answer usable. Anything else is refused: an image is never called
//! safe for want of an answer.

use std::collections::BTreeMap;

use fairlead_common::{probe::Probe, tensor};
use fairlead_proto::v1::{
    CheckResponse, ConceptRef, ConceptScore, EvaluateResponse, InputSpec, SampleEvaluation,
};

use super::Verdict;

/// Checks an answer about `batch` images and the concepts asked for; returns the samples with
/// scores in the order asked, and the gradient if some gate is open.
///
/// # Errors
/// What is wrong, with the concept named where there is one.
pub(crate) fn evaluation(
    response: EvaluateResponse,
    concepts: &[ConceptRef],
    batch: usize,
    input: &InputSpec,
    scores_only: bool,
) -> Result<(Vec<SampleEvaluation>, Option<Vec<f32>>), String> {
    if response.samples.len() != batch {
        return Err(format!("answered for {} images, asked for {batch}", response.samples.len()));
    }
    let mut samples = Vec::with_capacity(batch);
    for mut sample in response.samples {
        sample.scores = scores(sample.scores, concepts, scores_only)?;
        if is_open(&sample) {
            // A is at least 0.25 by its definition; f32 rounding aside.
            if !(0.2..=1.001).contains(&sample.amplitude) || !sample.energy.is_finite() {
                return Err(format!(
                    "a gate is open with amplitude {} and energy {}",
                    sample.amplitude, sample.energy
                ));
            }
        }
        samples.push(sample);
    }
    if !samples.iter().any(is_open) {
        return Ok((samples, None));
    }
    let gradient = response.gradient.ok_or("a gate is open but the gradient is missing")?;
    let gradient = self::gradient(&gradient, &samples, input)?;
    Ok((samples, Some(gradient)))
}

/// Checks the verdict on the image with hash `sha256`.
///
/// # Errors
/// As [`evaluation`].
pub(crate) fn verdict(
    response: CheckResponse,
    concepts: &[ConceptRef],
    sha256: &str,
    scores_only: bool,
) -> Result<Verdict, String> {
    if response.image_sha256 != sha256 {
        return Err(format!("judged image {}, not {sha256}", response.image_sha256));
    }
    let scores = scores(response.scores, concepts, scores_only)?;
    let open = scores.iter().any(|score| score.open);
    let remains =
        |concept: &&ConceptRef| !scores_only && response.remaining_concepts.contains(&concept.name);
    let remaining = concepts.iter().filter(remains).map(Probe::from).collect();
    Ok(Verdict { scores, flagged: open || (response.flagged && !scores_only), remaining })
}

/// Whether some gate of the image is open.
pub(crate) fn is_open(sample: &SampleEvaluation) -> bool {
    sample.scores.iter().any(|score| score.open)
}

/// Exactly one finite score per concept asked for, in that order; with `scores_only` all gates count
/// as closed.
fn scores(
    scores: Vec<ConceptScore>,
    asked: &[ConceptRef],
    scores_only: bool,
) -> Result<Vec<ConceptScore>, String> {
    let count = scores.len();
    let mut by_name: BTreeMap<String, ConceptScore> =
        scores.into_iter().map(|score| (score.concept.clone(), score)).collect();
    let ordered = asked
        .iter()
        .map(|concept| {
            let name = &concept.name;
            let score = by_name.remove(name).ok_or(format!("no score for concept {name}"))?;
            let ConceptScore { score: raw, z, gate, open, .. } = score;
            if ![raw, z, gate].iter().all(|value| value.is_finite()) {
                return Err(format!(
                    "concept {name}: score {raw}, z {z}, gate {gate} are not all finite"
                ));
            }
            // Who was asked counts, not who says it answers.
            let score = ConceptScore { energy: concept.energy.clone(), ..score };
            if scores_only {
                return Ok(ConceptScore { open: false, ..score });
            }
            if z > gate && !open {
                return Err(format!("concept {name}: closed at z {z}, above its gate {gate}"));
            }
            Ok(score)
        })
        .collect::<Result<Vec<_>, String>>()?;
    match by_name.keys().next() {
        None if count == asked.len() => Ok(ordered),
        None => Err("a concept is scored twice".to_owned()),
        Some(name) => Err(format!("a score for concept {name}, which was not asked for")),
    }
}

fn gradient(
    wire: &fairlead_proto::v1::Tensor,
    samples: &[SampleEvaluation],
    input: &InputSpec,
) -> Result<Vec<f32>, String> {
    let (shape, values) = tensor::decode(wire).map_err(|error| error.to_string())?;
    let expected = [samples.len(), 3, input.height as usize, input.width as usize];
    if shape != expected {
        return Err(format!("the gradient has shape {shape:?}, expected {expected:?}"));
    }
    let row = values.len() / samples.len();
    for (sample, values) in samples.iter().zip(values.chunks_exact(row)) {
        if let Some(open) = sample.scores.iter().find(|score| score.open) {
            let name = &open.concept;
            if !values.iter().all(|value| value.is_finite()) {
                return Err(format!("concept {name}: the gradient is not finite"));
            }
            if values.iter().all(|&value| value == 0.0) {
                return Err(format!("concept {name}: the gate is open but the gradient is zero"));
            }
        }
    }
    Ok(values)
}

#[cfg(test)]
mod tests {
    use super::*;
    use fairlead_fuzz::{bounded, fuzz, spoiled};
    use fairlead_proto::v1::Datatype;
    use prost::Message;

    fn asked() -> Vec<ConceptRef> {
        ["knife", "beer"]
            .map(|name| ConceptRef {
                name: name.into(),
                version: "v1".into(),
                ..Default::default()
            })
            .to_vec()
    }

    fn score(name: &str, open: bool) -> ConceptScore {
        let z = if open { 3.0 } else { 1.0 };
        ConceptScore { concept: name.into(), score: 0.1, z, gate: 2.5, open, ..Default::default() }
    }

    fn input() -> InputSpec {
        InputSpec { height: 2, width: 2, range_max: 1.0, ..Default::default() }
    }

    fn good() -> EvaluateResponse {
        let sample = |open: bool| SampleEvaluation {
            scores: vec![score("beer", open), score("knife", false)],
            energy: 0.2,
            amplitude: if open { 1.0 } else { 0.0 },
        };
        let mut values = vec![0.0; 24];
        values[1] = 0.5;
        EvaluateResponse {
            samples: vec![sample(true), sample(false)],
            gradient: Some(tensor::encode("gradient", &[2, 3, 2, 2], &values, Datatype::F16)),
            ..Default::default()
        }
    }

    fn refused(change: impl FnOnce(&mut EvaluateResponse)) -> String {
        let mut response = good();
        change(&mut response);
        evaluation(response, &asked(), 2, &input(), false).expect_err("it is refused")
    }

    #[test]
    fn a_good_answer_is_put_in_the_order_asked() {
        let (samples, gradient) =
            evaluation(good(), &asked(), 2, &input(), false).expect("it is good");
        assert_eq!(samples[0].scores[0].concept, "knife");
        assert_eq!(gradient.expect("a gate is open")[1], 0.5);
    }

    #[test]
    fn closed_gates_need_no_gradient_and_scores_only_opens_none() {
        let mut response = good();
        response.gradient = None;
        let (samples, gradient) =
            evaluation(response.clone(), &asked(), 2, &input(), true).expect("scores are enough");
        assert!(gradient.is_none() && !samples.iter().any(is_open));
        response.samples[0] = response.samples[1].clone();
        let (_, gradient) = evaluation(response, &asked(), 2, &input(), false).expect("closed");
        assert!(gradient.is_none());
    }

    #[test]
    fn every_defect_is_refused_and_named() {
        let gradient = |values: &[f32], shape: &[usize]| {
            Some(tensor::encode("gradient", shape, values, Datatype::F32))
        };
        let mut spoiled = vec![0.1; 24];
        spoiled[0] = f32::NAN;
        type Spoil = Box<dyn FnOnce(&mut EvaluateResponse)>;
        let cases: Vec<(Spoil, &str)> = vec![
            (Box::new(|r| r.samples.truncate(1)), "1 images"),
            (Box::new(|r| r.samples[0].scores.truncate(1)), "no score for concept knife"),
            (Box::new(|r| r.samples[0].scores.push(score("axe", false))), "axe"),
            (Box::new(|r| r.samples[0].scores.push(score("beer", false))), "twice"),
            (Box::new(|r| r.samples[1].scores[1].score = f32::NAN), "knife"),
            (Box::new(|r| r.samples[0].scores[0].z = f32::INFINITY), "beer"),
            (Box::new(|r| r.samples[1].scores[1].z = 3.0), "above its gate"),
            (Box::new(|r| r.samples[0].amplitude = 0.0), "amplitude"),
            (Box::new(|r| r.samples[0].amplitude = f32::NAN), "amplitude"),
            (Box::new(|r| r.gradient = None), "missing"),
            (Box::new(move |r| r.gradient = gradient(&[0.0; 24], &[2, 3, 2, 2])), "zero"),
            (Box::new(move |r| r.gradient = gradient(&spoiled, &[2, 3, 2, 2])), "not finite"),
            (Box::new(move |r| r.gradient = gradient(&[0.1; 24], &[2, 3, 4, 1])), "shape"),
            (Box::new(|r| r.gradient.as_mut().expect("present").data.truncate(3)), "bytes"),
        ];
        for (change, part) in cases {
            let message = refused(change);
            assert!(message.contains(part), "{part}: {message}");
        }
    }

    #[test]
    fn a_zero_row_of_a_closed_image_is_as_it_should_be() {
        assert!(evaluation(good(), &asked(), 2, &input(), false).is_ok());
    }

    #[test]
    fn a_verdict_binds_to_the_bytes_and_any_open_gate_flags() {
        let response = CheckResponse {
            scores: vec![score("knife", true), score("beer", false)],
            flagged: false,
            image_sha256: "ab".into(),
            ..Default::default()
        };
        let judge = |response: CheckResponse| verdict(response, &asked(), "ab", false);
        assert!(judge(response.clone()).expect("usable").flagged);
        let other = CheckResponse { image_sha256: "cd".into(), ..response.clone() };
        assert!(judge(other).expect_err("other bytes").contains("cd"));
        let mut spoiled = response.clone();
        spoiled.scores[1].score = f32::NAN;
        assert!(judge(spoiled).expect_err("not finite").contains("beer"));
        assert!(!verdict(response, &asked(), "ab", true).expect("usable").flagged);
    }

    #[test]
    fn spoiled_answers_are_sound_or_refused() {
        fuzz(spoiled(good().encode_to_vec()), |bytes| {
            let Ok(response) = EvaluateResponse::decode(&*bytes) else { return };
            let checked =
                bounded(bytes.len(), || evaluation(response, &asked(), 2, &input(), false));
            let Ok((samples, gradient)) = checked else { return };
            assert_eq!(samples.len(), 2);
            for (sample, row) in samples.iter().zip([0..12, 12..24]) {
                let names: Vec<&str> = sample.scores.iter().map(|s| s.concept.as_str()).collect();
                assert_eq!(names, ["knife", "beer"]);
                assert!(sample.scores.iter().all(|s| s.z.is_finite() && (s.open || s.z <= s.gate)));
                if is_open(sample) {
                    let row = &gradient.as_ref().expect("a gate is open")[row];
                    assert!(row.iter().all(|v| v.is_finite()) && row.iter().any(|&v| v != 0.0));
                }
            }
        });
        let good = CheckResponse {
            scores: vec![score("beer", false), score("knife", false)],
            image_sha256: "ab".into(),
            ..Default::default()
        };
        fuzz(spoiled(good.encode_to_vec()), |bytes| {
            let Ok(response) = CheckResponse::decode(&*bytes) else { return };
            let flagged = response.flagged;
            if let Ok(read) = bounded(bytes.len(), || verdict(response, &asked(), "ab", false)) {
                assert_eq!(read.scores.len(), 2);
                assert!(read.flagged || !flagged && read.scores.iter().all(|s| s.z <= s.gate));
            }
        });
    }
}
