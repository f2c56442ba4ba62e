//! Model folders of which a file is spoiled: each loads or is refused by name, and memory is not taken for
//! more than the folder is worth.
#![allow(clippy::unwrap_used, reason = "helpers of tests panic as tests do")]

use std::fs;
use std::path::{Path, PathBuf};

use candle_core::Device;
use fairlead_fuzz::{bounded_by, fuzz, spoiled};
use fairlead_models::{
    AutoencoderKl, ClipModel, ClipTextModel, ClipTokenizer, FileTokenizer, Judge, PipelineFolder,
    Result, Sd3Transformer, SiglipModel, T5EncoderModel, UNet2DConditionModel,
};
use proptest::prelude::*;
use tempfile::TempDir;

/// What a network may hold for each byte of its folder: f32 from f16, layouts of its own beside, and what
/// stands in for keys that do not fit.
const PER_BYTE: usize = 16;
/// And for the smallest folder.
const ALLOWANCE: usize = 32 << 20;

type Load = fn(&Path) -> Result<()>;
/// A folder below the goldens, and what loads it.
type Model = (&'static str, Load);

const MODELS: [Model; 9] = [
    ("networks/vae", |dir| AutoencoderKl::load(dir, &Device::Cpu).map(drop)),
    ("networks/unet", |dir| UNet2DConditionModel::load(dir, &Device::Cpu).map(drop)),
    ("networks/mmdit", |dir| Sd3Transformer::load(dir, 1, &Device::Cpu).map(drop)),
    ("networks/clip_text", |dir| ClipTextModel::load(dir, &Device::Cpu).map(drop)),
    ("networks/t5", |dir| T5EncoderModel::load(dir, &Device::Cpu).map(drop)),
    ("networks/judge", |dir| Judge::load(dir, &Device::Cpu).map(drop)),
    ("networks/clip", |dir| ClipModel::load(dir, &Device::Cpu).map(drop)),
    ("networks/open_clip", |dir| ClipModel::load(dir, &Device::Cpu).map(drop)),
    ("networks/siglip", |dir| SiglipModel::load(dir, &Device::Cpu).map(drop)),
];

fn golden(folder: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/goldens").join(folder)
}

/// A copy of a model's folder; each case puts its file there.
struct Copy {
    load: Load,
    folder: TempDir,
    size: usize,
}

impl Copy {
    fn of(&(folder, load): &Model) -> Self {
        let (copy, mut size) = (tempfile::tempdir().unwrap(), 0);
        for entry in fs::read_dir(golden(folder)).unwrap() {
            let path = entry.unwrap().path();
            let name = path.file_name().unwrap();
            if name != "golden.safetensors" {
                size += fs::copy(&path, copy.path().join(name)).unwrap() as usize;
            }
        }
        Self { load, folder: copy, size }
    }

    fn path(&self) -> &Path {
        self.folder.path()
    }

    /// Loads the folder with `content` as its file `name`.
    fn load_with(&self, name: &str, content: &[u8]) {
        let file = self.path().join(name);
        let valid = fs::read(&file).unwrap();
        fs::write(&file, content).unwrap();
        let limit = ALLOWANCE + PER_BYTE * (self.size + content.len());
        let loaded = bounded_by(limit, || (self.load)(self.path()));
        fs::write(&file, valid).unwrap();
        if let Err(error) = loaded {
            let (message, folder) = (error.to_string(), self.path().display().to_string());
            assert!(message.contains(&folder), "it names no file: {message}");
        }
    }
}

/// Tries all files `names` of all `models`, each as `inputs` makes it of the valid one.
fn fuzz_files<S>(models: &[Model], names: &[&'static str], inputs: fn(Vec<u8>) -> S)
where
    S: Strategy + 'static,
    S::Value: std::ops::Deref<Target = [u8]>,
{
    let copies: Vec<Copy> = models.iter().map(Copy::of).collect();
    for copy in &copies {
        (copy.load)(copy.path()).unwrap();
    }
    let mut targets = Vec::new();
    for (index, &(folder, _)) in models.iter().enumerate() {
        for &name in names {
            if let Ok(valid) = fs::read(golden(folder).join(name)) {
                targets.push(inputs(valid).prop_map(move |bytes| (index, name, bytes)).boxed());
            }
        }
    }
    fuzz(prop::strategy::Union::new(targets), |(index, name, bytes)| {
        copies[index].load_with(name, &bytes);
    });
}

#[test]
fn spoiled_configs_load_or_are_refused_by_name() {
    let names = ["config.json", "preprocessor_config.json", "open_clip_config.json"];
    fuzz_files(&MODELS, &names, spoiled);
}

#[test]
fn spoiled_weights_load_or_are_refused_by_name() {
    let names =
        ["model.safetensors", "diffusion_pytorch_model.safetensors", "open_clip_model.safetensors"];
    fuzz_files(&MODELS, &names, |valid| {
        let (length, rest) = valid.split_first_chunk::<8>().unwrap();
        let (header, data) = rest.split_at(u64::from_le_bytes(*length) as usize);
        let data = data.to_vec();
        // The header with a length that belongs to it, or the file as a whole.
        let header = spoiled(header.to_vec()).prop_map(move |header| {
            let length = (header.len() as u64).to_le_bytes();
            [&length[..], &header, &data].concat()
        });
        prop_oneof![2 => header, 1 => spoiled(valid).prop_map(|bytes| bytes.to_vec())]
    });
}

#[test]
fn spoiled_tokenizers_load_or_are_refused_by_name() {
    let clip: Load = |dir| {
        let tokenizer = ClipTokenizer::load(dir)?;
        let windows = tokenizer.encode("a cat's 7 knives")?.chunks;
        assert!(windows.iter().all(|window| window.len() == tokenizer.max_length()));
        Ok(())
    };
    let file: Load = |dir| FileTokenizer::load(dir, 12)?.encode("a cat's 7 knives").map(drop);
    let models = [
        ("tokenizers/sd15", clip),
        ("tokenizers/whole", clip),
        ("tokenizers/siglip", file),
        ("tokenizers/siglip2", file),
    ];
    let names = ["vocab.json", "merges.txt", "tokenizer.json", "tokenizer_config.json"];
    fuzz_files(&models, &names, spoiled);
}

/// `tokenizers` panics over it.
#[test]
fn a_decoder_that_is_no_json_is_refused_by_name() {
    let load = |dir: &Path| FileTokenizer::load(dir, 12).map(drop);
    let copy = Copy::of(&("tokenizers/siglip", load));
    load(copy.path()).unwrap();
    let path = copy.path().join("tokenizer.json");
    let text = fs::read_to_string(&path).unwrap();
    let (before, after) = text.split_once("\"decoder\":").unwrap();
    for nonsense in ["x", "1e999", "[[1]"] {
        fs::write(&path, format!("{before}\"decoder\": {nonsense}, \"other\":{after}")).unwrap();
        let error = load(copy.path()).unwrap_err().to_string();
        assert!(error.contains("tokenizer.json"), "{error}");
    }
}

#[test]
fn spoiled_pipelines_open_or_are_refused_by_name() {
    let folder = tempfile::tempdir().unwrap();
    fs::create_dir(folder.path().join("vae")).unwrap();
    let index = r#"{"_class_name": "StableDiffusionPipeline", "vae": ["diffusers", "AutoencoderKL"],
        "safety_checker": [null, null], "requires_safety_checker": false}"#;
    let file = folder.path().join("model_index.json");
    fs::write(&file, index).unwrap();
    let open: Load = |dir| {
        let folder = PipelineFolder::open(dir)?;
        folder.components().try_for_each(|name| folder.component(name).map(drop))?;
        folder.folder().hash().map(drop)
    };
    let copy = Copy { load: open, folder, size: index.len() };
    open(copy.path()).unwrap();
    fuzz(spoiled(index.into()), |bytes| copy.load_with("model_index.json", &bytes));
}
