//! `config.json` of diffusers' `SD3Transformer2DModel`. Absent fields have diffusers' defaults.

use std::path::Path;

use serde_json::Value;

use crate::Result;
use crate::config::ConfigFile;

/// The sizes of the transformer.
#[derive(Debug, Clone, PartialEq)]
pub struct Sd3TransformerConfig {
    /// Side of the latent the model was trained on.
    pub sample_size: usize,
    /// Side of the square of latent pixels that is one token.
    pub patch_size: usize,
    /// Channels of the latent.
    pub in_channels: usize,
    /// Channels of the prediction.
    pub out_channels: usize,
    /// Number of blocks.
    pub num_layers: usize,
    /// Attention heads.
    pub heads: usize,
    /// Width of a head.
    pub head_dim: usize,
    /// Width of the text states.
    pub joint_attention_dim: usize,
    /// Width of the pooled text.
    pub pooled_projection_dim: usize,
    /// The most patches along a side.
    pub pos_embed_max_size: usize,
    /// Blocks in which image tokens also attend among themselves alone, as in 3.5 medium.
    pub dual_attention_layers: Vec<usize>,
    /// Whether queries and keys are normalised, as in 3.5.
    pub qk_norm: bool,
}

impl Sd3TransformerConfig {
    pub(super) fn read(path: &Path) -> Result<Self> {
        let fields = ConfigFile::read(path)?;
        fields.only("_class_name", "SD3Transformer2DModel")?;
        let num_layers = fields.size("num_layers", 18)?;
        let in_channels = fields.size("in_channels", 16)?;
        let config = Self {
            sample_size: fields.size("sample_size", 128)?,
            patch_size: fields.size("patch_size", 2)?,
            in_channels,
            out_channels: match fields.get("out_channels") {
                None => in_channels,
                Some(_) => fields.size("out_channels", in_channels)?,
            },
            num_layers,
            heads: fields.size("num_attention_heads", 18)?,
            head_dim: fields.size("attention_head_dim", 64)?,
            joint_attention_dim: fields.size("joint_attention_dim", 4096)?,
            pooled_projection_dim: fields.size("pooled_projection_dim", 2048)?,
            pos_embed_max_size: fields.size("pos_embed_max_size", 96)?,
            dual_attention_layers: fields.indices("dual_attention_layers", num_layers)?,
            qk_norm: match fields.get("qk_norm") {
                None => false,
                Some(Value::String(kind)) if kind == "rms_norm" => true,
                Some(_) => return Err(fields.unsupported("qk_norm", "\"rms_norm\" or null")),
            },
        };
        if fields.size("caption_projection_dim", 1152)? != config.width() {
            let wanted = format!(
                "{}, num_attention_heads times attention_head_dim: text and image tokens share one \
                 width",
                config.width()
            );
            return Err(fields.unsupported("caption_projection_dim", wanted));
        }
        fields.finish(&[])?;
        Ok(config)
    }

    /// Width of a token.
    pub fn width(&self) -> usize {
        self.heads * self.head_dim
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn read(config: &Value) -> Result<Sd3TransformerConfig> {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), config.to_string()).unwrap();
        Sd3TransformerConfig::read(file.path())
    }

    /// `transformer/config.json` of Stable Diffusion 3 medium and of 3.5 medium.
    #[test]
    fn published_models() {
        let mut config = json!({
            "_class_name": "SD3Transformer2DModel", "_diffusers_version": "0.29.0.dev0",
            "attention_head_dim": 64, "caption_projection_dim": 1536, "in_channels": 16,
            "joint_attention_dim": 4096, "num_attention_heads": 24, "num_layers": 24,
            "out_channels": 16, "patch_size": 2, "pooled_projection_dim": 2048,
            "pos_embed_max_size": 192, "sample_size": 128,
        });
        let medium = read(&config).unwrap();
        assert_eq!((medium.width(), medium.qk_norm), (1536, false));
        assert!(medium.dual_attention_layers.is_empty());

        config["qk_norm"] = json!("rms_norm");
        config["pos_embed_max_size"] = json!(384);
        config["dual_attention_layers"] = json!([0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12]);
        let newer = read(&config).unwrap();
        assert_eq!((newer.dual_attention_layers.len(), newer.qk_norm), (13, true));

        for (field, value, said) in [
            ("qk_norm", json!("layer_norm"), "supported: \"rms_norm\" or null"),
            ("dual_attention_layers", json!([24]), "whole numbers below 24"),
            ("dual_attention_layers", json!([1, 1]), "different whole numbers"),
            ("caption_projection_dim", json!(1152), "supported: 1536"),
            ("rope_axes", json!([1, 2]), "unknown field rope_axes"),
        ] {
            let mut other = config.clone();
            other[field] = value;
            let message = read(&other).unwrap_err().to_string();
            assert!(message.contains(said), "{message}");
        }
    }
}
