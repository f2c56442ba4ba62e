//! Describe, Evaluate and Check: right answers, and every way to be refused.

use fairlead_proto::v1::{CheckRequest, ConceptRef, Tensor};
use tonic::Code;

use super::*;
use crate::testing::Fault;

/// Makes it a run of twice the size that calibrations are made for.
fn leave(key: Option<&mut CalibrationKey>) {
    let conditions = key.and_then(|key| key.conditions.as_mut()).expect("they are given");
    conditions.size = Some(ImageSize { width: 64, height: 64 });
}

#[tokio::test]
async fn outside_the_envelope_the_gates_are_used_where_the_policy_says_so() {
    let (_folder, mut node, _) = TestNode::calibrated().await;
    let mut request = node.request(&[axe()]).await;
    let inside = node.evaluate(request.clone()).await.expect("inside");
    leave(request.calibration.as_mut());
    let conditions = request.calibration.as_mut().and_then(|key| key.conditions.as_mut());
    conditions.expect("they are given").may_leave_envelope = true;
    assert_eq!(node.evaluate(request).await.expect("its policy says so"), inside);
}

#[tokio::test]
async fn describe_says_everything_a_caller_needs() {
    let (_folder, mut node, _) = TestNode::calibrated().await;
    let info = node.describe().await;
    assert_eq!(info.node_id, "node-1");
    assert_eq!(info.protocol_version, fairlead_proto::PROTOCOL_VERSION);
    let input = info.input.expect("an input");
    assert_eq!((input.height, input.width), (SIDE as u32, SIDE as u32));
    assert_eq!((input.range_min, input.range_max), (0.0, 1.0));
    assert!(input.max_batch >= 48);
    let names = info.concepts.iter().map(|c| c.concept.as_ref().expect("a ref").name.as_str());
    assert_eq!(names.collect::<Vec<_>>(), ["axe", "pill", "skull"]);
    let [calibration] = info.calibrations.as_slice() else { panic!("one calibration") };
    assert_eq!(calibration.key, Some(CalibrationKey { conditions: None, ..key(20) }));
    let envelope = calibration.envelope.clone().expect("it says what it was made with");
    assert_eq!(envelope.sizes, [ImageSize { width: 32, height: 32 }]);
    assert_eq!((calibration.images, calibration.generator_name.as_str()), (48, "tiny"));
}

#[tokio::test]
async fn benign_images_are_scored_and_left_alone() {
    let (_folder, mut node, probe) = TestNode::calibrated().await;
    let request = node.request(&[benign(1), benign(2)]).await;
    let answer = node.evaluate(request).await.expect("evaluated");
    assert!(answer.gradient.is_none());
    assert_eq!(answer.calibration_ids, [node.describe().await.calibrations[0].id.clone()]);
    assert!(answer.calibration_fallbacks.is_empty());
    for sample in &answer.samples {
        assert_eq!((sample.energy, sample.amplitude), (0.0, 0.0));
        assert!(sample.scores.iter().all(|s| !s.open && s.z <= s.gate && s.z != 0.0));
    }
    assert_eq!(probe.backwards(), 0);
}

#[tokio::test]
async fn an_open_gate_brings_a_gradient_for_its_image_only() {
    let (_folder, mut node, probe) = TestNode::calibrated().await;
    let request = node.request(&[benign(1), axe(), benign(2)]).await;
    let answer = node.evaluate(request).await.expect("evaluated");
    let open = |image: usize| {
        let scores = answer.samples[image].scores.iter();
        scores.filter(|s| s.open).map(|s| s.concept.as_str()).collect::<Vec<_>>()
    };
    assert_eq!((open(0), open(1), open(2)), (vec![], vec!["axe"], vec![]));
    assert!(answer.samples[1].energy > 0.0 && answer.samples[1].amplitude == 1.0);
    let (shape, gradient) = tensor::decode(&answer.gradient.expect("a gradient")).expect("sound");
    assert_eq!(shape, [3, 3, SIDE, SIDE]);
    let zero = |image: usize| gradient[image * PIXELS..][..PIXELS].iter().all(|g| *g == 0.0);
    assert_eq!((zero(0), zero(1), zero(2)), (true, false, true));
    assert_eq!(probe.backwards(), 1);
}

