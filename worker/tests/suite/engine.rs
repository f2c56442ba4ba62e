//! The engine on a generator and an energy made of formulas.

use std::sync::{Arc, Barrier};

use crate::{
    common::NoEnergy,
    toy::{Fault, SIDE, ToyEnergy, ToyGenerator, concept},
};
use fairlead_proto::v1::{
    ImageOutcome, ImageStatus, ImageTask, JobSpec, PinnedPolicy, Preview, SteeringParams,
    StepProgress, StepRecord,
};
use fairlead_worker::{
    Engine, Error, Result, Shard,
    energy::{Answer, Candidate, Energy, Render, Sample, Sources, Terms, Verdict},
    engine::{Collected, Observer},
    generator::Generator,
    turn::{Turn, Turns},
};
use tokio_util::sync::CancellationToken;

/// A gate that red pictures open, at z = 1: a mean of red above 0.625.
const GATE: f32 = 1.0;

fn spec() -> JobSpec {
    JobSpec { prompt: "a rose".into(), ..Default::default() }
}

fn policy(steering: SteeringParams) -> PinnedPolicy {
    PinnedPolicy { concepts: vec![concept("red")], steering: Some(steering), ..Default::default() }
}

fn strong() -> SteeringParams {
    SteeringParams { eta: Some(0.6), smoothing: Some(0.5), cap: Some(10.0), ..Default::default() }
}

fn shard(spec: JobSpec, policy: PinnedPolicy, n: u32) -> Shard {
    let images = (0..n)
        .map(|index| ImageTask {
            index,
            seed: 100 + u64::from(index),
            record_id: format!("record-{index}"),
        })
        .collect();
    Shard::new("job", spec, policy, images, ToyGenerator::new().info()).expect("a valid shard")
}

fn run_with(
    generator: ToyGenerator,
    batch: u32,
    shard: &Shard,
    energy: &mut dyn Energy,
) -> Result<Collected> {
    let engine = Engine::new(Box::new(generator), batch);
    let mut collected = Collected::default();
    let (turns, cancel) = (Turns::default(), CancellationToken::new());
    engine.run(shard, energy, &mut collected, &turns.take(&cancel))?;
    collected.images.sort_by_key(|image| image.index);
    Ok(collected)
}

fn run(shard: &Shard, energy: &mut dyn Energy) -> Vec<ImageOutcome> {
    run_with(ToyGenerator::new(), 8, shard, energy).expect("it runs").images
}

fn unsteered(n: u32) -> Vec<ImageOutcome> {
    run(&shard(spec(), PinnedPolicy::default(), n), &mut NoEnergy)
}

fn bytes(images: &[ImageOutcome]) -> Vec<&[u8]> {
    images.iter().map(|image| image.pixels.as_slice()).collect()
}

fn trajectory(image: &ImageOutcome) -> &[StepRecord] {
    &image.report.as_ref().expect("every image has its report").trajectory
}

fn red(pixels: &[u8]) -> f64 {
    let red: f64 = pixels.iter().step_by(3).map(|&value| f64::from(value) / 255.0).sum();
    red / (pixels.len() / 3) as f64
}

#[test]
fn closed_gates_leave_every_byte_as_it_is() {
    let mut energy = ToyEnergy::new(f32::INFINITY);
    let asked = run(&shard(spec(), policy(strong()), 4), &mut energy);
    assert!(bytes(&asked) == bytes(&unsteered(4)));
    assert!(!energy.seen.lock().expect("no panic").evaluations.is_empty());
    for image in &asked {
        assert!(!image.report.as_ref().expect("a report").steered);
        assert_eq!(image.status(), ImageStatus::Released);
    }
}

#[test]
fn open_gates_turn_the_picture_and_closed_ones_in_the_same_batch_stay_untouched() {
    let plain = unsteered(8);
    let steered = run(&shard(spec(), policy(strong()), 8), &mut ToyEnergy::new(GATE));
    let mut turned = 0;
    for (plain, steered) in plain.iter().zip(&steered) {
        let record = steered.report.as_ref().expect("a report");
        if record.steered {
            turned += usize::from(red(&plain.pixels) > 0.625);
            assert!(red(&steered.pixels) < red(&plain.pixels) + 1e-9);
            assert!(red(&steered.pixels) < 0.625, "{}", red(&steered.pixels));
        } else {
            assert!(plain.pixels == steered.pixels, "image {}", plain.index);
        }
    }
    let untouched =
        steered.iter().filter(|image| !image.report.as_ref().expect("a report").steered).count();
    assert!(turned >= 2 && untouched >= 2, "{turned} turned, {untouched} untouched of 8");
}

