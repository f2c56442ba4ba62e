//! `config.json` of transformers' `CLIPTextModel` and `CLIPModel`. Absent fields have transformers' defaults.

use std::path::Path;

use crate::Result;
use crate::config::ConfigFile;
use crate::tower::{Defaults, HARMLESS, TowerConfig, only_architecture};

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

const TEXT: Defaults =
    Defaults { width: 512, mlp_width: 2048, heads: 8, activation: "quick_gelu", eps: 1e-5 };
const VISION: Defaults = Defaults { width: 768, mlp_width: 3072, heads: 12, ..TEXT };
/// Width of the shared space, where a file does not say.
const PROJECTION_DIM: usize = 512;

impl ClipTextConfig {
    /// Reads the `config.json` of a `CLIPTextModel`.
    pub(super) fn read(path: &Path) -> Result<Self> {
        let fields = ConfigFile::read(path)?;
        only_architecture(&fields, "CLIPTextModel")?;
        fields.choice("model_type", &["clip_text_model"])?;
        Self::from_fields(fields)
    }

    /// Reads the `config.json` of a `CLIPTextModelWithProjection`; the width of the projection comes
    /// second.
    pub(super) fn read_with_projection(path: &Path) -> Result<(Self, usize)> {
        let fields = ConfigFile::read(path)?;
        only_architecture(&fields, "CLIPTextModelWithProjection")?;
        fields.choice("model_type", &["clip_text_model"])?;
        let projection_dim = fields.size("projection_dim", PROJECTION_DIM)?;
        Ok((Self::from_fields(fields)?, projection_dim))
    }

    fn from_fields(fields: ConfigFile) -> Result<Self> {
        let tower = TowerConfig::read(&fields, &TEXT)?;
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
        let tower = TowerConfig::read(&fields, &VISION)?;
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
            projection_dim: fields.size("projection_dim", PROJECTION_DIM)?,
            text,
            vision,
        };
        fields.finish(&HARMLESS)?;
        Ok(config)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::layers::Activation;
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
