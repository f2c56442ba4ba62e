//! What a broken model folder is answered with. Each case breaks a good folder in one way and reads the message.
#![allow(clippy::unwrap_used, reason = "helpers of tests panic as tests do")]

use std::fs;
use std::path::{Path, PathBuf};

use candle_core::{DType, Device, Tensor};
use fairlead_models::layers::Filter;
use fairlead_models::{
    AutoencoderKl, ClipModel, ClipTextModel, ClipTokenizer, Judge, ModelFolder, PipelineFolder,
    Result, T5EncoderModel, Tape, UNet2DConditionModel, load_contrastive,
};
use serde_json::{Value, json};
use tempfile::TempDir;

const VAE: &str = "diffusion_pytorch_model.safetensors";

fn golden(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/goldens/networks").join(name)
}

/// A copy of a golden model that a test may break.
fn copy(name: &str) -> TempDir {
    let copy = tempfile::tempdir().unwrap();
    for entry in fs::read_dir(golden(name)).unwrap() {
        let path = entry.unwrap().path();
        if path.file_name().unwrap() != "golden.safetensors" {
            fs::copy(&path, copy.path().join(path.file_name().unwrap())).unwrap();
        }
    }
    copy
}

/// A copy with `config.json`, or the object at `section` of it, changed in one field.
fn configured(name: &str, section: &str, field: &str, value: Value) -> TempDir {
    let copy = copy(name);
    edit_json(&copy.path().join("config.json"), section, field, value);
    copy
}

fn edit_json(path: &Path, section: &str, field: &str, value: Value) {
    let mut json: Value = serde_json::from_str(&fs::read_to_string(path).unwrap()).unwrap();
    json.pointer_mut(section).unwrap()[field] = value;
    fs::write(path, json.to_string()).unwrap();
}

type Weights = std::collections::HashMap<String, Tensor>;

/// A copy with other weights.
fn reweighted(name: &str, file: &str, change: impl FnOnce(&mut Weights)) -> TempDir {
    let copy = copy(name);
    let path = copy.path().join(file);
    let mut weights = candle_core::safetensors::load(&path, &Device::Cpu).unwrap();
    change(&mut weights);
    candle_core::safetensors::save(&weights, &path).unwrap();
    copy
}

fn zeros(shape: &[usize], dtype: DType) -> Tensor {
    Tensor::zeros(shape, dtype, &Device::Cpu).unwrap()
}

fn vae(dir: &Path) -> Result<()> {
    AutoencoderKl::load(dir, &Device::Cpu).map(drop)
}

fn unet(dir: &Path) -> Result<()> {
    UNet2DConditionModel::load(dir, &Device::Cpu).map(drop)
}

fn clip(dir: &Path) -> Result<()> {
    ClipModel::load(dir, &Device::Cpu).map(drop)
}

fn text(dir: &Path) -> Result<()> {
    ClipTextModel::load(dir, &Device::Cpu).map(drop)
}

fn t5(dir: &Path) -> Result<()> {
    T5EncoderModel::load(dir, &Device::Cpu).map(drop)
}

fn judge(dir: &Path) -> Result<()> {
    Judge::load(dir, &Device::Cpu).map(drop)
}

#[track_caller]
fn assert_says<T>(result: Result<T>, parts: &[&str]) {
    let message = result.err().expect("must be refused").to_string();
    for part in parts {
        assert!(message.contains(part), "no {part:?} in: {message}");
    }
}

