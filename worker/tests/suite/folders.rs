//! Pipeline folders as people have them: what is served of them, and what their users are told.

use std::{
    fs,
    os::unix::fs::symlink,
    path::{Path, PathBuf},
};

use candle_core::Device;
use fairlead_worker::generator::{self, Generator};
use serde_json::{Value, json};

/// A copy of a small Stable Diffusion: its files are links, so that a test may replace each.
fn copy() -> tempfile::TempDir {
    let from = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/goldens/tiny-sd");
    let copy = tempfile::tempdir().expect("a folder");
    link(&from, copy.path());
    copy
}

fn link(from: &Path, to: &Path) {
    for entry in fs::read_dir(from).expect("a folder").flatten() {
        let (path, to) = (entry.path(), to.join(entry.file_name()));
        if path.is_dir() {
            fs::create_dir_all(&to).expect("a folder");
            link(&path, &to);
        } else {
            symlink(&path, &to).expect("it is linked");
        }
    }
}

fn edit(file: PathBuf, field: &str, value: Value) {
    let text = fs::read_to_string(&file).expect("it is there");
    let mut fields: Value = serde_json::from_str(&text).expect("it is JSON");
    fields[field] = value;
    // The link goes, its target stays.
    fs::remove_file(&file).expect("it is removed");
    fs::write(file, fields.to_string()).expect("it is written");
}

fn load(dir: &Path) -> Box<dyn Generator> {
    generator::load(dir, &Device::Cpu).unwrap_or_else(|error| panic!("{error}"))
}

fn refusal(dir: &Path) -> String {
    generator::load(dir, &Device::Cpu).err().expect("it is refused").to_string()
}

#[test]
fn a_unet_of_rectangular_latents_makes_rectangular_images() {
    let folder = copy();
    edit(folder.path().join("unet/config.json"), "sample_size", json!([8, 12]));
    let generator = load(folder.path());
    let info = generator.info();
    assert_eq!((info.default_width, info.default_height), (48, 32), "height comes first");
    assert!(info.max_side >= 4 * 48, "{}", info.max_side);
    edit(folder.path().join("unet/config.json"), "sample_size", json!("8"));
    assert!(refusal(folder.path()).contains("sample_size is \"8\""));
}

#[test]
fn a_pipelines_own_safety_checker_is_named() {
    let folder = copy();
    assert!(load(folder.path()).notices().is_empty());
    let checker = json!(["stable_diffusion", "StableDiffusionSafetyChecker"]);
    edit(folder.path().join("model_index.json"), "safety_checker", checker);
    let generator = load(folder.path());
    let [notice] = generator.notices() else { panic!("{:?}", generator.notices()) };
    assert!(
        notice.contains("safety_checker (StableDiffusionSafetyChecker) is not used"),
        "{notice}"
    );
    edit(folder.path().join("model_index.json"), "controlnet", json!(["diffusers", "ControlNet"]));
    assert!(refusal(folder.path()).contains("controlnet is [\"diffusers\",\"ControlNet\"]"));
}

/// A checkpoint, a LoRA or another variant beside the model must not lose its calibrations.
#[test]
fn foreign_files_do_not_change_a_models_identity() {
    let folder = copy();
    let before = load(folder.path()).info().hash.clone();
    for name in [
        "v1-5-pruned-emaonly.safetensors",
        "pytorch_lora_weights.safetensors",
        "unet/diffusion_pytorch_model.fp16.safetensors",
        "safety_checker/config.json",
        "tokenizer/notes.txt",
    ] {
        let path = folder.path().join(name);
        fs::create_dir_all(path.parent().expect("it has one")).expect("a folder");
        fs::write(&path, "foreign").expect("it is written");
    }
    assert_eq!(load(folder.path()).info().hash, before);
    edit(folder.path().join("scheduler/scheduler_config.json"), "beta_end", json!(0.013));
    assert_ne!(load(folder.path()).info().hash, before, "the scheduler counts");
}

/// As `hf download` leaves a model: a snapshot of links to blobs, named by its commit.
#[test]
fn a_snapshot_of_a_hugging_face_cache_has_its_repositorys_name() {
    let (model, cache) = (copy(), tempfile::tempdir().expect("a folder"));
    let repository = cache.path().join("models--acme--tiny-model");
    let commit = "451f4fe16113bff5a5d2269ed5ad43b0592e9a14";
    let snapshot = repository.join("snapshots").join(commit);
    fs::create_dir_all(&snapshot).expect("a folder");
    fs::create_dir(repository.join("refs")).expect("a folder");
    fs::write(repository.join("refs/main"), commit).expect("it is written");
    link(model.path(), &snapshot);
    for dir in [&repository, &snapshot] {
        assert_eq!(generator::model_name(dir).expect("it has one"), "tiny-model");
        let generator = load(dir);
        assert_eq!(generator.info().name, "tiny-model");
        assert_eq!(generator.info().hash, load(model.path()).info().hash);
    }
}
