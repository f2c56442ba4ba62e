//! Tests of one evaluation against the analytic scorer and finite differences.

use std::path::Path;

use super::*;
use crate::{
    concepts::ConceptSet,
    random::SplitMix64,
    testing::{Fault, Probe, SIDE, TestScorer},
};

const CONCEPTS: [&str; 3] = ["axe", "pill", "skull"];

fn scorer() -> (Box<dyn Scorer>, Probe) {
    let tables = CONCEPTS
        .map(|name| format!("{{ name = \"{name}\", group = \"g\", targets = [\"{name}\"] }}"));
    let text = format!("anchors = [\"nothing\"]\nconcept = [{}]", tables.join(", "));
    let set = ConceptSet::parse(Path::new("c.toml"), &text).expect("it parses");
    let (loader, probe) = TestScorer::loader();
    (loader(&set).expect("loaded"), probe)
}

fn concepts() -> Vec<AskedConcept> {
    let concept = |(index, name): (usize, &str)| AskedConcept {
        index,
        name: name.to_owned(),
        weight: 1.0 + index as f32,
    };
    CONCEPTS.into_iter().enumerate().map(concept).collect()
}

fn pixels(images: usize) -> Vec<f32> {
    let mut random = SplitMix64::new(4);
    (0..images * 3 * SIDE * SIDE).map(|_| random.unit()).collect()
}

/// A gate that any score opens (`gate` far below) or none does.
fn gate(open: bool) -> Gate {
    let level = Level {
        mean: 0.0,
        sd: 0.1,
        gate: if open { -20.0 } else { 20.0 },
        hysteresis: 0.5,
        check_threshold: 0.0,
    };
    Gate { level, before: Before::Closed }
}

/// `open[image][concept]`.
fn batch(open: &[[bool; 3]], crops: u32) -> Batch {
    let sample = |(image, open): (usize, &[bool; 3])| Sample {
        crop_seed: 100 + image as u64,
        gates: Some(open.iter().map(|&open| gate(open)).collect()),
    };
    Batch {
        pixels: pixels(open.len()),
        samples: open.iter().enumerate().map(sample).collect(),
        concepts: concepts(),
        crops,
        gradient: true,
    }
}

fn run(scorer: &dyn Scorer, batch: &Batch) -> Vec<Evaluation> {
    run_together(scorer, &[batch], 1).remove(0)
}

fn run_together(scorer: &dyn Scorer, batches: &[&Batch], most: usize) -> Vec<Vec<Evaluation>> {
    let outcomes = evaluate(scorer, batches, most, |_| false).into_iter();
    outcomes.map(|outcome| outcome.expect("evaluated").expect("not abandoned")).collect()
}

#[test]
fn the_gradient_agrees_with_finite_differences_through_crops() {
    let (scorer, _) = scorer();
    let mut batch = batch(&[[true, false, true]], 4);
    // Gates near the scores, so that the energy is curved.
    for (k, gate) in batch.samples[0].gates.iter_mut().flatten().enumerate() {
        if k != 1 {
            gate.level =
                Level { mean: -0.02, sd: 0.02, gate: -50.0, hysteresis: 0.5, check_threshold: 0.0 };
        }
    }
    let gradient = run(&*scorer, &batch)[0].gradient.clone().expect("gates are open");
    let mut random = SplitMix64::new(21);
    for _ in 0..4 {
        let direction = (0..gradient.len()).map(|_| random.unit() - 0.5).collect::<Vec<_>>();
        let energy = |step: f32| {
            let mut moved = batch.clone();
            moved.pixels.iter_mut().zip(&direction).for_each(|(x, d)| *x += step * d);
            f64::from(run(&*scorer, &moved)[0].energy)
        };
        let numeric = (energy(0.01) - energy(-0.01)) / 0.02;
        let analytic = gradient.iter().zip(&direction).map(|(g, d)| f64::from(g * d)).sum::<f64>();
        assert!((numeric - analytic).abs() < 1e-3 * numeric.abs().max(0.1), "{numeric} {analytic}");
    }
}