#[test]
fn every_wrong_key_is_named_at_once() {
    let folder = reweighted("vae", VAE, |weights| {
        weights.remove("decoder.conv_in.weight").unwrap();
        weights.remove("encoder.mid_block.resnets.1.norm2.bias").unwrap();
        weights.insert("decoder.conv_in.weigth".into(), zeros(&[2, 3], DType::F32));
        weights.insert("decoder.conv_out.bias".into(), zeros(&[4], DType::F32));
        weights.insert("quant_conv.bias".into(), zeros(&[8], DType::I64));
        let nan = Tensor::full(f32::NAN, 4, &Device::Cpu).unwrap();
        weights.insert("post_quant_conv.bias".into(), nan);
    });
    assert_says(
        vae(folder.path()),
        &[
            VAE,
            "2 missing: encoder.mid_block.resnets.1.norm2.bias [16], decoder.conv_in.weight [16, 4, 3, 3];",
            "1 unexpected: decoder.conv_in.weigth [2, 3] in diffusion_pytorch_model.safetensors;",
            "1 of another shape: decoder.conv_out.bias is [4] in diffusion_pytorch_model.safetensors, expected [3];",
            "2 unusable: quant_conv.bias is I64 in diffusion_pytorch_model.safetensors, expected F32, F16 or BF16",
            "post_quant_conv.bias in diffusion_pytorch_model.safetensors holds NaN or infinity",
        ],
    );
}

/// The network is another crate's; its keys are held to account all the same.
#[test]
fn keys_of_a_t5_are_named_too() {
    let table = "encoder.embed_tokens.weight";
    let other_name = |weights: &mut Weights| {
        let shared = weights.remove("shared.weight").unwrap();
        weights.insert(table.into(), shared)
    };
    let folder = reweighted("t5", "model.safetensors", |weights| drop(other_name(weights)));
    t5(folder.path()).unwrap();
    let folder = reweighted("t5", "model.safetensors", |weights| {
        weights.remove("shared.weight").unwrap();
        weights.remove("encoder.block.1.layer.1.DenseReluDense.wi_1.weight").unwrap();
        weights.insert("lm_head.weight".into(), zeros(&[64, 24], DType::F32));
    });
    assert_says(
        t5(folder.path()),
        &[
            "2 missing: encoder.block.1.layer.1.DenseReluDense.wi_1.weight [40, 24], shared.weight [64, 24];",
            "1 unexpected: lm_head.weight [64, 24] in model.safetensors;",
        ],
    );
    let folder = configured("t5", "", "feed_forward_proj", json!("gated-silu"));
    assert_says(t5(folder.path()), &["feed_forward_proj is \"gated-silu\"", "\"gated-gelu\""]);
}

#[test]
fn a_class_embedding_is_never_made_up() {
    let folder = reweighted("clip", "model.safetensors", |weights| {
        weights.remove("vision_model.embeddings.class_embedding").unwrap();
    });
    assert_says(clip(folder.path()), &["1 missing: vision_model.embeddings.class_embedding [40];"]);
}

/// Half of one naming and half of the other is a damaged file: nothing is patched together.
#[test]
fn old_and_new_attention_names_do_not_mix() {
    let folder = reweighted("vae", VAE, |weights| {
        let key = weights.remove("decoder.mid_block.attentions.0.key.weight").unwrap();
        weights.insert("decoder.mid_block.attentions.0.to_k.weight".into(), key);
    });
    assert_says(
        vae(folder.path()),
        &[
            "1 missing: decoder.mid_block.attentions.0.key.weight [16, 16];",
            "1 unexpected: decoder.mid_block.attentions.0.to_k.weight [16, 16]",
        ],
    );
}

#[test]
fn a_damaged_weight_file_says_how() {
    let folder = copy("vae");
    let path = folder.path().join(VAE);
    let bytes = fs::read(&path).unwrap();
    let mut long = bytes.clone();
    long.push(0);
    let whole = format!("where the header asks for {}", bytes.len());
    let cases: [(&[u8], &[&str]); 7] = [
        (&bytes[..bytes.len() - 1], &["truncated", &whole, "fetch the file again"]),
        (&bytes[..100], &["truncated: 100 bytes"]),
        (&bytes[..3], &["truncated: 3 bytes where the header asks for 8"]),
        (b"", &["truncated: 0 bytes"]),
        (&long, &["1 bytes too long for its header"]),
        (
            b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n",
            &["not a safetensors file"],
        ),
        (b"\x02\0\0\0\0\0\0\0[]", &["not a safetensors file: bad header"]),
    ];
    for (content, parts) in cases {
        fs::write(&path, content).unwrap();
        assert_says(vae(folder.path()), &[&[VAE][..], parts].concat());
    }
    fs::remove_file(&path).unwrap();
    assert_says(vae(folder.path()), &[VAE, "no such file", "not a complete download"]);
    fs::write(folder.path().join("diffusion_pytorch_model.bin"), "pickle").unwrap();
    assert_says(vae(folder.path()), &[VAE, "safe_serialization=True"]);
}