#[test]
fn the_batch_does_not_matter() {
    let shard = shard(spec(), policy(strong()), 5);
    let make = |batch: u32| {
        run_with(ToyGenerator::new(), batch, &shard, &mut ToyEnergy::new(GATE)).expect("it runs")
    };
    let one = make(1);
    for batch in [2, 3, 8] {
        let other = make(batch);
        assert!(bytes(&one.images) == bytes(&other.images), "batches of {batch}");
        for (a, b) in one.images.iter().zip(&other.images) {
            assert_eq!(trajectory(a), trajectory(b));
        }
    }
}

#[test]
fn every_mode_steers() {
    let plain = unsteered(6);
    for mode in 1..=3 {
        let params = SteeringParams { mode, ..strong() };
        let steered = run(&shard(spec(), policy(params), 6), &mut ToyEnergy::new(GATE));
        let reds = |images: &[ImageOutcome]| -> f64 {
            images
                .iter()
                .filter(|image| !image.pixels.is_empty())
                .map(|image| red(&image.pixels))
                .sum()
        };
        assert!(reds(&steered) < reds(&plain), "mode {mode}");
    }
}

#[test]
fn observing_records_scores_and_changes_nothing() {
    let observed = PinnedPolicy { observe_only: true, ..policy(strong()) };
    let mut energy = ToyEnergy::new(-100.0);
    let images = run(&shard(spec(), observed, 4), &mut energy);
    assert!(bytes(&images) == bytes(&unsteered(4)));
    for image in &images {
        assert_eq!(image.status(), ImageStatus::Released);
        assert!(!image.report.as_ref().expect("a report").final_scores.is_empty());
        assert!(trajectory(image).iter().any(|step| !step.scores.is_empty()));
    }
}

#[test]
fn the_energy_is_asked_inside_the_window_only() {
    let params = SteeringParams { window_end: Some(0.7), ..strong() };
    let mut energy = ToyEnergy::new(f32::INFINITY);
    let images = run(&shard(spec(), policy(params), 2), &mut energy);
    // 20 steps: t = 951, 901, .., 701 lie above 700.
    let seen = energy.seen.lock().expect("no panic");
    assert_eq!(seen.evaluations.len(), 6);
    assert!(seen.evaluations.iter().flatten().all(|sample| sample.time >= 0.7));
    for step in trajectory(&images[0]) {
        assert_eq!(step.scores.is_empty(), step.time < 0.7);
    }
}

#[test]
fn a_probe_period_asks_less_while_closed_and_always_while_open() {
    let params = SteeringParams { probe_period: Some(3), ..strong() };
    let mut closed = ToyEnergy::new(f32::INFINITY);
    run(&shard(spec(), policy(params), 2), &mut closed);
    // 8 steps down to t = 601, every third from the first.
    assert_eq!(closed.seen.lock().expect("no panic").evaluations.len(), 3);
    let mut open = ToyEnergy::new(-100.0);
    run(&shard(spec(), policy(params), 1), &mut open);
    let seen = open.seen.lock().expect("no panic");
    let attempts = seen.checks.len();
    assert_eq!(seen.evaluations.len(), 8 * attempts);
}

#[test]
fn inner_iterations_stop_when_the_gates_close() {
    let count = |gate: f32, inner: u32| {
        let params = SteeringParams { inner_iterations: Some(inner), eta: Some(0.1), ..strong() };
        let mut energy = ToyEnergy::new(gate);
        energy.verdict = Some(false);
        run(&shard(spec(), policy(params), 1), &mut energy);
        energy.seen.lock().expect("no panic").evaluations.len()
    };
    assert_eq!(count(-100.0, 1), 8);
    assert_eq!(count(-100.0, 3), 8 * 3);
    assert_eq!(count(f32::INFINITY, 3), 8);
}

#[test]
fn the_cap_bounds_what_an_image_is_moved() {
    let params = SteeringParams { eta: Some(0.5), cap: Some(1.2), ..strong() };
    let mut energy = ToyEnergy::new(-100.0);
    energy.verdict = Some(false);
    let images = run(&shard(spec(), policy(params), 2), &mut energy);
    for image in &images {
        let sum: f32 = trajectory(image).iter().map(|step| step.correction).sum();
        assert!((sum - 1.2).abs() < 1e-3, "{sum}");
    }
}

