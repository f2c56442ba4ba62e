//! `config.json` of transformers' `SiglipModel`. Absent fields have transformers' defaults.

use std::path::Path;

use crate::Result;
use crate::config::ConfigFile;
use crate::tower::{Defaults, HARMLESS, TowerConfig, only_architecture};

/// The sizes of both towers.
#[derive(Debug, Clone, PartialEq)]
pub struct SiglipConfig {
    /// Side of the square image the model takes, in pixels.
    pub image_size: usize,
    /// Side of a patch in pixels.
    pub patch_size: usize,
    /// Width of the shared space, which is that of the image tower.
    pub projection_dim: usize,
    /// Number of token ids.
    pub vocab_size: usize,
    /// The length of every window of tokens.
    pub max_position_embeddings: usize,
    pub(super) text: TowerConfig,
    pub(super) vision: TowerConfig,
}

const DEFAULTS: Defaults =
    Defaults { width: 768, mlp_width: 3072, heads: 12, activation: "gelu_pytorch_tanh", eps: 1e-6 };
/// Marks of the tokenizer, which its own files name, and the name of the section's class.
const MARKS: [&str; 2] = ["eos_token_id", "model_type"];

impl SiglipConfig {
    pub(super) fn read(path: &Path) -> Result<Self> {
        let fields = ConfigFile::read(path)?;
        only_architecture(&fields, "SiglipModel")?;
        fields.choice("model_type", &["siglip"])?;
        let harmless = [&HARMLESS[..], &MARKS].concat();

        let section = fields.section("vision_config", &[])?;
        let vision = TowerConfig::read(&section, &DEFAULTS)?;
        section.only("num_channels", 3)?;
        section.only("vision_use_head", true)?;
        let (image_size, patch_size) =
            (section.size("image_size", 224)?, section.size("patch_size", 16)?);
        if patch_size > image_size {
            let smaller = format!("at most image_size {image_size}");
            return Err(section.unsupported("patch_size", smaller));
        }
        section.finish(&harmless)?;

        let section = fields.section("text_config", &[])?;
        let text = TowerConfig::read(&section, &DEFAULTS)?;
        let projection_dim = section.size("projection_size", text.width)?;
        if projection_dim != vision.width {
            let shared = format!("the vision tower's hidden_size {}", vision.width);
            return Err(section.unsupported("projection_size", shared));
        }
        let config = Self {
            image_size,
            patch_size,
            projection_dim,
            vocab_size: section.size("vocab_size", 32_000)?,
            max_position_embeddings: section.size("max_position_embeddings", 64)?,
            text,
            vision,
        };
        section.finish(&harmless)?;
        fields.finish(&HARMLESS)?;
        Ok(config)
    }

    /// Patches along one side. Pixels beyond the last whole patch are not seen.
    pub(super) fn grid(&self) -> usize {
        self.image_size / self.patch_size
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::layers::Activation;
    use serde_json::{Value, json};

    fn read(config: &Value) -> Result<SiglipConfig> {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), config.to_string()).unwrap();
        SiglipConfig::read(file.path())
    }

    /// The shape of the published files, large and base: most fields are left to the defaults.
    #[test]
    fn published_models() {
        let base = json!({
            "architectures": ["SiglipModel"], "initializer_factor": 1.0, "model_type": "siglip",
            "text_config": {"model_type": "siglip_text_model"}, "torch_dtype": "float32",
            "transformers_version": "4.37.0.dev0", "vision_config": {"model_type": "siglip_vision_model"},
        });
        let config = read(&base).unwrap();
        assert_eq!((config.image_size, config.patch_size, config.grid()), (224, 16, 14));
        assert_eq!((config.vocab_size, config.max_position_embeddings), (32_000, 64));
        assert_eq!(config.text.activation, Activation::GeluTanh);

        let mut large = base.clone();
        large["text_config"] = json!({
            "hidden_size": 1152, "intermediate_size": 4304, "model_type": "siglip_text_model",
            "num_attention_heads": 16, "num_hidden_layers": 27,
        });
        large["vision_config"] = json!({
            "hidden_size": 1152, "image_size": 384, "intermediate_size": 4304,
            "model_type": "siglip_vision_model", "num_attention_heads": 16, "num_hidden_layers": 27,
            "patch_size": 14,
        });
        let config = read(&large).unwrap();
        assert_eq!((config.projection_dim, config.grid(), config.vision.layers), (1152, 27, 27));

        let mut uneven = large;
        uneven["text_config"]["hidden_size"] = json!(768);
        let message = read(&uneven).unwrap_err().to_string();
        assert!(message.contains("text_config.projection_size"), "{message}");
    }
}
