//! The worker against numbers made by diffusers; `goldens/pipelines.py` made them.

use std::path::{Path, PathBuf};

use candle_core::Device;
use fairlead_proto::{
    SAMPLERS,
    v1::{ImageTask, JobSpec, PinnedPolicy},
};
use fairlead_worker::{
    Engine, Result, Shard,
    engine::Collected,
    generator, noise,
    sampler::{self, Chosen},
    turn::Turns,
};
use serde::Deserialize;
use tokio_util::sync::CancellationToken;

use crate::common;

fn golden(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/goldens").join(name)
}

fn read<T: serde::de::DeserializeOwned>(name: &str) -> T {
    let text = std::fs::read_to_string(golden(name)).expect("the golden file is there");
    serde_json::from_str(&text).expect("the golden file is as expected")
}

#[derive(Deserialize)]
struct Case {
    config: serde_json::Map<String, serde_json::Value>,
    steps: u32,
    chain: Vec<Link>,
}

#[derive(Deserialize)]
struct Link {
    t: f32,
    x: Vec<f32>,
    prediction: Vec<f32>,
    next: Vec<f32>,
    clean: Vec<f32>,
}

fn assert_close(ours: &[f32], theirs: &[f32], what: &str) {
    for (a, b) in ours.iter().zip(theirs) {
        assert!((a - b).abs() <= 2e-5 * b.abs().max(1.0), "{what}: {a} instead of {b}");
    }
}

/// Every step of every schedule of a golden, whose files name `class`.
fn assert_steps(golden: &str, class: &str, choose: fn(&Path) -> Result<Chosen>) {
    let cases: Vec<Case> = read(golden);
    assert!(cases.len() >= 12);
    for case in cases {
        let dir = tempfile::tempdir().expect("a folder");
        let mut config = case.config;
        config.insert("_class_name".into(), class.into());
        let text = serde_json::to_string(&config).expect("it is JSON");
        std::fs::write(dir.path().join("scheduler_config.json"), &text).expect("it is written");
        let sampler = choose(dir.path()).expect("it is supported").sampler;
        assert!(SAMPLERS.contains(&sampler.name()), "policies do not know {}", sampler.name());
        let schedule = sampler.schedule(case.steps).expect("the steps are allowed");
        assert_eq!(schedule.len(), case.chain.len(), "{text}");
        for (step, link) in schedule.iter().zip(&case.chain) {
            let what = format!("t {} of {} in {text}", link.t, case.steps);
            assert!((step.timestep - link.t).abs() <= 1e-4, "{what}: t {}", step.timestep);
            let advance = sampler.advance(step, &link.x, &link.prediction);
            assert_close(&advance.clean, &link.clean, &what);
            assert_close(&advance.next, &link.next, &what);
        }
    }
}

#[test]
fn ddim_agrees_with_diffusers_at_every_step() {
    assert_steps("ddim.json", "DDIMScheduler", sampler::from_folder);
}

#[test]
fn flow_euler_agrees_with_diffusers_at_every_step() {
    assert_steps("flow-euler.json", "FlowMatchEulerDiscreteScheduler", sampler::flow_from_folder);
}

#[test]
fn noise_is_what_its_documentation_says() {
    let values: std::collections::BTreeMap<String, Vec<f32>> = read("noise.json");
    let ours = noise::normal(7, values["7"].len());
    assert_close(&ours, &values["7"], "seed 7");
}

#[derive(Deserialize)]
struct Image {
    prompt: String,
    negative_prompt: String,
    steps: u32,
    guidance_scale: f32,
    seed: u64,
    side: u32,
    /// RGB8 rows, hex.
    pixels: String,
    /// A scheduler in place of the folder's.
    scheduler: Option<serde_json::Map<String, serde_json::Value>>,
    /// Hash of the folder it was made from.
    hash: Option<String>,
}

