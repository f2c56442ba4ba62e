//! CLIP models as open_clip pushes them: `open_clip_config.json`, `open_clip_model.safetensors` and
//! a tokenizer.
//!
//! The network is transformers' `CLIPModel` under other names: the keys that it asks for are looked
//! up under open_clip's, where queries, keys and values are one matrix and the projections lie the
//! other way around.

use candle_core::Device;

use super::config::{ClipConfig, ClipTextConfig, ClipVisionConfig};
use super::model::ClipModel;
use crate::config::ConfigFile;
use crate::layers::{Activation, Filter};
use crate::tower::{ImagePreprocess, TowerConfig};
use crate::weights::{self, Alias, Part};
use crate::{ModelFolder, Result};

/// The file that tells such a folder.
const FILE: &str = "open_clip_config.json";
/// Names of the weights, the newer first.
const STEMS: [&str; 2] = ["open_clip_model", "open_clip_pytorch_model"];
/// Epsilon of every norm; open_clip makes it a setting only in `norm_kwargs`, which is refused.
const EPS: f64 = 1e-5;
/// Settings of training, and of towers that are refused by name.
const HARMLESS: [&str; 14] = [
    "attn_pooler_heads",
    "attn_pooler_queries",
    "eos_id",
    "hf_model_pretrained",
    "hf_pooler_type",
    "hf_proj_type",
    "hf_tokenizer_name",
    "pad_id",
    "patch_dropout",
    "timm_drop",
    "timm_pool",
    "timm_proj",
    "tokenizer_kwargs",
    "tokenizer_mode",
];

/// Whether a folder is open_clip's alone; many are transformers' as well.
pub(crate) fn is_one(folder: &ModelFolder) -> bool {
    folder.has(FILE) && !folder.has("config.json")
}

/// Reads the folder.
pub(super) fn load(folder: &ModelFolder, device: &Device) -> Result<ClipModel> {
    let fields = folder.config(FILE)?;
    let model = fields.section("model_cfg", &[])?;
    let config = config(&model)?;
    let preprocess = preprocess(&fields.section("preprocess_cfg", &[])?, config.image_size)?;
    // What open_clip shows of a model on the hub.
    fields.finish(&["model_card"])?;
    let is_there =
        |stem: &&&str| folder.names().iter().any(|name| name.starts_with(&format!("{stem}.")));
    let stem = STEMS.iter().find(is_there).unwrap_or(&STEMS[0]);
    weights::load_renamed(folder, stem, device, alias, |root| {
        ClipModel::build(root, config, preprocess, device)
    })
}

/// The configuration that transformers would have for the model.
fn config(model: &ConfigFile) -> Result<ClipConfig> {
    let activation = match model.flag("quick_gelu", false)? {
        true => Activation::GeluQuick,
        false => Activation::GeluErf,
    };
    let vision = model.section("vision_cfg", &[])?;
    let width = vision.size("width", 768)?;
    let head = vision.size("head_width", 64)?;
    if !width.is_multiple_of(head) {
        return Err(vision.unsupported("head_width", format!("a divisor of width {width}")));
    }
    let config = ClipVisionConfig {
        hidden_size: width,
        image_size: vision.size("image_size", 224)?,
        patch_size: vision.size("patch_size", 16)?,
        tower: tower(&vision, width, width / head, activation)?,
    };
    if config.patch_size > config.image_size {
        let smaller = format!("at most image_size {}", config.image_size);
        return Err(vision.unsupported("patch_size", smaller));
    }
    vision.choice("pool_type", &["tok"])?;
    vision.choice("pos_embed_type", &["learnable"])?;
    vision.finish(&HARMLESS)?;

    let text = model.section("text_cfg", &[])?;
    let width = text.size("width", 512)?;
    let heads = text.size("heads", 8)?;
    if !width.is_multiple_of(heads) {
        return Err(text.unsupported("heads", format!("a divisor of width {width}")));
    }
    text.choice("pool_type", &["argmax"])?;
    text.choice("proj_type", &["linear"])?;
    let text_config = ClipTextConfig {
        vocab_size: text.size("vocab_size", 49408)?,
        hidden_size: width,
        max_position_embeddings: text.size("context_length", 77)?,
        // The window is pooled at its largest id.
        eos_token_id: 2,
        tower: tower(&text, width, heads, activation)?,
    };
    text.finish(&HARMLESS)?;
    let projection_dim = match model.get("embed_dim") {
        None => return Err(model.unsupported("embed_dim", "the width of the shared space")),
        Some(_) => model.size("embed_dim", 1)?,
    };
    model.finish(&["init_logit_scale"])?;
    let image_size = config.image_size;
    Ok(ClipConfig { image_size, projection_dim, text: text_config, vision: config })
}