#[test]
fn an_image_that_stays_flagged_is_withheld_after_two_stronger_attempts() {
    let mut energy = ToyEnergy::new(GATE - 3.0);
    energy.verdict = Some(true);
    let params = SteeringParams { eta: Some(0.05), cap: Some(100.0), ..strong() };
    let images = run(&shard(spec(), policy(params), 1), &mut energy);
    assert_eq!(images[0].status(), ImageStatus::Withheld);
    assert!(images[0].pixels.is_empty());
    let record = images[0].report.as_ref().expect("a report");
    assert_eq!(record.reruns, 2);
    let first = |attempt: u32| {
        trajectory(&images[0]).iter().find(|s| s.attempt == attempt).expect("a step").correction
    };
    assert!((first(1) / first(0) - 2.0).abs() < 1e-3, "{} {}", first(0), first(1));
    assert!((first(2) / first(0) - 4.0).abs() < 1e-3, "{} {}", first(0), first(2));
}

#[test]
fn what_only_the_final_check_finds_is_steered_from_the_start_of_a_rerun() {
    let mut energy = ToyEnergy::new(f32::INFINITY);
    energy.final_gate = Some(GATE);
    let images = run(&shard(spec(), policy(strong()), 8), &mut energy);
    let mut turned = 0;
    for image in &images {
        let record = image.report.as_ref().expect("a report");
        let of = |attempt| trajectory(image).iter().filter(move |step| step.attempt == attempt);
        assert!(of(0).all(|step| step.correction == 0.0), "every gate was closed");
        if record.reruns > 0 {
            assert!(of(1).next().expect("a first step").correction > 0.0);
            assert_eq!(image.status(), ImageStatus::Released);
            assert!(red(&image.pixels) < 0.625, "{}", red(&image.pixels));
            turned += 1;
        }
    }
    assert!((2..8).contains(&turned), "{turned} of 8 were made again");
}

#[test]
fn what_is_left_of_a_steered_away_concept_is_steered_again_but_not_withheld() {
    let mut energy = ToyEnergy::new(GATE);
    energy.verdict = Some(false);
    energy.leaves = true;
    let images = run(&shard(spec(), policy(strong()), 4), &mut energy);
    let mut again = 0;
    for image in &images {
        let record = image.report.as_ref().expect("a report");
        assert_eq!(image.status(), ImageStatus::Released);
        assert_eq!(record.reruns, if record.steered { 2 } else { 0 });
        again += record.reruns;
    }
    let seen = energy.seen.lock().expect("no panic");
    let held = seen.evaluations.iter().flatten().filter(|sample| !sample.held.is_empty());
    assert!(again > 0 && again < 8 && held.count() > 0, "{again} reruns");
}

#[test]
fn a_flagged_image_that_nothing_pushed_is_withheld_at_once() {
    let mut energy = ToyEnergy::new(f32::INFINITY);
    energy.verdict = Some(true);
    let images = run(&shard(spec(), policy(strong()), 2), &mut energy);
    assert!(images.iter().all(|image| image.status() == ImageStatus::Withheld));
    assert_eq!(energy.seen.lock().expect("no panic").checks, [2]);
}

#[test]
fn an_energy_that_fails_releases_nothing() {
    for call in [0, 3, 7] {
        let mut energy = ToyEnergy::new(GATE);
        energy.fails_at = Some(call);
        let result =
            run_with(ToyGenerator::new(), 4, &shard(spec(), policy(strong()), 4), &mut energy);
        match result {
            Err(Error::Energy(failure)) => assert_eq!(failure.concepts, ["red"]),
            other => panic!("call {call}: {other:?}"),
        }
    }
}

#[test]
fn values_that_are_not_finite_are_errors_never_safe() {
    let shard = shard(spec(), policy(strong()), 2);
    for fault in [Fault::Denoiser, Fault::FinalDecoder, Fault::ZeroGradient] {
        let generator = ToyGenerator::with_fault(fault);
        let result = run_with(generator, 2, &shard, &mut ToyEnergy::new(-100.0));
        assert!(matches!(result, Err(Error::Numeric { .. })), "{fault:?}: {result:?}");
    }
}

