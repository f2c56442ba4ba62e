//! T5's encoder, the third text encoder of Stable Diffusion 3.
//!
//! No gradient ever goes through a text encoder, so the network is candle-transformers' own; what is
//! ours is that its files are read as strictly as all others.

use std::collections::HashMap;
use std::path::Path;

use candle_core::{DType, Device, Tensor};
use candle_nn::{Activation, VarBuilder};
use candle_transformers::models::t5;

use crate::config::ConfigFile;
use crate::tower::{HARMLESS, only_architecture};
use crate::weights::Scope;
use crate::{Error, ModelFolder, Result, weights};

/// Fields that do not change what the encoder computes: those of decoder, training and generation.
const MARKS: [&str; 12] = [
    "classifier_dropout",
    "dense_act_fn",
    "dropout_rate",
    "eos_token_id",
    "initializer_factor",
    "is_encoder_decoder",
    "is_gated_act",
    "n_positions",
    "num_decoder_layers",
    "output_past",
    "pad_token_id",
    "use_cache",
];

/// transformers' `T5EncoderModel`.
#[derive(Debug)]
pub struct T5EncoderModel {
    network: t5::T5EncoderModel,
    config: t5::Config,
}

impl T5EncoderModel {
    /// Reads a transformers folder: `config.json` and `model.safetensors` (or its shards).
    ///
    /// # Errors
    /// When a file is missing or malformed, a setting is not supported, or the weights do not fit it.
    pub fn load(dir: impl Into<ModelFolder>, device: &Device) -> Result<Self> {
        let folder = dir.into();
        let config = read_config(&folder.file("config.json"))?;
        let tensors = weights::load(&folder, "model", device, |root| tensors(root, &config))?;
        let tensors = VarBuilder::from_tensors(tensors, DType::F32, device);
        Ok(Self { network: t5::T5EncoderModel::load(tensors, &config)?, config })
    }

    /// Width of the hidden states.
    pub fn width(&self) -> usize {
        self.config.d_model
    }

    /// The last hidden states of `b` windows of `n` token ids, `[b, n, width]`. Padding is attended
    /// to as any token, as in diffusers' pipelines.
    ///
    /// # Errors
    /// When the windows are empty or not equally long, or an id is beyond the vocabulary.
    pub fn forward(&self, ids: &[Vec<u32>]) -> Result<Tensor> {
        let invalid = |problem: String| Error::invalid("T5EncoderModel", problem);
        let length = ids.first().map_or(0, Vec::len);
        if length == 0 || ids.iter().any(|window| window.len() != length) {
            return Err(invalid("windows must have one length, at least 1".into()));
        }
        let vocabulary = self.config.vocab_size;
        if let Some(id) = ids.iter().flatten().find(|id| **id as usize >= vocabulary) {
            return Err(invalid(format!("token id {id}; the vocabulary has {vocabulary}")));
        }
        let tokens = Tensor::from_vec(ids.concat(), (ids.len(), length), self.network.device())?;
        // candle's method wants it mutable for a decoder's cache; clones share the tensors.
        Ok(self.network.clone().forward(&tokens)?)
    }
}

fn read_config(path: &Path) -> Result<t5::Config> {
    let fields = ConfigFile::read(path)?;
    only_architecture(&fields, "T5EncoderModel")?;
    fields.choice("model_type", &["t5"])?;
    fields.only("is_decoder", false)?;
    fields.only("scale_decoder_outputs", true)?;
    let defaults = t5::Config::default();
    let gated = fields.choice("feed_forward_proj", &["relu", "gated-gelu"])? == "gated-gelu";
    let activation = if gated { Activation::NewGelu } else { Activation::Relu };
    let config = t5::Config {
        vocab_size: fields.size("vocab_size", defaults.vocab_size)?,
        d_model: fields.size("d_model", defaults.d_model)?,
        d_kv: fields.size("d_kv", defaults.d_kv)?,
        d_ff: fields.size("d_ff", defaults.d_ff)?,
        num_layers: fields.size("num_layers", defaults.num_layers)?,
        num_heads: fields.size("num_heads", defaults.num_heads)?,
        relative_attention_num_buckets: fields
            .size("relative_attention_num_buckets", defaults.relative_attention_num_buckets)?,
        relative_attention_max_distance: fields
            .size("relative_attention_max_distance", defaults.relative_attention_max_distance)?,
        layer_norm_epsilon: fields.positive("layer_norm_epsilon", defaults.layer_norm_epsilon)?,
        feed_forward_proj: t5::ActivationWithOptionalGating { gated, activation },
        ..defaults
    };
    fields.get("tie_word_embeddings");
    fields.finish(&[&HARMLESS[..], &MARKS].concat())?;
    Ok(config)
}

/// Every tensor of the encoder under the name that candle-transformers asks for.
fn tensors(root: &Scope<'_>, config: &t5::Config) -> Result<HashMap<String, Tensor>> {
    let (d, inner, wide) = (config.d_model, config.num_heads * config.d_kv, config.d_ff);
    let mut wanted: Vec<(String, [usize; 2])> = Vec::new();
    for block in (0..config.num_layers).map(|i| format!("encoder.block.{i}.layer")) {
        wanted
            .extend(["q", "k", "v"].map(|x| (format!("{block}.0.SelfAttention.{x}"), [inner, d])));
        wanted.push((format!("{block}.0.SelfAttention.o"), [d, inner]));
        let widening = if config.feed_forward_proj.gated { &["wi_0", "wi_1"][..] } else { &["wi"] };
        let dense = format!("{block}.1.DenseReluDense");
        wanted.extend(widening.iter().map(|x| (format!("{dense}.{x}"), [wide, d])));
        wanted.push((format!("{dense}.wo"), [d, wide]));
    }
    let bias = "encoder.block.0.layer.0.SelfAttention.relative_attention_bias";
    wanted.push((bias.into(), [config.relative_attention_num_buckets, config.num_heads]));
    let norms = (0..config.num_layers)
        .flat_map(|i| [0, 1].map(|part| format!("encoder.block.{i}.layer.{part}.layer_norm")))
        .chain(["encoder.final_layer_norm".into()]);
    let tensor = |name: &str, shape: &[usize]| root.tensor(&format!("{name}.weight"), shape);
    let mut tensors = HashMap::new();
    for (name, shape) in wanted {
        tensors.insert(format!("{name}.weight"), tensor(&name, &shape)?);
    }
    for name in norms {
        tensors.insert(format!("{name}.weight"), tensor(&name, &[d])?);
    }
    // The table is saved under one of two names, or under both.
    let names = ["shared", "encoder.embed_tokens"];
    let present = names.into_iter().filter(|name| root.has(&format!("{name}.weight")));
    let present: Vec<&str> = present.collect();
    for name in if present.is_empty() { &names[..1] } else { &present } {
        let table = tensor(name, &[config.vocab_size, d])?;
        tensors.entry("shared.weight".into()).or_insert(table);
    }
    Ok(tensors)
}