fn tower(
    fields: &ConfigFile,
    width: usize,
    heads: usize,
    activation: Activation,
) -> Result<TowerConfig> {
    let ratio = fields.positive("mlp_ratio", 4.0)?;
    Ok(TowerConfig {
        width,
        mlp_width: ((width as f64 * ratio) as usize).max(1),
        layers: fields.size("layers", 12)?,
        heads,
        activation,
        eps: EPS,
    })
}

fn preprocess(fields: &ConfigFile, side: usize) -> Result<ImagePreprocess> {
    let absent = ImagePreprocess::OPENAI;
    let triple = |field, absent: [f32; 3]| -> Result<[f32; 3]> {
        Ok(fields.numbers(field, 3)?.map_or(absent, |values| [values[0], values[1], values[2]]))
    };
    let preprocess = ImagePreprocess {
        mean: triple("mean", absent.mean)?,
        std: triple("std", absent.std)?,
        filter: match fields.choice("interpolation", &["bicubic", "bilinear", "random"])? {
            "bilinear" => Filter::BilinearAntialias,
            _ => Filter::BicubicAntialias,
        },
    };
    if preprocess.std.iter().any(|&std| std <= 0.0) {
        return Err(fields.unsupported("std", "three numbers above 0"));
    }
    if fields.get("size").is_some() && fields.sizes("size", 2, side)? != [side; 2] {
        return Err(fields.unsupported("size", format!("{side}, the model's image_size")));
    }
    fields.choice("mode", &["RGB"])?;
    // Pictures are resized whole, as everywhere here.
    fields.choice("resize_mode", &["shortest", "longest", "squash"])?;
    fields.finish(&["fill_color"])?;
    Ok(preprocess)
}

/// Where open_clip keeps the tensor that transformers calls `key`.
fn alias(key: &str) -> Option<Alias> {
    let whole = |name: &str| Some(Alias { name: name.to_owned(), part: Part::Whole });
    let turned = |name: &str| Some(Alias { name: name.to_owned(), part: Part::Transposed });
    match key {
        "logit_scale" => return whole(key),
        "text_projection.weight" => return turned("text_projection"),
        "visual_projection.weight" => return turned("visual.proj"),
        _ => {}
    }
    let (side, rest) = match key.split_once('.')? {
        ("text_model", rest) => ("", rest),
        ("vision_model", rest) => ("visual.", rest),
        _ => return None,
    };
    if let Some(rest) = rest.strip_prefix("encoder.layers.") {
        return in_block(&format!("{side}transformer.resblocks"), rest);
    }
    let (layer, kind) = rest.rsplit_once('.')?;
    let name = match (layer, kind) {
        ("embeddings", "class_embedding") => "class_embedding".to_owned(),
        ("embeddings.token_embedding", _) => "token_embedding.weight".to_owned(),
        ("embeddings.position_embedding", _) => "positional_embedding".to_owned(),
        ("embeddings.patch_embedding", _) => "conv1.weight".to_owned(),
        ("final_layer_norm", kind) => format!("ln_final.{kind}"),
        ("pre_layrnorm", kind) => format!("ln_pre.{kind}"),
        ("post_layernorm", kind) => format!("ln_post.{kind}"),
        _ => return None,
    };
    whole(&format!("{side}{name}"))
}

/// A tensor of the block that `rest` begins with: `0.self_attn.q_proj.weight`.
fn in_block(blocks: &str, rest: &str) -> Option<Alias> {
    let (block, rest) = rest.split_once('.')?;
    let (layer, kind) = rest.rsplit_once('.')?;
    let third = |part| Some((format!("attn.in_proj_{kind}"), Part::Third(part)));
    let (name, part) = match layer {
        "self_attn.q_proj" => third(0),
        "self_attn.k_proj" => third(1),
        "self_attn.v_proj" => third(2),
        "self_attn.out_proj" => Some((format!("attn.out_proj.{kind}"), Part::Whole)),
        "layer_norm1" => Some((format!("ln_1.{kind}"), Part::Whole)),
        "layer_norm2" => Some((format!("ln_2.{kind}"), Part::Whole)),
        "mlp.fc1" => Some((format!("mlp.c_fc.{kind}"), Part::Whole)),
        "mlp.fc2" => Some((format!("mlp.c_proj.{kind}"), Part::Whole)),
        _ => None,
    }?;
    Some(Alias { name: format!("{blocks}.{block}.{name}"), part })
}