#[tokio::test]
async fn the_wire_gradient_agrees_with_finite_differences_on_pixels() {
    let folder = folder();
    let (mut node, _) = TestNode::start(options(folder.path())).await;
    // Crops and the thresholds of the file: a fallback, which the answer must name.
    let mut request = node.request(&[TestScorer::image_of(0, 0.08)]).await;
    request.concepts.truncate(2);
    request.crops = 4;
    request.allow_calibration_fallback = true;
    request.samples[0].crop_seed = 3;
    let answer = node.evaluate(request.clone()).await.expect("evaluated");
    assert!(answer.calibration_fallbacks[0].contains("fallback_threshold"));
    assert!(answer.samples[0].scores[0].open, "{:?}", answer.samples);
    let (_, gradient) = tensor::decode(&answer.gradient.expect("a gradient")).expect("sound");
    let pixels = request.pixels.clone().expect("pixels");
    let (_, values) = tensor::decode(&pixels).expect("sound");
    let mut random = SplitMix64::new(5);
    for _ in 0..3 {
        let direction = (0..PIXELS).map(|_| random.unit() - 0.5).collect::<Vec<_>>();
        let mut energies = [0.0; 2];
        for (energy, step) in energies.iter_mut().zip([0.02, -0.02]) {
            let moved = values.iter().zip(&direction).map(|(x, d)| x + step * d);
            let moved = moved.collect::<Vec<_>>();
            let shape = [1, 3, SIDE, SIDE];
            let tensor = tensor::encode("pixels", &shape, &moved, Datatype::F32);
            let moved = EvaluateRequest { pixels: Some(tensor), ..request.clone() };
            let answer = node.evaluate(moved).await.expect("evaluated");
            *energy = f64::from(answer.samples[0].energy);
        }
        let numeric = (energies[0] - energies[1]) / 0.04;
        let analytic = gradient.iter().zip(&direction).map(|(g, d)| f64::from(g * d)).sum::<f64>();
        assert!(
            (numeric - analytic).abs() < 5e-3 * numeric.abs().max(0.05),
            "{numeric} {analytic}"
        );
    }
}

#[tokio::test]
async fn answers_repeat_and_do_not_depend_on_the_batch() {
    let (_folder, mut node, _) = TestNode::calibrated().await;
    let images = [axe(), benign(3)];
    let mut both = node.request(&images).await;
    both.crops = 4;
    both.allow_calibration_fallback = true;
    both.concepts.truncate(2);
    let together = node.evaluate(both.clone()).await.expect("evaluated");
    assert_eq!(node.evaluate(both.clone()).await.expect("evaluated"), together);
    let mut alone = EvaluateRequest { samples: vec![both.samples[1].clone()], ..both.clone() };
    alone.pixels = node.request(&images[1..]).await.pixels;
    let alone = node.evaluate(alone).await.expect("evaluated");
    assert_eq!(alone.samples[0], together.samples[1]);
}

#[tokio::test]
async fn bad_requests_are_refused_with_what_where_and_what_to_do() {
    let (_folder, mut node, probe) = TestNode::calibrated().await;
    let good = node.request(&[benign(1)]).await;
    type Change = fn(&mut EvaluateRequest);
    fn pixels(request: &mut EvaluateRequest) -> &mut Tensor {
        request.pixels.as_mut().expect("a good request has pixels")
    }
    let cases: [(Code, &str, Change); 19] = [
        (Code::InvalidArgument, "`concepts` is empty", |r| r.concepts.clear()),
        (Code::InvalidArgument, "`axe` twice", |r| r.concepts.push(r.concepts[0].clone())),
        (Code::NotFound, "this node serves: axe, pill, skull", |r| {
            r.concepts.push(ConceptRef { name: "hat".into(), ..Default::default() });
        }),
        (Code::NotFound, "`pill`: version old", |r| r.concepts[1].version = "old".into()),
        (Code::InvalidArgument, "`crops` is 9", |r| r.crops = 9),
        (Code::InvalidArgument, "`samples` has 0 images", |r| r.samples.clear()),
        (Code::InvalidArgument, "`samples` has 1000 images", |r| {
            r.samples = vec![r.samples[0].clone(); 1000];
        }),
        (Code::InvalidArgument, "time NaN", |r| r.samples[0].time = f32::NAN),
        (Code::InvalidArgument, "time 1.5", |r| r.samples[0].time = 1.5),
        (Code::InvalidArgument, "`pixels` is missing", |r| r.pixels = None),
        (Code::InvalidArgument, "expected [1, 3, 12, 12]", |r| pixels(r).shape[2] = 13),
        (Code::InvalidArgument, "needs 1728", |r| pixels(r).data.truncate(100)),
        (Code::InvalidArgument, "datatype 0", |r| pixels(r).datatype = 0),
        (Code::InvalidArgument, "hold NaN", |r| {
            pixels(r).data[..4].copy_from_slice(&f32::NAN.to_le_bytes());
        }),
        (Code::InvalidArgument, "hold 200", |r| {
            pixels(r).data[..4].copy_from_slice(&200f32.to_le_bytes());
        }),
        (Code::InvalidArgument, "`calibration` is missing", |r| r.calibration = None),
        (
            Code::FailedPrecondition,
            "`fairlead calibrate --model-name tiny --steps 25 --crops 1 --size 32x32 --guidance 5`",
            |r| r.calibration = Some(key(25)),
        ),
        (Code::FailedPrecondition, "size 64x64, calibrated 32x32", |r| {
            leave(r.calibration.as_mut())
        }),
        (Code::FailedPrecondition, "size 0x0, calibrated 32x32", |r| {
            r.calibration = Some(CalibrationKey { conditions: None, ..key(20) });
        }),
    ];
    for (code, part, change) in cases {
        let mut request = good.clone();
        change(&mut request);
        let status = node.evaluate(request).await.expect_err(part);
        assert_refused(&status, code, part);
    }
    assert_eq!(probe.forwards(), 0, "refused before any device work");
    assert!(node.evaluate(good).await.is_ok());
}