#[test]
fn a_latent_gradient_that_is_not_finite_is_skipped_and_recorded() {
    let mut energy = ToyEnergy::new(-100.0);
    energy.verdict = Some(false);
    let generator = ToyGenerator::with_fault(Fault::NanGradient);
    let shard = shard(spec(), policy(strong()), 2);
    let images = run_with(generator, 2, &shard, &mut energy).expect("it goes on").images;
    assert!(bytes(&images) == bytes(&unsteered(2)));
    assert!(trajectory(&images[0]).iter().any(|step| step.skipped_non_finite));
    assert!(!images[0].report.as_ref().expect("a report").steered);
}

/// Cancels after some steps.
struct CancelAfter {
    steps: usize,
    seen: Collected,
    token: CancellationToken,
}

impl Observer for CancelAfter {
    fn step(&mut self, progress: StepProgress, preview: Option<Preview>) {
        self.seen.step(progress, preview);
        if self.seen.steps.len() == self.steps {
            self.token.cancel();
        }
    }

    fn image(&mut self, outcome: ImageOutcome) {
        self.seen.image(outcome);
    }
}

#[test]
fn cancelling_stops_within_one_step() {
    for steps in [1, 10, 20] {
        let token = CancellationToken::new();
        let mut observer = CancelAfter { steps, seen: Collected::default(), token: token.clone() };
        let engine = Engine::new(Box::new(ToyGenerator::new()), 1);
        let shard = shard(spec(), policy(strong()), 1);
        let turns = Turns::default();
        let turn = turns.take(&token);
        let result = engine.run(&shard, &mut ToyEnergy::new(GATE), &mut observer, &turn);
        assert!(matches!(result, Err(Error::Cancelled)), "{result:?}");
        assert_eq!(observer.seen.steps.len(), steps);
        assert!(observer.seen.images.is_empty());
    }
}

#[test]
fn previews_are_sent_only_while_every_gate_is_closed() {
    let with_previews = || JobSpec { previews: true, ..spec() };
    let previews = |gate: f32, verdict: Option<bool>| {
        let mut energy = ToyEnergy::new(gate);
        energy.verdict = verdict;
        let shard = shard(with_previews(), policy(strong()), 2);
        run_with(ToyGenerator::new(), 2, &shard, &mut energy).expect("it runs")
    };
    let closed = previews(f32::INFINITY, None);
    let inside = closed.previews.iter().filter(|preview| preview.step < 8).count();
    assert!(inside >= 2 && closed.previews.len() - inside >= 2);
    for Preview { width, height, pixels, .. } in &closed.previews {
        assert_eq!(pixels.len() as u32, 3 * width * height);
    }
    assert!(bytes(&closed.images) == bytes(&unsteered(2)));
    assert!(previews(-100.0, Some(true)).previews.is_empty());
    let silent = run_with(
        ToyGenerator::new(),
        2,
        &shard(spec(), policy(strong()), 2),
        &mut ToyEnergy::new(f32::INFINITY),
    );
    assert!(silent.expect("it runs").previews.is_empty());
}

#[test]
fn a_long_prompt_is_chunked_and_the_caller_told() {
    let long = JobSpec { prompt: "a rose in a vase on a table".into(), ..spec() };
    let images = run(&shard(long.clone(), PinnedPolicy::default(), 1), &mut NoEnergy);
    assert!(images[0].notices.iter().any(|n| n.contains("27 tokens") && n.contains("3 chunks")));
    assert!(unsteered(1)[0].notices.is_empty());
    // The tail counts: it is not cut.
    let other = JobSpec { prompt: "a rose in a vase on a !!!!!".into(), ..spec() };
    let other = run(&shard(other, PinnedPolicy::default(), 1), &mut NoEnergy);
    assert!(images[0].pixels != other[0].pixels);
    let endless = JobSpec { prompt: "rose ".repeat(400), ..spec() };
    let refused = run_with(
        ToyGenerator::new(),
        1,
        &shard(endless, PinnedPolicy::default(), 1),
        &mut NoEnergy,
    );
    assert!(matches!(refused, Err(Error::Request { field: "prompt", .. })));
}

#[test]
fn guidance_of_one_ignores_the_negative_prompt() {
    let image = |guidance: f32, negative: &str| {
        let spec =
            JobSpec { guidance_scale: Some(guidance), negative_prompt: negative.into(), ..spec() };
        let shard = shard(spec, PinnedPolicy::default(), 1);
        run(&shard, &mut NoEnergy).remove(0).pixels
    };
    assert!(image(1.0, "") == image(1.0, "zzzzzzzz"));
    assert!(image(8.0, "") != image(8.0, "zzzzzzzz"));
}

