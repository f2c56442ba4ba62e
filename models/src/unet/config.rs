//! `config.json` of diffusers' `UNet2DConditionModel`. Absent fields have diffusers' defaults.

use std::path::Path;

use serde_json::Value;

use crate::Result;
use crate::config::ConfigFile;
use crate::resnet::ResnetConfig;
use crate::time::Waves;

/// Fields that change nothing in inference in f32, or only belong to features that are refused by name.
const HARMLESS: [&str; 3] = ["addition_embed_type_num_heads", "dropout", "upcast_attention"];
/// Fields that must be absent or null.
const ABSENT: [&str; 14] = [
    "addition_time_embed_dim",
    "class_embed_type",
    "cross_attention_norm",
    "encoder_hid_dim",
    "encoder_hid_dim_type",
    "num_attention_heads",
    "num_class_embeds",
    "projection_class_embeddings_input_dim",
    "reverse_transformer_layers_per_block",
    "time_cond_proj_dim",
    "time_embedding_act_fn",
    "timestep_post_act",
    "mid_block_only_cross_attention",
    "class_embeddings_concat",
];

/// One resolution of the UNet.
#[derive(Debug, Clone, PartialEq)]
pub struct UNetLevel {
    /// Channels at this resolution.
    pub channels: usize,
    /// Residual blocks on the way down; on the way up there is one more.
    pub layers: usize,
    /// Whether transformers follow the residual blocks on the way down.
    pub attends_down: bool,
    /// The same on the way up.
    pub attends_up: bool,
    /// Attention heads. diffusers calls this `attention_head_dim`, by an old mistake that every
    /// checkpoint relies on.
    pub heads: usize,
    /// Transformer blocks after each residual block.
    pub transformer_layers: usize,
    /// Width of the text states.
    pub cross_attention_dim: usize,
}

/// The sizes of a UNet.
#[derive(Debug, Clone, PartialEq)]
pub struct UNet2DConditionConfig {
    /// Channels of the input: those of the latent, more for inpainting.
    pub in_channels: usize,
    /// Channels of the prediction.
    pub out_channels: usize,
    /// Height and width of the latent the model was trained on, if the configuration says.
    pub sample_size: Option<[usize; 2]>,
    /// The resolutions, from the input down.
    pub levels: Vec<UNetLevel>,
    /// Groups of every norm.
    pub norm_num_groups: usize,
    /// Epsilon of the norms in and after the residual blocks.
    pub norm_eps: f64,
    /// Whether transformers project with linear layers, as version 2 does, or with 1 x 1 convolutions.
    pub use_linear_projection: bool,
    /// Whether the time embedding has its cosines first.
    pub flip_sin_to_cos: bool,
    /// Shift of the time embedding's frequencies.
    pub freq_shift: f64,
    /// Width of the time embedding after its two layers.
    pub time_embedding_dim: usize,
}

impl UNet2DConditionConfig {
    pub(super) fn read(path: &Path) -> Result<Self> {
        let fields = ConfigFile::read(path)?;
        refuse_unsupported(&fields)?;
        let levels = levels(&fields)?;
        let first = levels[0].channels;
        let config = Self {
            in_channels: fields.size("in_channels", 4)?,
            out_channels: fields.size("out_channels", 4)?,
            sample_size: match fields.get("sample_size") {
                None => None,
                Some(_) => {
                    let sides = fields.sizes("sample_size", 2, 1)?;
                    Some([sides[0], sides[1]])
                }
            },
            levels,
            norm_num_groups: fields.size("norm_num_groups", 32)?,
            norm_eps: fields.positive("norm_eps", 1e-5)?,
            use_linear_projection: fields.flag("use_linear_projection", false)?,
            flip_sin_to_cos: fields.flag("flip_sin_to_cos", true)?,
            freq_shift: fields.number("freq_shift", 0.0)?,
            time_embedding_dim: fields.size("time_embedding_dim", 4 * first)?,
        };
        let groups = config.norm_num_groups;
        if config.levels.iter().any(|level| level.channels % groups != 0) {
            let wanted = format!("multiples of norm_num_groups {groups}");
            return Err(fields.unsupported("block_out_channels", wanted));
        }
        if (first / 2) as f64 == config.freq_shift {
            return Err(fields.unsupported("freq_shift", "less than half of the first channels"));
        }
        fields.finish(&HARMLESS)?;
        Ok(config)
    }

    /// How time steps become numbers.
    pub(super) fn waves(&self) -> Waves {
        Waves {
            width: self.levels[0].channels,
            flip_sin_to_cos: self.flip_sin_to_cos,
            freq_shift: self.freq_shift as f32,
        }
    }

    /// The level at the bottom of the U.
    pub(super) fn deepest(&self) -> &UNetLevel {
        self.levels.last().expect("a parsed list is not empty")
    }

    pub(super) fn resnet(&self, c_in: usize, c_out: usize) -> ResnetConfig {
        let (groups, eps) = (self.norm_num_groups, self.norm_eps);
        ResnetConfig { c_in, c_out, groups, eps, time: Some(self.time_embedding_dim) }
    }
}