#[test]
fn shards_are_read_and_their_faults_named() {
    let folder = copy("vae");
    let path = folder.path().join(VAE);
    let weights = candle_core::safetensors::load(&path, &Device::Cpu).unwrap();
    fs::remove_file(&path).unwrap();
    let (first, second): (Weights, Weights) =
        weights.clone().into_iter().partition(|(key, _)| key.starts_with("encoder"));
    let names = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"];
    let shards = names.map(|name| folder.path().join(name));
    candle_core::safetensors::save(&first, &shards[0]).unwrap();
    candle_core::safetensors::save(&second, &shards[1]).unwrap();
    let name_of = |key: &String| names[usize::from(!key.starts_with("encoder"))];
    let map: serde_json::Map<String, Value> =
        weights.keys().map(|key| (key.clone(), name_of(key).into())).collect();
    let index = folder.path().join("diffusion_pytorch_model.safetensors.index.json");
    fs::write(&index, json!({"metadata": {}, "weight_map": map}).to_string()).unwrap();
    vae(folder.path()).unwrap();

    candle_core::safetensors::save(&weights, &shards[1]).unwrap();
    assert_says(vae(folder.path()), &[names[1], "is in another shard as well"]);
    fs::remove_file(&shards[1]).unwrap();
    assert_says(vae(folder.path()), &[names[1], "no such file"]);
    fs::write(&index, json!({"weight_map": {"a": "../secret.safetensors"}}).to_string()).unwrap();
    assert_says(vae(folder.path()), &["index.json", "a file name in this folder"]);
    fs::write(&index, "{}").unwrap();
    assert_says(vae(folder.path()), &["index.json", "weight_map"]);
}

#[test]
fn a_bad_config_file_says_where() {
    let folder = copy("vae");
    let path = folder.path().join("config.json");
    for (content, part) in
        [("{\"a\": ", "not valid JSON"), ("[]", "expected a JSON object, found a list")]
    {
        fs::write(&path, content).unwrap();
        assert_says(vae(folder.path()), &["config.json", part]);
    }
    fs::remove_file(&path).unwrap();
    assert_says(
        vae(folder.path()),
        &["config.json: no such file", "diffusers or transformers layout"],
    );
}

type Load = fn(&Path) -> Result<()>;

