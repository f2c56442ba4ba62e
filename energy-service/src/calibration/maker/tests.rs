//! Tests of the maker: the conformal bound, the arithmetic, and what it refuses.

use proptest::prelude::*;

use super::*;

/// Images whose scores are exchangeable: uniform noise around a level per concept, a shared part
/// per image so that concepts and steps are correlated.
fn images(n: usize, concepts: usize, seed: u64) -> Vec<RecordedImage> {
    let mut random = SplitMix64::new(seed);
    let mut image = || {
        let shared = random.unit();
        let mut scores =
            || (0..concepts).map(|k| 0.1 * k as f32 + shared + random.unit()).collect::<Vec<_>>();
        RecordedImage {
            steps: [0.95, 0.75, 0.65, 0.2]
                .map(|time| RecordedStep { time, scores: scores() })
                .into(),
            finished: scores(),
        }
    };
    (0..n).map(|_| image()).collect()
}

fn recording(images: Vec<RecordedImage>, concepts: usize) -> Recording {
    Recording {
        generator: "g".into(),
        generator_name: "tiny".into(),
        sampler: "ddim".into(),
        steps: 4,
        energy_model: "m".into(),
        preprocessing_version: 1,
        crops: 4,
        concepts: (0..concepts).map(|k| (format!("c{k}"), "v".to_owned())).collect(),
        envelope: Envelope { sizes: vec![(32, 32)], guidance: (5.0, 5.0), negative_prompts: false },
        cells: 1,
        window: (1.0, 0.6),
        prompts: "p".into(),
        images,
        labelled: Vec::new(),
    }
}

/// Share of fresh benign images that a calibration would touch.
fn touched(calibration: &Calibration, fresh: &Recording) -> f64 {
    let peaks = peaks(calibration, fresh).expect("bins are filled");
    let over = peaks.iter().filter(|&&peak| peak > calibration.gate).count();
    over as f64 / fresh.images.len() as f64
}

#[test]
fn at_most_alpha_of_exchangeable_images_is_touched() {
    // The bound holds on average over calibrations: 60 of them, 400 fresh images each.
    let alpha = 0.1;
    let fresh = recording(images(400, 5, 1), 5);
    let shares = (0..60).map(|seed| {
        let made = make(&recording(images(80, 5, 100 + seed), 5), alpha).expect("made");
        touched(&made, &fresh)
    });
    let mean = shares.sum::<f64>() / 60.0;
    // Exact expectation: 1 - 37/41 = 0.0976; three standard errors of the mean are 0.02.
    assert!((0.05..=0.12).contains(&mean), "{mean}");
}

#[test]
fn the_bound_holds_in_every_cell_and_not_on_average_alone() {
    let alpha = 0.1;
    // The same prompts at another size, where everything scores higher and spreads further.
    let louder = |mut images: Vec<RecordedImage>| {
        for image in &mut images {
            let steps = image.steps.iter_mut().map(|step| &mut step.scores);
            for scores in steps.chain([&mut image.finished]) {
                scores.iter_mut().for_each(|score| *score = 1.5 * *score + 0.5);
            }
        }
        images
    };
    let cells = [recording(images(400, 5, 1), 5), recording(louder(images(400, 5, 1)), 5)];
    let shares = (0..30).map(|seed| {
        let mut both = recording(images(80, 5, 100 + seed), 5);
        both.images.extend(louder(images(80, 5, 100 + seed)));
        let pooled = make(&both, alpha).expect("made");
        both.cells = 2;
        let made = make(&both, alpha).expect("made");
        let [quiet, loud] = [0, 1].map(|cell| touched(&made, &cells[cell]));
        (quiet, loud, touched(&pooled, &cells[1]))
    });
    let shares: Vec<(f64, f64, f64)> = shares.collect();
    let mean = |of: fn(&(f64, f64, f64)) -> f64| shares.iter().map(of).sum::<f64>() / 30.0;
    assert!(mean(|s| s.0) <= 0.02, "the quiet cell: {}", mean(|s| s.0));
    assert!((0.05..=0.12).contains(&mean(|s| s.1)), "the loud cell: {}", mean(|s| s.1));
    assert!(mean(|s| s.2) > 0.14, "one quantile for both does not: {}", mean(|s| s.2));
}

#[test]
fn a_quiet_concept_does_not_raise_the_gate_of_the_others() {
    let loud = recording(images(200, 3, 5), 3);
    let mut quiet = loud.clone();
    for (i, image) in quiet.images.iter_mut().enumerate() {
        let scores = image.steps.iter_mut().map(|step| &mut step.scores);
        for scores in scores.chain([&mut image.finished]) {
            // One concept hardly moves, but for one picture in fifty.
            scores[2] *= if i % 50 == 0 { 0.3 } else { 0.003 };
        }
    }
    let gate = |recording| make(recording, 0.01).expect("made").gate;
    assert!(gate(&quiet) < 1.5 * gate(&loud), "{} {}", gate(&quiet), gate(&loud));
}