/// Makes the golden's image with the engine and compares every pixel.
fn assert_parity(folder: &Path, golden: &Image) {
    let generator = generator::load(folder, &Device::Cpu).expect("the folder loads");
    assert_eq!(generator.info().default_width, golden.side);
    let most = generator.info().max_steps;
    assert!(most >= 999 && generator.sampler().schedule(most).is_ok(), "{most}");
    assert!(most == 1000 || generator.sampler().schedule(most + 1).is_err(), "{most}");
    let spec = JobSpec {
        prompt: golden.prompt.clone(),
        negative_prompt: golden.negative_prompt.clone(),
        steps: Some(golden.steps),
        guidance_scale: Some(golden.guidance_scale),
        ..Default::default()
    };
    let images = vec![ImageTask { seed: golden.seed, ..Default::default() }];
    let shard = Shard::new("golden", spec, PinnedPolicy::default(), images, generator.info())
        .expect("the request is valid");
    let engine = Engine::new(generator, 1);
    let mut collected = Collected::default();
    let (turns, cancel) = (Turns::default(), CancellationToken::new());
    engine
        .run(&shard, &mut common::NoEnergy, &mut collected, &turns.take(&cancel))
        .expect("it runs");
    let ours = collected.images[0].pixels.clone();
    let theirs = hex::decode(&golden.pixels).expect("it is hex");
    assert_eq!(ours.len(), theirs.len());
    let worst = ours.iter().zip(&theirs).map(|(a, b)| a.abs_diff(*b)).max().expect("pixels");
    println!("{}: largest difference {worst}/255", folder.display());
    assert!(worst <= 2, "{}: a pixel differs by {worst}/255", folder.display());
}

/// Links parts of a pipeline folder of the goldens into another folder.
fn link(name: &str, parts: &[&str], into: &Path) {
    for part in parts {
        std::os::unix::fs::symlink(golden(name).join(part), into.join(part)).expect("it is linked");
    }
}

#[test]
fn an_image_agrees_with_the_stable_diffusion_pipeline() {
    assert_parity(&golden("tiny-sd"), &read("tiny-sd-epsilon.json"));
}

#[test]
fn an_image_agrees_in_v_prediction_with_zero_snr() {
    let image: Image = read("tiny-sd-v.json");
    let dir = tempfile::tempdir().expect("a folder");
    link("tiny-sd", &["model_index.json", "unet", "vae", "text_encoder", "tokenizer"], dir.path());
    let mut scheduler = image.scheduler.clone().expect("this golden changes the scheduler");
    scheduler.insert("_class_name".into(), "DDIMScheduler".into());
    std::fs::create_dir(dir.path().join("scheduler")).expect("a folder");
    let text = serde_json::to_string(&scheduler).expect("it is JSON");
    std::fs::write(dir.path().join("scheduler/scheduler_config.json"), text).expect("written");
    assert_parity(dir.path(), &image);
}

#[test]
fn an_image_agrees_with_the_stable_diffusion_3_pipeline() {
    assert_parity(&golden("tiny-sd3"), &read("tiny-sd3.json"));
}

#[test]
fn an_image_agrees_with_a_third_text_encoder() {
    let dir = tempfile::tempdir().expect("a folder");
    let shared = ["scheduler", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"];
    link("tiny-sd3", &shared, dir.path());
    link("tiny-sd3", &["transformer", "vae"], dir.path());
    link("tiny-sd3-t5", &["model_index.json", "text_encoder_3", "tokenizer_3"], dir.path());
    assert_parity(dir.path(), &read("tiny-sd3-t5.json"));
}

#[test]
fn emojiland_agrees_with_the_pipelines() {
    for name in ["emojiland-sd", "emojiland-sd3"] {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../assets").join(name);
        let make = format!("run `python worker/tests/goldens/pipelines.py assets/{name}`");
        let file = format!("{name}.json");
        assert!(golden(&file).exists(), "no golden for assets/{name}: {make}");
        let image: Image = read(&file);
        let generator = generator::load(&folder, &Device::Cpu).expect("it loads");
        assert_eq!(
            image.hash.as_ref(),
            Some(&generator.info().hash),
            "assets/{name} is another one by now: {make}"
        );
        assert_parity(&folder, &image);
    }
}
