//! `config.json` of diffusers' `AutoencoderKL`. Absent fields have diffusers' defaults.

use std::path::Path;

use crate::Result;
use crate::config::ConfigFile;
use crate::resnet::ResnetConfig;

/// Fields that change nothing here: everything is computed in f32 whatever `force_upcast` says, and any size
/// is taken.
const HARMLESS: [&str; 2] = ["force_upcast", "sample_size"];

/// The sizes of an autoencoder.
#[derive(Debug, Clone, PartialEq)]
pub struct AutoencoderKlConfig {
    /// Channels at each resolution, from pixels down to latents.
    pub block_out_channels: Vec<usize>,
    /// Residual blocks per resolution in the encoder; the decoder has one more.
    pub layers_per_block: usize,
    /// Channels of a latent.
    pub latent_channels: usize,
    /// Groups of every norm.
    pub norm_num_groups: usize,
    /// The sampler's latent is `(mean - shift_factor) * scaling_factor`.
    pub scaling_factor: f64,
    /// See `scaling_factor`; 0 when the configuration has none.
    pub shift_factor: f64,
    /// Whether a 1 x 1 convolution follows the encoder.
    pub use_quant_conv: bool,
    /// Whether a 1 x 1 convolution precedes the decoder.
    pub use_post_quant_conv: bool,
    /// Whether the middle blocks have self-attention.
    pub mid_block_add_attention: bool,
}

impl AutoencoderKlConfig {
    pub(super) fn read(path: &Path) -> Result<Self> {
        let fields = ConfigFile::read(path)?;
        fields.only("_class_name", "AutoencoderKL")?;
        fields.only("in_channels", 3)?;
        fields.only("out_channels", 3)?;
        fields.choice("act_fn", &["silu", "swish"])?;
        let config = Self {
            block_out_channels: fields.size_list("block_out_channels", &[64])?,
            layers_per_block: fields.size("layers_per_block", 1)?,
            latent_channels: fields.size("latent_channels", 4)?,
            norm_num_groups: fields.size("norm_num_groups", 32)?,
            scaling_factor: fields.positive("scaling_factor", 0.18215)?,
            shift_factor: fields.number("shift_factor", 0.0)?,
            use_quant_conv: fields.flag("use_quant_conv", true)?,
            use_post_quant_conv: fields.flag("use_post_quant_conv", true)?,
            mid_block_add_attention: fields.flag("mid_block_add_attention", true)?,
        };
        for (field, block) in
            [("down_block_types", "DownEncoderBlock2D"), ("up_block_types", "UpDecoderBlock2D")]
        {
            let levels = config.block_out_channels.len();
            let blocks = fields.choice_list(field, &[block], &vec![block; levels])?;
            if blocks.len() != levels {
                let wanted = format!("{levels} blocks, as many as block_out_channels has entries");
                return Err(fields.unsupported(field, wanted));
            }
        }
        let groups = config.norm_num_groups;
        if config.block_out_channels.iter().any(|c| c % groups != 0) {
            let wanted = format!("multiples of norm_num_groups {groups}");
            return Err(fields.unsupported("block_out_channels", wanted));
        }
        fields.only("latents_mean", serde_json::Value::Null)?;
        fields.only("latents_std", serde_json::Value::Null)?;
        fields.finish(&HARMLESS)?;
        Ok(config)
    }

    /// Channels next to the latent.
    pub(super) fn deepest(&self) -> usize {
        *self.block_out_channels.last().expect("a parsed list is not empty")
    }

    pub(super) fn resnet(&self, c_in: usize, c_out: usize) -> ResnetConfig {
        ResnetConfig { c_in, c_out, groups: self.norm_num_groups, eps: EPS, time: None }
    }
}

/// Epsilon of every norm in the autoencoder; diffusers does not make it a setting.
pub(super) const EPS: f64 = 1e-6;

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};

    fn read(config: &Value) -> AutoencoderKlConfig {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), config.to_string()).unwrap();
        AutoencoderKlConfig::read(file.path()).unwrap()
    }

    /// `vae/config.json` of Stable Diffusion 1.5, and what XL and 3 say besides.
    #[test]
    fn the_published_autoencoders() {
        let mut config = json!({
            "_class_name": "AutoencoderKL", "_diffusers_version": "0.6.0", "act_fn": "silu",
            "block_out_channels": [128, 256, 512, 512],
            "down_block_types": ["DownEncoderBlock2D", "DownEncoderBlock2D", "DownEncoderBlock2D", "DownEncoderBlock2D"],
            "in_channels": 3, "latent_channels": 4, "layers_per_block": 2, "norm_num_groups": 32,
            "out_channels": 3, "sample_size": 512,
            "up_block_types": ["UpDecoderBlock2D", "UpDecoderBlock2D", "UpDecoderBlock2D", "UpDecoderBlock2D"],
        });
        let sd15 = read(&config);
        assert_eq!((sd15.scaling_factor, sd15.shift_factor), (0.18215, 0.0));
        assert!(sd15.use_quant_conv && sd15.mid_block_add_attention);

        for (field, value) in [
            ("scaling_factor", json!(0.13025)),
            ("force_upcast", json!(true)),
            ("latents_mean", json!(null)),
            ("latents_std", json!(null)),
        ] {
            config[field] = value;
        }
        assert_eq!(read(&config).scaling_factor, 0.13025);

        config["latent_channels"] = json!(16);
        config["shift_factor"] = json!(0.0609);
        config["use_quant_conv"] = json!(false);
        let sd3 = read(&config);
        assert_eq!((sd3.latent_channels, sd3.shift_factor), (16, 0.0609));
        assert!(!sd3.use_quant_conv && sd3.use_post_quant_conv);
    }
}