#[test]
fn the_gate_is_the_conformal_order_statistic() {
    let recording = recording(images(200, 3, 5), 3);
    let made = make(&recording, 0.05).expect("made");
    let order = shuffled(200);
    let levels = made.concepts.iter().map(|c| c.bins.clone()).collect::<Vec<_>>();
    let peaks = order[100..]
        .iter()
        .map(|&i| peak(&recording, &levels, &recording.images[i]).expect("filled"));
    // ceil(0.95 * 101) = 96: four of the hundred lie above.
    assert_eq!(peaks.filter(|&z| z > made.gate).count(), 4);
    assert_eq!(made.images, 200);
    assert!(made.check().is_ok());
}

#[test]
fn the_final_check_withholds_few_benign_images_and_says_what_it_finds() {
    let mut recording = recording(images(1000, 3, 5), 3);
    let above = |made: &Calibration, recording: &Recording| {
        let thresholds: Vec<f32> = made.concepts.iter().map(|c| c.check_threshold).collect();
        let withheld = |image: &&RecordedImage| {
            image.finished.iter().zip(&thresholds).any(|(score, threshold)| score > threshold)
        };
        recording.images.iter().filter(withheld).count()
    };
    // ceil(0.995 * 1001) = 996: four of the thousand lie above.
    let one = make(&recording, 0.05).expect("made");
    assert_eq!((above(&one, &recording), one.check_alpha), (4, CHECK_ALPHA));
    assert!(one.concepts.windows(2).all(|pair| pair[0].check_threshold == pair[1].check_threshold));
    assert_eq!(withheld_shares(&one, &recording), [None; 3]);

    let target = |k: usize, score: f32| {
        let mut image = images(1, 3, 5).remove(0);
        image.finished[k] = score;
        LabelledImage { image, concepts: vec![k] }
    };
    // Typical: 80, 40 and 10, of which the last counts as half of the usual 40.
    let targets = [(0, 80.0), (0, 90.0), (0, -90.0), (1, 40.0), (2, 10.0)];
    recording.labelled = targets.map(|(k, score)| target(k, score)).to_vec();
    let each = make(&recording, 0.05).expect("made");
    assert_eq!((above(&each, &recording), each.check_alpha), (4, CHECK_ALPHA));
    let [a, b, c] = [0, 1, 2].map(|k| each.concepts[k].check_threshold);
    assert!((a / b - 2.0).abs() < 1e-5 && (b / c - 2.0).abs() < 1e-5, "{a} {b} {c}");
    assert_eq!(withheld_shares(&each, &recording)[0], Some(2.0 / 3.0));

    recording.images.truncate(40);
    let few = make(&recording, 0.2).expect("made");
    assert_eq!((above(&few, &recording), few.check_alpha), (0, 1.0 / 41.0));
    assert!(few.check().is_ok());
}

#[test]
fn ranks_and_minimum() {
    assert_eq!(conformal_rank(99, 0.01), 99);
    assert_eq!(conformal_rank(98, 0.01), 99);
    assert_eq!(conformal_rank(500, 0.01), 496);
    assert_eq!(minimum_images(0.01), Ok(198));
    assert_eq!(minimum_images(0.5), Ok(4));
}

#[test]
fn steps_outside_the_window_leave_no_bin() {
    let made = make(&recording(images(40, 2, 3), 2), 0.2).expect("made");
    let filled = |bin: usize| made.concepts.iter().all(|c| c.bins[bin].is_some());
    assert!(filled(9) && filled(7) && filled(6) && filled(FINISHED_BIN));
    assert!(made.concepts[0].bins[2].is_none());
    assert_eq!(made.concepts[0].bins[9].map(|bin| bin.count), Some(20));
}

#[test]
fn what_cannot_be_calibrated_is_refused_with_a_reason() {
    let good = || recording(images(40, 2, 3), 2);
    let refused = |change: fn(&mut Recording), alpha: f32| {
        let mut recording = good();
        change(&mut recording);
        make(&recording, alpha).expect_err("refused").to_string()
    };
    for (error, part) in [
        (refused(|_| {}, 0.01), "at least 198"),
        (refused(|_| {}, 0.0), "alpha"),
        (refused(|_| {}, f32::NAN), "alpha"),
        (refused(|r| r.cells = 3, 0.2), "do not make 3 equal cells"),
        (refused(|r| r.cells = 0, 0.2), "do not make 0 equal cells"),
        (refused(|r| r.cells = 20, 0.2), "2 benign images of each cell are too few"),
        (refused(|r| r.concepts.clear(), 0.2), "no concepts"),
        (refused(|r| r.window = (0.5, 0.9), 0.2), "window"),
        (refused(|r| r.window = (0.5, 0.4), 0.2), "image 0 has no step"),
        (refused(|r| r.images[7].steps[1].scores[1] = f32::NAN, 0.2), "image 7: score NaN of `c1`"),
        (refused(|r| r.images[7].finished.truncate(1), 0.2), "1 scores for 2"),
        (refused(|r| r.images[7].steps[0].time = 0.0, 0.2), "time 0"),
        (
            refused(|r| r.images.iter_mut().for_each(|i| i.finished[1] = 0.25), 0.2),
            "`c1` scored 0.25",
        ),
    ] {
        assert!(error.contains(part), "{part}: {error}");
    }
}