#[test]
fn the_report_accounts_for_the_image() {
    let images = run(&shard(spec(), policy(strong()), 2), &mut ToyEnergy::new(GATE));
    let image = &images[1];
    assert_eq!(image.index, 1);
    // The toy makes twice its energy's side.
    assert_eq!(image.pixels.len() as u32, 3 * (2 * SIDE) * (2 * SIDE));
    let report = image.report.as_ref().expect("a report");
    assert_eq!(report.final_scores[0].concept, "red");
    assert_eq!(trajectory(image).iter().filter(|step| step.attempt == 0).count(), 20);
}

/// A toy that answers only when as many others wait as are to: aside of its turn.
struct Together {
    toy: ToyEnergy,
    barrier: Arc<Barrier>,
}

impl Energy for Together {
    fn evaluate(
        &mut self,
        terms: &Terms,
        samples: &[Sample],
        render: &mut Render<'_>,
        turn: &Turn<'_>,
    ) -> Result<Vec<Answer>> {
        turn.aside(|| self.barrier.wait());
        self.toy.evaluate(terms, samples, render, turn)
    }

    fn check(
        &mut self,
        terms: &Terms,
        candidates: &[Candidate],
        turn: &Turn<'_>,
    ) -> Result<Vec<Verdict>> {
        self.toy.check(terms, candidates, turn)
    }

    fn sources(&self) -> &Sources {
        self.toy.sources()
    }
}

#[tokio::test]
async fn micro_batches_wait_together_and_change_no_byte() {
    let shard = || shard(spec(), policy(strong()), 2);
    let alone = run(&shard(), &mut ToyEnergy::new(GATE));
    for threads in [0, 1] {
        let load = || Ok(Engine::new(Box::new(ToyGenerator::new()), 2));
        let engine = fairlead_worker::EngineHandle::spawn("toy", threads, 3, load);
        let engine = engine.await.expect("the engine loads");
        let barrier = Arc::new(Barrier::new(3));
        let making = (0..3).map(|_| {
            let energy = Together { toy: ToyEnergy::new(GATE), barrier: Arc::clone(&barrier) };
            let (images, kept) = std::sync::mpsc::channel();
            let observer = Box::new(Kept(images));
            let run = engine.run(shard(), Box::new(energy), observer, CancellationToken::new());
            async move {
                run.await.expect("it runs");
                kept.iter().collect::<Vec<ImageOutcome>>()
            }
        });
        for images in futures::future::join_all(making).await {
            let pixels = |images: &[ImageOutcome]| -> Vec<Vec<u8>> {
                images.iter().map(|image| image.pixels.clone()).collect()
            };
            assert_eq!(pixels(&images), pixels(&alone));
        }
    }
}

/// Sends finished images on.
struct Kept(std::sync::mpsc::Sender<ImageOutcome>);

impl Observer for Kept {
    fn step(&mut self, _: StepProgress, _: Option<Preview>) {}

    fn image(&mut self, outcome: ImageOutcome) {
        self.0.send(outcome).expect("the test waits");
    }
}

#[tokio::test]
async fn a_thread_survives_a_panic_and_stops_with_its_caller() {
    let load = || Ok(Engine::new(Box::new(ToyGenerator::new()), 2));
    let engine =
        fairlead_worker::EngineHandle::spawn("toy", 1, 1, load).await.expect("the engine loads");
    let run = |policy: PinnedPolicy| {
        engine.run(
            shard(spec(), policy, 1),
            Box::new(NoEnergy),
            Box::new(Collected::default()),
            CancellationToken::new(),
        )
    };
    // `NoEnergy` panics when it is asked.
    let panicked = run(policy(strong())).await;
    assert!(matches!(&panicked, Err(Error::Panic { message }) if message.contains("energy")));
    run(PinnedPolicy::default()).await.expect("the thread goes on");
    let cancelled = CancellationToken::new();
    cancelled.cancel();
    let result = engine
        .run(
            shard(spec(), PinnedPolicy::default(), 1),
            Box::new(NoEnergy),
            Box::new(Collected::default()),
            cancelled,
        )
        .await;
    assert!(matches!(result, Err(Error::Cancelled)));
}

#[tokio::test]
async fn a_model_that_does_not_load_says_why() {
    let load = || Err(Error::Request { field: "model", reason: "no such thing".into() });
    let error =
        fairlead_worker::EngineHandle::spawn("toy", 0, 1, load).await.expect_err("it fails");
    assert!(error.to_string().contains("no such thing"));
}
