//! `config.json` of transformers' `CLIPTextModel` and `CLIPModel`. Absent fields have transformers' defaults.

use std::path::Path;

use crate::Result;
use crate::config::ConfigFile;
use crate::layers::Activation;

/// Fields of every transformers configuration, and training settings, that change nothing in the
/// forward pass of CLIP. Old versions of transformers wrote all of them into each section.
const HARMLESS: [&str; 62] = [
    "architectures",
    "attention_dropout",
    "bad_words_ids",
    "begin_suppress_tokens",
    "bos_token_id",
    "chunk_size_feed_forward",
    "cross_attention_hidden_size",
    "decoder_start_token_id",
    "diversity_penalty",
    "do_sample",
    "dropout",
    "dtype",
    "early_stopping",
    "encoder_no_repeat_ngram_size",
    "exponential_decay_length_penalty",
    "finetuning_task",
    "forced_bos_token_id",
    "forced_eos_token_id",
    "gradient_checkpointing",
    "id2label",
    "initializer_factor",
    "initializer_range",
    "is_decoder",
    "is_encoder_decoder",
    "label2id",
    "length_penalty",
    "logit_scale_init_value",
    "max_length",
    "min_length",
    "no_repeat_ngram_size",
    "num_beam_groups",
    "num_beams",
    "num_return_sequences",
    "output_attentions",
    "output_hidden_states",
    "output_scores",
    "pad_token_id",
    "prefix",
    "problem_type",
    "projection_dim",
    "pruned_heads",
    "remove_invalid_values",
    "repetition_penalty",
    "return_dict",
    "return_dict_in_generate",
    "sep_token_id",
    "suppress_tokens",
    "task_specific_params",
    "temperature",
    "tf_legacy_loss",
    "tie_encoder_decoder",
    "tie_word_embeddings",
    "tokenizer_class",
    "top_k",
    "top_p",
    "torch_dtype",
    "torchscript",
    "transformers_version",
    "transformers.js_config",
    "typical_p",
    "use_bfloat16",
    "use_cache",
];

/// The sizes of a transformer tower.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct TowerConfig {
    pub(crate) width: usize,
    pub(crate) mlp_width: usize,
    pub(crate) layers: usize,
    pub(crate) heads: usize,
    pub(crate) activation: Activation,
    pub(crate) eps: f64,
}

impl TowerConfig {
    fn read(fields: &ConfigFile, width: usize, mlp: usize, heads: usize) -> Result<Self> {
        let activation = match fields.choice(
            "hidden_act",
            &["quick_gelu", "gelu", "gelu_new", "gelu_pytorch_tanh", "silu"],
        )? {
            "quick_gelu" => Activation::GeluQuick,
            "gelu" => Activation::GeluErf,
            "silu" => Activation::Silu,
            _ => Activation::GeluTanh,
        };
        let tower = Self {
            width: fields.size("hidden_size", width)?,
            mlp_width: fields.size("intermediate_size", mlp)?,
            layers: fields.size("num_hidden_layers", 12)?,
            heads: fields.size("num_attention_heads", heads)?,
            activation,
            eps: fields.positive("layer_norm_eps", 1e-5)?,
        };
        if !tower.width.is_multiple_of(tower.heads) {
            let divisors = format!("a divisor of hidden_size {}", tower.width);
            return Err(fields.unsupported("num_attention_heads", divisors));
        }
        Ok(tower)
    }
}

/// The text tower's configuration.
#[derive(Debug, Clone, PartialEq)]
pub struct ClipTextConfig {
    /// Number of token ids.
    pub vocab_size: usize,
    /// Width of the hidden states.
    pub hidden_size: usize,
    /// The longest window of tokens.
    pub max_position_embeddings: usize,
    /// The end mark at which the window is pooled; 2 is the old default that stands for "the largest
    /// id of the window".
    pub eos_token_id: u32,
    pub(crate) tower: TowerConfig,
}

impl ClipTextConfig {
    /// Reads the `config.json` of a `CLIPTextModel`.
    pub(crate) fn read(path: &Path) -> Result<Self> {
        let fields = ConfigFile::read(path)?;
        only_architecture(&fields, "CLIPTextModel")?;
        fields.choice("model_type", &["clip_text_model"])?;
        Self::from_fields(fields)
    }

    fn from_fields(fields: ConfigFile) -> Result<Self> {
        let tower = TowerConfig::read(&fields, 512, 2048, 8)?;
        let config = Self {
            vocab_size: fields.size("vocab_size", 49408)?,
            hidden_size: tower.width,
            max_position_embeddings: fields.size("max_position_embeddings", 77)?,
            eos_token_id: fields.id("eos_token_id", 49407)?,
            tower,
        };
        fields.finish(&[&HARMLESS[..], &["model_type"]].concat())?;
        Ok(config)
    }
}

/// The image tower's configuration.
#[derive(Debug, Clone, PartialEq)]
pub struct ClipVisionConfig {
    /// Width of the hidden states.
    pub hidden_size: usize,
    /// Side of the square input in pixels.
    pub image_size: usize,
    /// Side of a patch in pixels.
    pub patch_size: usize,
    pub(crate) tower: TowerConfig,
}