fn refuse_unsupported(fields: &ConfigFile) -> Result<()> {
    fields.only("_class_name", "UNet2DConditionModel")?;
    if fields.get("addition_embed_type").is_some() {
        let supported = "null: Stable Diffusion 1 and 2; the pooled text and size conditions of \
                         Stable Diffusion XL are not built yet";
        return Err(fields.unsupported("addition_embed_type", supported));
    }
    for field in ABSENT {
        if fields.get(field).is_some_and(|value| *value != Value::Bool(false)) {
            return Err(fields.unsupported(field, "null"));
        }
    }
    fields.choice("act_fn", &["silu", "swish"])?;
    fields.choice("mid_block_type", &["UNetMidBlock2DCrossAttn"])?;
    fields.choice("resnet_time_scale_shift", &["default"])?;
    fields.choice("time_embedding_type", &["positional"])?;
    fields.choice("attention_type", &["default"])?;
    for (field, supported) in [
        ("center_input_sample", Value::from(false)),
        ("dual_cross_attention", false.into()),
        ("only_cross_attention", false.into()),
        ("resnet_skip_time_act", false.into()),
        ("conv_in_kernel", 3.into()),
        ("conv_out_kernel", 3.into()),
        ("downsample_padding", 1.into()),
        ("mid_block_scale_factor", 1.into()),
        ("resnet_out_scale_factor", 1.into()),
    ] {
        fields.only(field, supported)?;
    }
    Ok(())
}

fn levels(fields: &ConfigFile) -> Result<Vec<UNetLevel>> {
    let channels = fields.size_list("block_out_channels", &[320, 640, 1280, 1280])?;
    let n = channels.len();
    let layers = fields.sizes("layers_per_block", n, 2)?;
    let heads = fields.sizes("attention_head_dim", n, 8)?;
    let depth = fields.sizes("transformer_layers_per_block", n, 1)?;
    let context = fields.sizes("cross_attention_dim", n, 1280)?;
    if context.iter().any(|&width| width != context[0]) {
        return Err(fields.unsupported("cross_attention_dim", "one width for all levels"));
    }
    let attends = |field, plain: &'static str, cross: &'static str, default: &[&'static str]| {
        let kinds = fields.choice_list(field, &[plain, cross], default)?;
        if kinds.len() == n {
            return Ok(kinds.into_iter().map(|kind| kind == cross).collect::<Vec<_>>());
        }
        Err(fields.unsupported(field, format!("{n} blocks, as many as block_out_channels")))
    };
    let (down, cross_down) = ("DownBlock2D", "CrossAttnDownBlock2D");
    let (up, cross_up) = ("UpBlock2D", "CrossAttnUpBlock2D");
    let attends_down =
        attends("down_block_types", down, cross_down, &[cross_down, cross_down, cross_down, down])?;
    let attends_up = attends("up_block_types", up, cross_up, &[up, cross_up, cross_up, cross_up])?;
    if let Some(i) = (0..n).find(|&i| channels[i] % heads[i] != 0) {
        let wanted = format!("a divisor of the {} channels of level {i}", channels[i]);
        return Err(fields.unsupported("attention_head_dim", wanted));
    }
    Ok((0..n)
        .map(|i| UNetLevel {
            channels: channels[i],
            layers: layers[i],
            attends_down: attends_down[i],
            attends_up: attends_up[n - 1 - i],
            heads: heads[i],
            transformer_layers: depth[i],
            cross_attention_dim: context[i],
        })
        .collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn read(config: &Value) -> Result<UNet2DConditionConfig> {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), config.to_string()).unwrap();
        UNet2DConditionConfig::read(file.path())
    }

    /// `unet/config.json` of Stable Diffusion 1.5, what 2.1 says besides, and XL.
    #[test]
    fn the_published_unets() {
        let mut config = json!({
            "_class_name": "UNet2DConditionModel", "_diffusers_version": "0.6.0", "act_fn": "silu",
            "attention_head_dim": 8, "block_out_channels": [320, 640, 1280, 1280],
            "center_input_sample": false, "cross_attention_dim": 768,
            "down_block_types": ["CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"],
            "downsample_padding": 1, "flip_sin_to_cos": true, "freq_shift": 0, "in_channels": 4,
            "layers_per_block": 2, "mid_block_scale_factor": 1, "norm_eps": 1e-05,
            "norm_num_groups": 32, "out_channels": 4, "sample_size": 64,
            "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"],
        });
        let sd15 = read(&config).unwrap();
        let attends = |level: &UNetLevel| (level.attends_down, level.attends_up, level.heads);
        assert_eq!(
            sd15.levels.iter().map(attends).collect::<Vec<_>>()[2..],
            [(true, true, 8), (false, false, 8)]
        );
        assert_eq!((sd15.time_embedding_dim, sd15.sample_size), (1280, Some([64; 2])));
        config["sample_size"] = json!([8, 12]);
        assert_eq!(read(&config).unwrap().sample_size, Some([8, 12]), "height, then width");
        for wrong in [json!("64"), json!(true), json!([8]), json!([8, 12, 3]), json!({"height": 8})]
        {
            config["sample_size"] = wrong;
            let message = read(&config).unwrap_err().to_string();
            assert!(message.contains("sample_size is "), "{message}");
        }
        config["sample_size"] = json!(64);

        for (field, value) in [
            ("attention_head_dim", json!([5, 10, 20, 20])),
            ("cross_attention_dim", json!(1024)),
            ("dual_cross_attention", json!(false)),
            ("num_class_embeds", json!(null)),
            ("only_cross_attention", json!(false)),
            ("upcast_attention", json!(true)),
            ("use_linear_projection", json!(true)),
        ] {
            config[field] = value;
        }
        let sd21 = read(&config).unwrap();
        assert_eq!(
            sd21.levels.iter().map(|level| level.heads).collect::<Vec<_>>(),
            [5, 10, 20, 20]
        );
        assert!(sd21.use_linear_projection);

        config["addition_embed_type"] = json!("text_time");
        config["addition_time_embed_dim"] = json!(256);
        let message = read(&config).unwrap_err().to_string();
        assert!(message.contains("addition_embed_type is \"text_time\""), "{message}");
    }
}