#[tokio::test]
async fn a_missing_calibration_is_replaced_only_if_allowed_and_then_named() {
    let (_folder, mut node, _) = TestNode::calibrated().await;
    let mut request = node.request(&[axe()]).await;
    request.allow_calibration_fallback = true;
    request.calibration = Some(key(25));
    let nearest = node.evaluate(request.clone()).await.expect("evaluated");
    assert!(nearest.calibration_fallbacks[0].contains("for 20 steps in place of 25"));
    assert!(nearest.calibration_ids.is_empty());
    request.calibration = Some(CalibrationKey { generator: "other".into(), ..key(20) });
    let status = node.evaluate(request.clone()).await.expect_err("skull has no threshold");
    assert_refused(&status, Code::FailedPrecondition, "`skull`");
    request.concepts.truncate(2);
    let thresholds = node.evaluate(request.clone()).await.expect("evaluated");
    assert!(thresholds.calibration_fallbacks[0].contains("fallback_threshold"));
    assert!(thresholds.samples[0].scores[0].open && !thresholds.samples[0].scores[1].open);
    request.scores_only = true;
    request.allow_calibration_fallback = false;
    let raw = node.evaluate(request).await.expect("no calibration is needed");
    assert_eq!((raw.calibration_ids, raw.calibration_fallbacks), Default::default());
    assert!(raw.gradient.is_none() && raw.samples[0].scores.iter().all(|s| !s.open && s.z == 0.0));
    assert_eq!(raw.samples[0].scores[0].score, thresholds.samples[0].scores[0].score);
}

#[tokio::test]
async fn who_observes_sees_where_scores_stand_and_opens_nothing() {
    let (_folder, mut node, _) = TestNode::calibrated().await;
    let mut request = node.request(&[axe()]).await;
    let gated = node.evaluate(request.clone()).await.expect("evaluated").samples.remove(0).scores;
    assert!(gated[0].open);
    request.scores_only = true;
    let raw = node.evaluate(request).await.expect("evaluated");
    assert!(raw.gradient.is_none());
    for (raw, gated) in raw.samples[0].scores.iter().zip(&gated) {
        assert_eq!((raw.z, raw.gate, raw.open), (gated.z, gated.gate, false));
    }
}

#[tokio::test]
async fn a_broken_model_releases_nothing() {
    let (_folder, mut node, probe) = TestNode::calibrated().await;
    for (fault, part) in [
        (Fault::NanScore, "axe, pill, skull is not finite"),
        (Fault::TooFewScores, "scores"),
        (Fault::NanGradient, "not finite although the gate of axe is open"),
        (Fault::ZeroGradient, "all zero although the gate of axe is open"),
        (Fault::TinyGradient, "all zero although the gate of axe is open"),
        (Fault::WrongGradientShape, "gradient"),
    ] {
        probe.set(fault);
        let request = node.request(&[benign(1), axe()]).await;
        let status = node.evaluate(request).await.expect_err(part);
        assert_refused(&status, Code::Internal, part);
    }
    probe.set(Fault::None);
    let request = node.request(&[axe()]).await;
    assert!(node.evaluate(request).await.is_ok(), "a bad answer is not the end of the node");
}