#[test]
fn a_setting_that_is_not_supported_is_named_with_what_is() {
    let cases: [(Load, &str, &str, &str, Value, &str); 26] = [
        (vae, "vae", "", "act_fn", json!("relu"), "act_fn is \"relu\"; supported: \"silu\""),
        (vae, "vae", "", "in_channels", json!(1), "in_channels is 1; supported: 3"),
        (
            vae,
            "vae",
            "",
            "norm_num_groups",
            json!(3),
            "block_out_channels is [8,16]; supported: multiples of norm_num_groups 3",
        ),
        (
            vae,
            "vae",
            "",
            "norm_num_groups",
            json!(0),
            "norm_num_groups is 0; supported: a whole number from 1",
        ),
        (
            vae,
            "vae",
            "",
            "scaling_factor",
            json!(0),
            "scaling_factor is 0; supported: a number above 0",
        ),
        (vae, "vae", "", "latents_mean", json!([0.0]), "latents_mean is [0.0]; supported: null"),
        (
            vae,
            "vae",
            "",
            "down_block_types",
            json!(["AttnDownEncoderBlock2D", "DownEncoderBlock2D"]),
            "supported: a list of \"DownEncoderBlock2D\"",
        ),
        (vae, "vae", "", "up_block_types", json!(["UpDecoderBlock2D"]), "supported: 2 blocks"),
        (vae, "vae", "", "use_tiling_magic", json!(3), "unknown field use_tiling_magic (3)"),
        (
            vae,
            "vae",
            "",
            "_class_name",
            json!("VQModel"),
            "_class_name is \"VQModel\"; supported: \"AutoencoderKL\"",
        ),
        (
            unet,
            "unet",
            "",
            "addition_embed_type",
            json!("text_time"),
            "Stable Diffusion XL are not built yet",
        ),
        (
            unet,
            "unet",
            "",
            "class_embed_type",
            json!("timestep"),
            "class_embed_type is \"timestep\"; supported: null",
        ),
        (
            unet,
            "unet",
            "",
            "num_attention_heads",
            json!(8),
            "num_attention_heads is 8; supported: null",
        ),
        (
            unet,
            "unet",
            "",
            "attention_head_dim",
            json!([3, 4]),
            "supported: a divisor of the 16 channels of level 0",
        ),
        (unet, "unet", "", "attention_head_dim", json!([4]), "a list of 2 of them"),
        (unet, "unet", "", "conv_in_kernel", json!(5), "conv_in_kernel is 5; supported: 3"),
        (
            unet,
            "unet",
            "",
            "mid_block_type",
            json!("UNetMidBlock2D"),
            "supported: \"UNetMidBlock2DCrossAttn\"",
        ),
        (
            unet,
            "unet",
            "",
            "down_block_types",
            json!(["DownBlock2D", "AttnDownBlock2D"]),
            "\"DownBlock2D\" or \"CrossAttnDownBlock2D\"",
        ),
        (
            unet,
            "unet",
            "",
            "resnet_time_scale_shift",
            json!("scale_shift"),
            "supported: \"default\"",
        ),
        (
            text,
            "clip_text",
            "",
            "hidden_act",
            json!("relu"),
            "hidden_act is \"relu\"; supported: \"quick_gelu\" or \"gelu\"",
        ),
        (
            text,
            "clip_text",
            "",
            "num_attention_heads",
            json!(5),
            "supported: a divisor of hidden_size 32",
        ),
        (
            text,
            "clip_text",
            "",
            "architectures",
            json!(["CLIPTextModelWithProjection"]),
            "supported: a list of \"CLIPTextModel\"",
        ),
        (
            clip,
            "clip",
            "/vision_config",
            "num_channels",
            json!(4),
            "vision_config.num_channels is 4; supported: 3",
        ),
        (
            clip,
            "clip",
            "/text_config",
            "hidden_act",
            json!("relu"),
            "text_config.hidden_act is \"relu\"",
        ),
        (
            judge,
            "judge",
            "",
            "thresholds",
            json!([0.0]),
            "thresholds is [0.0]; supported: a list of 3 finite numbers",
        ),
        (judge, "judge", "", "labels", json!([]), "labels is []; supported: a list of names"),
    ];
    for (load, name, section, field, value, expected) in cases {
        let folder = configured(name, section, field, value);
        assert_says(load(folder.path()), &["config.json", expected]);
    }
}

/// A field that says what this crate does anyway, or nothing, is no reason to refuse a model.
#[test]
fn harmless_settings_are_taken() {
    for (load, name, field, value) in [
        (vae as Load, "vae", "_diffusers_version", json!("9.9")),
        (vae, "vae", "force_upcast", json!(true)),
        (vae, "vae", "some_future_switch", json!(false)),
        (unet, "unet", "only_cross_attention", json!(false)),
        (unet, "unet", "mid_block_scale_factor", json!(1.0)),
        (unet, "unet", "sample_size", json!([64, 64])),
        (text, "clip_text", "temperature", json!(1.0)),
        (text, "clip_text", "id2label", json!({"0": "LABEL_0"})),
    ] {
        load(configured(name, "", field, value).path()).unwrap();
    }
}

/// A configuration of another size than the weights: every key is listed, and no memory is wasted on a
/// size that cannot be.
#[test]
fn another_size_than_the_weights_lists_shapes() {
    let folder = configured("clip_text", "", "intermediate_size", json!(44));
    assert_says(
        text(folder.path()),
        &[
            "6 of another shape",
            "text_model.encoder.layers.1.mlp.fc2.weight is [32, 40]",
            "expected [32, 44]",
        ],
    );
    let folder = configured("clip_text", "", "vocab_size", json!(16_000_000));
    assert_says(
        text(folder.path()),
        &["token_embedding.weight is [64, 32]", "expected [16000000, 32]"],
    );
    let folder = configured("clip_text", "", "num_hidden_layers", json!(16_000_000));
    assert_says(text(folder.path()), &["missing: text_model.encoder.layers.2.self_attn"]);
    let folder = configured("clip_text", "", "intermediate_size", json!(16_000_000_000_u64));
    assert_says(text(folder.path()), &["supported: a whole number from 1 to 16777216"]);
}