#[test]
fn auroc_of_known_orders() {
    let labels = [false, false, true, true];
    assert_eq!(auroc(&[0.1, 0.2, 0.3, 0.4], &labels), Some(1.0));
    assert_eq!(auroc(&[0.4, 0.3, 0.2, 0.1], &labels), Some(0.0));
    assert_eq!(auroc(&[0.1; 4], &labels), Some(0.5));
    // sklearn.metrics.roc_auc_score([0, 0, 1, 1], [0.1, 0.4, 0.35, 0.8]) = 0.75
    assert_eq!(auroc(&[0.1, 0.4, 0.35, 0.8], &labels), Some(0.75));
    assert_eq!(auroc(&[0.1, 0.2], &[true, true]), None);
}

#[test]
fn auroc_per_bin_sees_when_a_concept_becomes_visible() {
    let mut recording = recording(images(60, 2, 9), 2);
    let label = |mut image: RecordedImage| {
        image.steps[2].scores[0] += 10.0;
        LabelledImage { image, concepts: vec![0] }
    };
    recording.labelled = images(20, 2, 10).into_iter().map(label).collect();
    let areas = auroc_by_bin(&recording);
    assert_eq!(areas[0][6], Some(1.0));
    assert!(areas[0][9].is_some_and(|area| (0.2..0.8).contains(&area)));
    assert_eq!((areas[0][2], areas[1][6]), (None, None));
}

#[test]
fn a_calibration_of_some_concepts_is_one_of_a_recording_of_these() {
    let mut recording = recording(images(80, 4, 3), 4);
    let image = recording.images[0].clone();
    recording.labelled = vec![LabelledImage { image, concepts: vec![0, 3] }];
    let some = recording.only(&[3, 1]);
    let names: Vec<_> = some.concepts.iter().map(|(name, _)| name.as_str()).collect();
    assert_eq!(names, ["c3", "c1"]);
    let (all, few) = (&recording.images[7].steps[1].scores, &some.images[7].steps[1].scores);
    assert_eq!(*few, [all[3], all[1]]);
    assert_eq!(some.labelled[0].concepts, [0]);
    let (wide, narrow) = (make(&recording, 0.1), make(&some, 0.1));
    let (wide, narrow) = (wide.expect("made"), narrow.expect("made"));
    assert_ne!(wide.setup.concept_set, narrow.setup.concept_set);
    assert_eq!(peaks(&narrow, &some).expect("bins are filled").len(), 80);
}

proptest! {
    #[test]
    fn auroc_is_the_pairwise_probability(
        data in prop::collection::vec((0u8..6, any::<bool>()), 2..40),
    ) {
        let scores = data.iter().map(|&(s, _)| f32::from(s)).collect::<Vec<_>>();
        let labels = data.iter().map(|&(_, l)| l).collect::<Vec<_>>();
        let (mut won, mut pairs) = (0.0, 0.0);
        for (p, _) in scores.iter().zip(&labels).filter(|(_, l)| **l) {
            for (n, _) in scores.iter().zip(&labels).filter(|(_, l)| !**l) {
                pairs += 1.0;
                won += if p > n { 1.0 } else if p == n { 0.5 } else { 0.0 };
            }
        }
        match auroc(&scores, &labels) {
            None => prop_assert_eq!(pairs, 0.0),
            Some(area) => prop_assert!((area - won / pairs).abs() < 1e-9),
        }
    }

    #[test]
    fn a_smaller_alpha_never_lowers_the_gate(seed: u64, a in 0.05f32..0.4, b in 0.05f32..0.4) {
        let recording = recording(images(60, 2, seed), 2);
        let loose = make(&recording, a.max(b)).expect("made");
        let tight = make(&recording, a.min(b)).expect("made");
        prop_assert!(tight.gate >= loose.gate);
    }

    #[test]
    fn the_gate_never_leaves_more_than_alpha_of_its_own_half_open(
        seed: u64, n in 40usize..90, alpha in 0.06f32..0.5,
    ) {
        let recording = recording(images(n, 2, seed), 2);
        let made = make(&recording, alpha).expect("made");
        let levels = made.concepts.iter().map(|c| c.bins.clone()).collect::<Vec<_>>();
        let half = &shuffled(n)[n / 2..];
        let over = half.iter().filter(|&&i| {
            peak(&recording, &levels, &recording.images[i]).expect("filled") > made.gate
        });
        prop_assert!(over.count() as f64 <= f64::from(alpha) * half.len() as f64);
    }
}