impl ClipVisionConfig {
    fn from_fields(fields: ConfigFile) -> Result<Self> {
        let tower = TowerConfig::read(&fields, 768, 3072, 12)?;
        fields.only("num_channels", 3)?;
        let config = Self {
            hidden_size: tower.width,
            image_size: fields.size("image_size", 224)?,
            patch_size: fields.size("patch_size", 32)?,
            tower,
        };
        if config.patch_size > config.image_size {
            let smaller = format!("at most image_size {}", config.image_size);
            return Err(fields.unsupported("patch_size", smaller));
        }
        fields.finish(&[&HARMLESS[..], &["eos_token_id", "model_type"]].concat())?;
        Ok(config)
    }

    /// Patches along one side. Pixels beyond the last whole patch are not seen.
    pub fn grid(&self) -> usize {
        self.image_size / self.patch_size
    }
}

/// The configuration of both towers and of the space they share.
#[derive(Debug, Clone, PartialEq)]
pub struct ClipConfig {
    /// Side of the square image the model takes, in pixels.
    pub image_size: usize,
    /// Width of the shared space.
    pub projection_dim: usize,
    /// The text tower.
    pub text: ClipTextConfig,
    /// The image tower.
    pub vision: ClipVisionConfig,
}

impl ClipConfig {
    /// Reads the `config.json` of a `CLIPModel`.
    pub(crate) fn read(path: &Path) -> Result<Self> {
        let fields = ConfigFile::read(path)?;
        only_architecture(&fields, "CLIPModel")?;
        fields.choice("model_type", &["clip"])?;
        // Where an old file has both, transformers takes `text_config_dict` alone.
        let text =
            ClipTextConfig::from_fields(fields.section("text_config", &["text_config_dict"])?)?;
        let vision = ClipVisionConfig::from_fields(
            fields.section("vision_config", &["vision_config_dict"])?,
        )?;
        let config = Self {
            image_size: vision.image_size,
            projection_dim: fields.size("projection_dim", 512)?,
            text,
            vision,
        };
        fields.finish(&HARMLESS)?;
        Ok(config)
    }
}

/// Refuses a folder that was saved from another class.
fn only_architecture(fields: &ConfigFile, class: &'static str) -> Result<()> {
    fields.choice_list("architectures", &[class], &[class]).map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};

    fn read<T>(read: impl Fn(&Path) -> Result<T>, config: &Value) -> T {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), config.to_string()).unwrap();
        read(file.path()).unwrap()
    }

    /// `text_encoder/config.json` of Stable Diffusion 1.5.
    #[test]
    fn stable_diffusion_15() {
        let config = read(
            ClipTextConfig::read,
            &json!({
                "_name_or_path": "openai/clip-vit-large-patch14", "architectures": ["CLIPTextModel"],
                "attention_dropout": 0.0, "bos_token_id": 0, "dropout": 0.0, "eos_token_id": 2,
                "hidden_act": "quick_gelu", "hidden_size": 768, "initializer_factor": 1.0,
                "initializer_range": 0.02, "intermediate_size": 3072, "layer_norm_eps": 1e-05,
                "max_position_embeddings": 77, "model_type": "clip_text_model",
                "num_attention_heads": 12, "num_hidden_layers": 12, "pad_token_id": 1,
                "projection_dim": 768, "torch_dtype": "float32",
                "transformers_version": "4.22.0.dev0", "vocab_size": 49408,
            }),
        );
        assert_eq!((config.hidden_size, config.eos_token_id), (768, 2));
        assert_eq!(config.tower.activation, Activation::GeluQuick);
    }

    /// The shape of OpenAI's files: every generic setting in each section, and `text_config_dict` beside
    /// `text_config`.
    #[test]
    fn openai_clip() {
        let config = read(
            ClipConfig::read,
            &json!({
                "_name_or_path": "clip-vit-large-patch14/", "architectures": ["CLIPModel"],
                "initializer_factor": 1.0, "logit_scale_init_value": 2.6592, "model_type": "clip",
                "projection_dim": 768, "torch_dtype": "float32", "transformers_version": null,
                "text_config": {
                    "add_cross_attention": false, "architectures": null, "bos_token_id": 0,
                    "chunk_size_feed_forward": 0, "diversity_penalty": 0.0, "eos_token_id": 2,
                    "hidden_size": 999, "id2label": {"0": "LABEL_0"}, "length_penalty": 1.0,
                    "max_length": 20, "model_type": "clip_text_model", "num_beams": 1, "top_k": 50,
                    "torchscript": false, "use_bfloat16": false, "vocab_size": 49408,
                },
                "text_config_dict": {
                    "hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12,
                    "num_hidden_layers": 12, "projection_dim": 768,
                },
                "vision_config": {
                    "dropout": 0.0, "hidden_size": 1024, "image_size": 224, "intermediate_size": 4096,
                    "num_attention_heads": 16, "num_hidden_layers": 24, "patch_size": 14,
                    "output_attentions": false, "typical_p": 1.0,
                },
                "vision_config_dict": null,
            }),
        );
        assert_eq!((config.projection_dim, config.image_size), (768, 224));
        assert_eq!((config.text.hidden_size, config.text.tower.heads), (768, 12));
        assert_eq!((config.vision.grid(), config.vision.tower.layers), (16, 24));
    }
}