#[test]
fn clip_needs_to_know_its_pixels() {
    let edited = |field: &str, value: Value| {
        let folder = copy("clip");
        edit_json(&folder.path().join("preprocessor_config.json"), "", field, value);
        folder
    };
    for (field, value, expected) in [
        ("size", json!({"shortest_edge": 224}), "size is {\"shortest_edge\":224}; supported: 24"),
        ("crop_size", json!(12), "crop_size is 12; supported: 24"),
        ("resample", json!(6), "resample is 6; supported: 0 (nearest)"),
        ("resample", json!("bicubic"), "resample is \"bicubic\""),
        ("resample", json!(2.0), "resample is 2.0"),
        (
            "size",
            json!({"shortest_edge": 24, "longest_edge": 30}),
            "height and width or shortest_edge",
        ),
        ("size", json!("24"), "size is \"24\""),
        ("image_processor_type", json!("OwlViTImageProcessor"), "supported: ViTImageProcessor"),
        ("image_mean", json!([0.5]), "image_mean is [0.5]; supported: a list of 3 finite numbers"),
        ("image_std", json!([0.5, 0, 0.5]), "supported: three numbers above 0"),
        ("rescale_factor", json!(1.0), "rescale_factor is 1.0; supported: 1/255"),
        ("do_rescale", json!(false), "1/255 with do_rescale true"),
        ("do_pad", json!(true), "unknown field do_pad"),
    ] {
        assert_says(clip(edited(field, value).path()), &["preprocessor_config.json", expected]);
    }
    let plain = edited("do_normalize", json!(false));
    let plain = ClipModel::load(plain.path(), &Device::Cpu).unwrap();
    assert_eq!((plain.preprocess().mean, plain.preprocess().std), ([0.0; 3], [1.0; 3]));

    let bilinear = edited("resample", json!(2));
    let bilinear = ClipModel::load(bilinear.path(), &Device::Cpu).unwrap();
    assert_eq!(bilinear.preprocess().filter, Filter::BilinearAntialias);
    let absent = edited("resample", Value::Null);
    let absent = ClipModel::load(absent.path(), &Device::Cpu).unwrap();
    assert_eq!(absent.preprocess().filter, Filter::BicubicAntialias);

    let folder = copy("clip");
    let old = folder.path().join("preprocessor_config.json");
    let settings: Value = serde_json::from_str(&fs::read_to_string(&old).unwrap()).unwrap();
    fs::remove_file(&old).unwrap();
    assert_says(clip(folder.path()), &["preprocessor_config.json: no such file"]);
    let new = json!({"image_processor": settings, "processor_class": "CLIPProcessor"});
    fs::write(folder.path().join("processor_config.json"), new.to_string()).unwrap();
    let newer = ClipModel::load(folder.path(), &Device::Cpu).unwrap();
    assert_eq!(newer.preprocess().mean, [0.5, 0.45, 0.4]);
}