#[test]
fn one_backward_pass_serves_all_concepts_and_closed_images_have_none() {
    let (scorer, probe) = scorer();
    let out = run(&*scorer, &batch(&[[true; 3], [false; 3], [true, false, false]], 4));
    assert_eq!((probe.forwards(), probe.backwards()), (3, 2));
    assert!(out[0].gradient.is_some() && out[1].gradient.is_none() && out[2].gradient.is_some());
    assert_eq!((out[1].energy, out[1].amplitude), (0.0, 0.0));
    assert!(out[0].energy > out[2].energy && out[2].energy > 0.0);
    assert_eq!(out[0].amplitude, 1.0);
}

#[test]
fn an_image_does_not_depend_on_its_batch() {
    let (scorer, _) = scorer();
    let whole = batch(&[[true; 3], [true; 3], [false, true, false]], 4);
    let together = run(&*scorer, &whole);
    let per_image = 3 * SIDE * SIDE;
    for (image, expected) in together.iter().enumerate() {
        let alone = Batch {
            pixels: whole.pixels[image * per_image..][..per_image].to_vec(),
            samples: vec![whole.samples[image].clone()],
            ..whole.clone()
        };
        assert_eq!(run(&*scorer, &alone)[0], *expected);
    }
}

#[test]
fn an_asked_concept_scores_the_same_alone_or_among_others() {
    let (scorer, _) = scorer();
    let all = batch(&[[true; 3]], 3);
    let mut one = all.clone();
    one.concepts = vec![all.concepts[1].clone()];
    one.samples[0].gates = Some(vec![gate(true)]);
    assert_eq!(run(&*scorer, &one)[0].concepts[0], run(&*scorer, &all)[0].concepts[1]);
}

#[test]
fn the_weight_scales_a_concepts_energy_and_gradient() {
    let (scorer, _) = scorer();
    let light = batch(&[[false, true, false]], 2);
    let mut heavy = light.clone();
    heavy.concepts[1].weight *= 2.0;
    let (light, heavy) = (run(&*scorer, &light).remove(0), run(&*scorer, &heavy).remove(0));
    assert_eq!(heavy.energy, 2.0 * light.energy);
    let (light, heavy) = (light.gradient.expect("open"), heavy.gradient.expect("open"));
    assert!(light.iter().zip(&heavy).all(|(l, h)| (2.0 * l - h).abs() <= 1e-6 * h.abs()));
}

#[test]
fn hysteresis_keeps_a_gate_open() {
    let (scorer, _) = scorer();
    let mut batch = batch(&[[false; 3]], 1);
    let score = run(&*scorer, &batch)[0].concepts[0].score;
    let level =
        Level { mean: score - 0.3, sd: 0.1, gate: 3.2, hysteresis: 0.5, check_threshold: 0.0 };
    for (before, open) in [(Before::Closed, false), (Before::Open, true)] {
        batch.samples[0].gates.as_mut().expect("gates")[0] = Gate { level, before };
        let out = run(&*scorer, &batch).remove(0);
        assert_eq!(out.concepts[0].open, open);
        assert_eq!(out.gradient.is_some(), open);
        assert!((out.concepts[0].z - 3.0).abs() < 1e-3);
        let amplitude = if open { 0.3 } else { 0.0 };
        assert!((out.amplitude - amplitude).abs() < 1e-3);
    }
}

#[test]
fn a_held_gate_is_open_further_down_and_has_a_gradient() {
    let (scorer, _) = scorer();
    let mut batch = batch(&[[false; 3]], 1);
    let score = run(&*scorer, &batch)[0].concepts[0].score;
    let level = |z: f32| Level {
        mean: score - 0.1 * z,
        sd: 0.1,
        gate: 9.0,
        hysteresis: 0.5,
        check_threshold: 0.0,
    };
    let (above, below) = (level(2.9), level(2.5));
    for (level, before, open) in
        [(above, Before::Open, false), (above, Before::Held, true), (below, Before::Held, false)]
    {
        batch.samples[0].gates.as_mut().expect("gates")[0] = Gate { level, before };
        let out = run(&*scorer, &batch).remove(0);
        assert_eq!((out.concepts[0].open, out.gradient.is_some()), (open, open));
        assert_eq!(out.amplitude, if open { 0.25 } else { 0.0 });
    }
}