/// A PNG of planar pixels in 0..1.
pub(super) fn png(image: &[f32], side: u32) -> Vec<u8> {
    let mut bytes = Vec::new();
    let mut encoder = png::Encoder::new(&mut bytes, side, side);
    encoder.set_color(png::ColorType::Rgb);
    let mut writer = encoder.write_header().expect("a header");
    let plane = (side * side) as usize;
    let rgb =
        (0..plane).flat_map(|at| [0, 1, 2].map(|c| (image[c * plane + at] * 255.0).round() as u8));
    writer.write_image_data(&rgb.collect::<Vec<_>>()).expect("pixels");
    writer.finish().expect("the end");
    bytes
}

#[tokio::test]
async fn a_finished_image_is_judged_by_its_bytes() {
    use sha2::Digest as _;
    let (_folder, mut node, probe) = TestNode::calibrated().await;
    let check = CheckRequest {
        concepts: node.refs().await,
        calibration: Some(key(20)),
        png: png(&benign(1), SIDE as u32),
        ..Default::default()
    };
    let clean = node.client.check(check.clone()).await.expect("checked").into_inner();
    assert!(!clean.flagged && clean.scores.len() == 3);
    assert_eq!(clean.image_sha256, hex::encode(sha2::Sha256::digest(&check.png)));
    assert!(!clean.calibration_ids.is_empty());
    let bad = CheckRequest { png: png(&axe(), SIDE as u32), ..check.clone() };
    let flagged = node.client.check(bad.clone()).await.expect("checked").into_inner();
    assert!(flagged.flagged && flagged.scores[0].open && !flagged.scores[1].open);
    let raw = CheckRequest { scores_only: true, calibration: None, ..bad };
    let raw = node.client.check(raw).await.expect("checked").into_inner();
    assert!(!raw.flagged && raw.scores[0].score == flagged.scores[0].score);
    assert_eq!(probe.backwards(), 0);

    type Change = fn(&mut CheckRequest);
    let refused: [(Code, &str, Change); 5] = [
        (Code::InvalidArgument, "`png` is empty", |r| r.png.clear()),
        (Code::InvalidArgument, "not a PNG", |r| r.png.truncate(30)),
        (Code::FailedPrecondition, "fairlead calibrate", |r| r.calibration = Some(key(7))),
        (Code::FailedPrecondition, "--size 32x32,64x64", |r| leave(r.calibration.as_mut())),
        (Code::NotFound, "axe", |r| r.concepts[0].version.clear()),
    ];
    for (code, part, change) in refused {
        let mut request = check.clone();
        change(&mut request);
        assert_refused(&node.client.check(request).await.expect_err(part), code, part);
    }
    probe.set(Fault::NanScore);
    let status = node.client.check(check).await.expect_err("no verdict");
    assert_refused(&status, Code::Internal, "no verdict");
}

#[tokio::test]
async fn a_finished_image_is_judged_by_one_level_whatever_it_was_steered_away_from() {
    let (_folder, mut node, _) = TestNode::calibrated().await;
    let concepts = node.refs().await;
    let thresholds = node.describe().await.calibrations.remove(0).check_thresholds;
    let (mut flagged, mut remaining) = (0, 0);
    for share in (0..=200).map(|i| i as f32 / 200.0) {
        let blend = benign(1).into_iter().zip(axe()).map(|(b, a)| b + share * (a - b));
        let check = CheckRequest {
            concepts: concepts.clone(),
            calibration: Some(key(20)),
            png: png(&blend.collect::<Vec<_>>(), SIDE as u32),
            ..Default::default()
        };
        let fresh = node.client.check(check.clone()).await.expect("checked").into_inner();
        assert!(fresh.remaining_concepts.is_empty());
        let check = CheckRequest { open_concepts: vec!["axe".to_owned()], ..check };
        let steered = node.client.check(check).await.expect("checked").into_inner();
        assert_eq!((&fresh.scores, fresh.flagged), (&steered.scores, steered.flagged));
        for score in &fresh.scores {
            assert_eq!(score.open, score.z > score.gate);
            let mut levels = thresholds.iter();
            let level = levels.find(|level| level.concept == score.concept).expect("it has one");
            assert_eq!(score.open, score.score > level.score);
        }
        assert_eq!(fresh.flagged, fresh.scores.iter().any(|score| score.open));
        let remains = steered.remaining_concepts;
        assert!(remains.is_empty() || remains == ["axe"]);
        flagged += usize::from(fresh.flagged);
        remaining += usize::from(!remains.is_empty());
    }
    assert!(flagged > 0 && remaining > 0 && flagged < 201, "{flagged} {remaining}");
}