/// A pipeline folder with a VAE and a scheduler.
fn pipeline() -> TempDir {
    let folder = tempfile::tempdir().unwrap();
    let index = json!({
        "_class_name": "StableDiffusionPipeline",
        "vae": ["diffusers", "AutoencoderKL"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "safety_checker": [null, null],
        "requires_safety_checker": false,
    });
    fs::write(folder.path().join("model_index.json"), index.to_string()).unwrap();
    fs::create_dir(folder.path().join("vae")).unwrap();
    for file in ["config.json", VAE] {
        fs::copy(golden("vae").join(file), folder.path().join("vae").join(file)).unwrap();
    }
    folder
}

#[test]
fn a_pipeline_folder_names_its_components() {
    let folder = pipeline();
    let opened = PipelineFolder::open(folder.path()).unwrap();
    assert_eq!(opened.class_name(), "StableDiffusionPipeline");
    assert_eq!(opened.components().collect::<Vec<_>>(), ["unet", "vae"]);
    assert_eq!(opened.component_class("unet"), Some("UNet2DConditionModel"));
    vae(&opened.component("vae").unwrap().path()).unwrap();
    assert_says(
        opened.component("unet"),
        &["unet: no such file", "UNet2DConditionModel", "complete download"],
    );
    assert_says(
        opened.component("scheduler"),
        &["no component \"scheduler\"", "it lists unet, vae"],
    );
    assert_says(opened.component("safety_checker"), &["no component \"safety_checker\""]);

    let index = folder.path().join("model_index.json");
    fs::write(&index, "{}").unwrap();
    assert_says(
        PipelineFolder::open(folder.path()),
        &["model_index.json", "_class_name must be a string"],
    );
    fs::remove_file(&index).unwrap();
    assert_says(
        PipelineFolder::open(folder.path()),
        &["model_index.json: no such file", "diffusers pipeline"],
    );
}

/// The hash of what loading reads of the VAE of a pipeline.
fn hash_of(folder: &Path) -> String {
    let pipeline = PipelineFolder::open(folder).unwrap();
    AutoencoderKl::load(pipeline.component("vae").unwrap(), &Device::Cpu).unwrap();
    pipeline.folder().hash().unwrap()
}

#[test]
fn the_hash_covers_what_is_loaded_and_nothing_else() {
    let (one, other) = (pipeline(), pipeline());
    let before = hash_of(one.path());
    assert_eq!(before.len(), 64);
    assert_eq!(before, hash_of(other.path()), "where the folder lies does not matter");
    let foreign = [
        "README.md",
        "v1-5-pruned.safetensors",
        "pytorch_lora_weights.safetensors",
        "notes.txt",
        "vae/diffusion_pytorch_model.fp16.safetensors",
        "vae/old_config.json",
        "safety_checker/config.json",
        "unet/config.json",
    ];
    for file in foreign {
        let path = other.path().join(file);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(&path, "{}").unwrap();
        assert_eq!(before, hash_of(other.path()), "{file} is not loaded");
    }

    let file = other.path().join("vae").join(VAE);
    let mut bytes = fs::read(&file).unwrap();
    *bytes.last_mut().unwrap() ^= 1;
    fs::write(&file, &bytes).unwrap();
    assert_ne!(before, hash_of(other.path()), "one bit of a weight matters");
    *bytes.last_mut().unwrap() ^= 1;
    fs::write(&file, &bytes).unwrap();
    assert_eq!(before, hash_of(other.path()));
    fs::rename(&file, other.path().join("vae/diffusion_pytorch_model.bf16.safetensors")).unwrap();
    fs::remove_file(other.path().join("vae/diffusion_pytorch_model.fp16.safetensors")).unwrap();
    assert_ne!(before, hash_of(other.path()), "a file's name matters");

    let config = one.path().join("vae/config.json");
    edit_json(&config, "", "scaling_factor", json!(0.5));
    assert_ne!(before, hash_of(one.path()), "a setting matters");
    let empty = tempfile::tempdir().unwrap();
    assert_says(ModelFolder::new(empty.path()).hash(), &["no file of the model was read"]);
}

/// Hashes name models in calibrations and records, so that another way to reckon them would lose
/// all.
#[test]
fn the_models_of_this_repository_keep_their_names() {
    let assets = Path::new(env!("CARGO_MANIFEST_DIR")).join("../assets");
    for (name, hash) in [("emojiland-clip", "ce0635bd"), ("emojiland-siglip", "daa834b7")] {
        let folder = ModelFolder::new(&assets.join(name));
        load_contrastive(&folder, &Device::Cpu).unwrap();
        assert_eq!(folder.hash().unwrap()[..8], *hash, "{name}");
    }
    let judge = Judge::load_cpu(&assets.join("emojiland-judge")).unwrap();
    assert_eq!(judge.hash()[..8], *"c8594ed9");
}

#[test]
fn every_component_of_a_pipeline_is_accounted_for() {
    let folder = pipeline();
    let index = folder.path().join("model_index.json");
    let account = || {
        let opened = PipelineFolder::open(folder.path())?;
        opened.account(&["vae", "unet"], &[("safety_checker", "nodes check"), ("extractor", "")])
    };
    assert!(account().unwrap().is_empty(), "the pipeline has none");
    let checker = json!(["stable_diffusion", "StableDiffusionSafetyChecker"]);
    edit_json(&index, "", "safety_checker", checker);
    edit_json(&index, "", "extractor", json!(["transformers", "CLIPImageProcessor"]));
    let notices = account().unwrap();
    assert_eq!(
        notices,
        ["the model's own safety_checker (StableDiffusionSafetyChecker) is not used: nodes check"]
    );
    for (field, value, expected) in [
        ("controlnet", json!(["diffusers", "ControlNetModel"]), "controlnet is [\"diffusers\""),
        (
            "unet_2",
            json!(["diffusers", null]),
            "unet_2 is [\"diffusers\",null]; supported: a library",
        ),
        ("text_encoder_3", json!("T5EncoderModel"), "text_encoder_3 is \"T5EncoderModel\""),
        ("force_zeros_for_empty_prompt", json!(true), "unknown field force_zeros_for_empty_prompt"),
    ] {
        let before = fs::read(&index).unwrap();
        edit_json(&index, "", field, value);
        assert_says(account(), &["model_index.json", expected]);
        fs::write(&index, before).unwrap();
    }
    edit_json(&index, "", "tokenizer_2", json!([null, null]));
    account().unwrap();
}

/// The models that ship with the project go through the same loaders as everyone's.
#[test]
fn the_models_of_this_repository_load() {
    let assets = Path::new(env!("CARGO_MANIFEST_DIR")).join("../assets");
    let pipeline = PipelineFolder::open(&assets.join("emojiland-sd")).unwrap();
    assert_eq!(pipeline.class_name(), "StableDiffusionPipeline");
    let component = |name| pipeline.component(name).unwrap();

    let tokenizer = ClipTokenizer::load(component("tokenizer")).unwrap();
    let text = ClipTextModel::load(component("text_encoder"), &Device::Cpu).unwrap();
    let prompt = tokenizer.encode("a kitchen knife and a cat on a blue background").unwrap();
    assert_eq!(prompt.chunks.len(), 1);
    let context = text.forward(&prompt.chunks).unwrap();

    let unet = UNet2DConditionModel::load(component("unet"), &Device::Cpu).unwrap();
    let vae = AutoencoderKl::load(component("vae"), &Device::Cpu).unwrap();
    let [height, width] = unet.config().sample_size.unwrap();
    let latent = zeros(&[1, vae.config().latent_channels, height, width], DType::F32);
    let off = &mut Tape::off();
    let noise = unet.forward(&latent, &[500.0], &context, off).unwrap();
    let pixels = vae.decode(&noise, off).unwrap();
    assert_eq!(pixels.dims(), [1, 3, 32, 32]);

    let unit = pixels.affine(0.5, 0.5).unwrap().clamp(0.0, 1.0).unwrap();
    for (name, kind) in [("emojiland-clip", "clip"), ("emojiland-siglip", "siglip")] {
        let model = load_contrastive(&assets.join(name), &Device::Cpu).unwrap();
        let words = model.text_features(&[model.encode("a knife").unwrap()]).unwrap();
        let image = model.image_features(&unit, off).unwrap();
        assert_eq!((model.image_size(), words.dims()), (32, image.dims()), "{kind}");
        let long = model.encode(&"a knife ".repeat(40)).unwrap_err().to_string();
        assert!(long.contains("the text has") && long.contains("shorten it"), "{long}");
    }
    let unknown = load_contrastive(&assets.join("emojiland-judge"), &Device::Cpu).err().unwrap();
    assert!(unknown.to_string().contains("model_type is absent; supported: clip, siglip"));

    let judge = Judge::load(&assets.join("emojiland-judge"), &Device::Cpu).unwrap();
    assert_eq!(judge.logits(&unit).unwrap().dims(), [1, judge.labels().len()]);
}