#[test]
fn raw_scores_have_no_gate_and_no_gradient() {
    let (scorer, probe) = scorer();
    let mut batch = batch(&[[true; 3]], 2);
    let gated = run(&*scorer, &batch)[0].concepts[2].score;
    batch.samples[0].gates = None;
    let out = run(&*scorer, &batch).remove(0);
    assert_eq!(out.concepts[2], Scored { score: gated, z: 0.0, gate: 0.0, open: false });
    assert!(out.gradient.is_none() && out.energy == 0.0);
    assert_eq!(probe.backwards(), 1);
}

#[test]
fn a_check_never_runs_backward() {
    let (scorer, probe) = scorer();
    let mut batch = batch(&[[true; 3]], 2);
    batch.gradient = false;
    let out = run(&*scorer, &batch).remove(0);
    assert!(out.concepts[0].open && out.gradient.is_none());
    assert_eq!(probe.backwards(), 0);
}

#[test]
fn broken_scorers_are_found_out_and_concepts_named() {
    let (scorer, probe) = scorer();
    for (fault, parts) in [
        (Fault::NanScore, ["axe, pill, skull", "not finite"]),
        (Fault::TooFewScores, ["scores", "expected [6]"]),
        (Fault::NanGradient, ["pill", "not finite"]),
        (Fault::ZeroGradient, ["pill", "all zero"]),
        (Fault::WrongGradientShape, ["gradient", "[2, 3, 11, 11]"]),
    ] {
        probe.set(fault);
        let faulty = batch(&[[false, true, false]], 2);
        let error = evaluate(&*scorer, &[&faulty], 1, |_| false).remove(0).expect_err("refused");
        assert_eq!(error.code(), tonic::Code::Internal);
        let text = error.to_string();
        assert!(parts.iter().all(|part| text.contains(part)), "{fault:?}: {text}");
    }
}

#[test]
fn a_batch_is_left_between_images() {
    let (scorer, probe) = scorer();
    let batch = batch(&[[true; 3]; 4], 1);
    let out = evaluate(&*scorer, &[&batch], 1, |_| probe.forwards() == 2).remove(0);
    assert!(out.expect("no error").is_none());
    assert_eq!(probe.forwards(), 2);
}

/// Batches with images of every kind: open before and now, just opened, just closed, and closed.
fn mixed() -> [Batch; 3] {
    let mut one = batch(&[[true; 3], [false; 3], [true, false, false]], 3);
    let mut two = batch(&[[false; 3], [false, true, false]], 3);
    two.pixels.reverse();
    for (batch, image) in [(&mut one, 0), (&mut two, 0)] {
        for gate in batch.samples[image].gates.iter_mut().flatten() {
            gate.before = Before::Open;
        }
    }
    let mut check = batch(&[[true; 3]], 3);
    check.gradient = false;
    [one, two, check]
}

#[test]
fn batches_together_give_what_each_gives_alone() {
    let (scorer, probe) = scorer();
    let batches = mixed();
    let alone: Vec<_> = batches.iter().map(|batch| run(&*scorer, batch)).collect();
    let before = probe.forwards();
    let batches = batches.each_ref();
    assert_eq!(run_together(&*scorer, &batches, 64), alone);
    // Open before; all others; those whose gate has just opened.
    assert_eq!(probe.forwards() - before, 3);
    assert_eq!(run_together(&*scorer, &batches, 2), alone);
}

#[test]
fn a_broken_image_fails_its_own_batch_only() {
    let (scorer, _) = scorer();
    let [good, mut bad, _] = mixed();
    bad.pixels[5] = f32::NAN;
    let outcomes = evaluate(&*scorer, &[&good, &bad], 64, |_| false);
    assert_eq!(outcomes[0].as_ref().expect("good").as_deref(), Some(&run(&*scorer, &good)[..]));
    let error = outcomes[1].as_ref().expect_err("refused").to_string();
    assert!(error.contains("not finite"), "{error}");
}

#[test]
fn an_abandoned_batch_costs_nothing_and_the_others_go_on() {
    let (scorer, probe) = scorer();
    let [one, two, _] = mixed();
    let outcomes = evaluate(&*scorer, &[&one, &two], 64, |of| of == 0);
    assert!(outcomes[0].as_ref().expect("no error").is_none());
    assert_eq!(outcomes[1].as_ref().expect("good").as_deref(), Some(&run(&*scorer, &two)[..]));
    assert!(probe.forwards() <= 3 + two.samples.len());
}
