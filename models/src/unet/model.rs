//! The denoiser.

use candle_core::{Device, Tensor};

use super::blocks::{Conditions, DownBlock, MidBlock, UpBlock, add_skip};
use super::config::UNet2DConditionConfig;
use crate::layers::{Activation, Conv2d, GroupNorm};
use crate::time::TimeEmbedding;
use crate::{Error, ModelFolder, Result, Tape, weights};

/// diffusers' `UNet2DConditionModel` of Stable Diffusion 1 and 2.
///
/// Sampling runs it forward only. Its input gradient is here because it proves every layer inside.
#[derive(Debug)]
pub struct UNet2DConditionModel {
    config: UNet2DConditionConfig,
    time: TimeEmbedding,
    conv_in: Conv2d,
    down: Vec<DownBlock>,
    mid: MidBlock,
    /// From the bottom up.
    up: Vec<UpBlock>,
    norm_out: GroupNorm,
    conv_out: Conv2d,
}

impl UNet2DConditionModel {
    /// Reads a diffusers folder: `config.json` and `diffusion_pytorch_model.safetensors` (or its shards).
    ///
    /// # Errors
    /// When a file is missing or malformed, a setting is not supported, or the weights do not fit it.
    pub fn load(dir: impl Into<ModelFolder>, device: &Device) -> Result<Self> {
        let folder = dir.into();
        let config = UNet2DConditionConfig::read(&folder.file("config.json"))?;
        let (levels, first) = (config.levels.len(), config.levels[0].channels);
        weights::load(&folder, "diffusion_pytorch_model", device, |root| {
            let down = (0..levels).map(|i| {
                let c_in = config.levels[i.saturating_sub(1)].channels;
                DownBlock::new(&root.at("down_blocks").at(i), &config, i, c_in)
            });
            let up = (0..levels)
                .map(|i| UpBlock::new(&root.at("up_blocks").at(i), &config, levels - 1 - i));
            let (groups, eps) = (config.norm_num_groups, config.norm_eps);
            Ok(Self {
                time: TimeEmbedding::new(
                    &root.at("time_embedding"),
                    config.waves(),
                    config.time_embedding_dim,
                )?,
                conv_in: root.conv3x3("conv_in", config.in_channels, first)?,
                down: down.collect::<Result<_>>()?,
                mid: MidBlock::new(&root.at("mid_block"), &config)?,
                up: up.collect::<Result<_>>()?,
                norm_out: root.group_norm("conv_norm_out", first, groups, eps)?.with_silu(),
                conv_out: root.conv3x3("conv_out", first, config.out_channels)?,
                config,
            })
        })
    }

    /// What `config.json` says.
    pub fn config(&self) -> &UNet2DConditionConfig {
        &self.config
    }

    /// The prediction `[b, out_channels, h, w]` for latents `x` `[b, in_channels, h, w]`, one time step
    /// each, and text states `context` `[b, n, cross_attention_dim]`. Any size is taken, odd ones too.
    ///
    /// # Errors
    /// When the shapes do not fit one another or the configuration.
    pub fn forward(
        &self,
        x: &Tensor,
        timesteps: &[f32],
        context: &Tensor,
        tape: &mut Tape,
    ) -> Result<Tensor> {
        self.check(x, timesteps, context)?;
        // Every residual block applies the same SiLU first.
        let time = self.time.forward(timesteps, x)?;
        let time = Activation::Silu.forward(&time, &mut Tape::off())?;
        let on = Conditions { time: &time, context };
        let mut x = self.conv_in.forward(x, tape)?;
        let mut skips = vec![x.clone()];
        for block in &self.down {
            x = block.forward(x, &on, &mut skips, tape)?;
        }
        x = self.mid.forward(&x, &on, tape)?;
        for block in &self.up {
            x = block.forward(x, &on, &mut skips, tape)?;
        }
        self.conv_out.forward(&self.norm_out.forward(&x, tape)?, tape)
    }

    /// The gradient with respect to the latents, from that with respect to the prediction.
    ///
    /// # Errors
    /// When the tape is empty or `dy` is not of the shape of the output.
    pub fn backward(&self, dy: &Tensor, tape: &mut Tape) -> Result<Tensor> {
        let mut d = self.norm_out.backward(&self.conv_out.backward(dy, tape)?, tape)?;
        let mut skips = Vec::new();
        for block in self.up.iter().rev() {
            d = block.backward(d, &mut skips, tape)?;
        }
        d = self.mid.backward(&d, tape)?;
        for block in self.down.iter().rev() {
            d = block.backward(d, &mut skips, tape)?;
        }
        self.conv_in.backward(&add_skip(d, &mut skips)?, tape)
    }

    fn check(&self, x: &Tensor, timesteps: &[f32], context: &Tensor) -> Result<()> {
        let (channels, text) = (self.config.in_channels, self.config.deepest().cross_attention_dim);
        let b = timesteps.len();
        let latents = matches!(x.dims(), [n, c, h, w] if *n == b && *c == channels && h * w > 0);
        let states = matches!(context.dims(), [n, m, d] if *n == b && *m > 0 && *d == text);
        if b > 0 && latents && states {
            return Ok(());
        }
        let (x, context) = (x.dims(), context.dims());
        let problem = format!(
            "expected latents [b, {channels}, h, w], b time steps and text [b, n, {text}], \
             got {x:?}, {b} and {context:?}"
        );
        Err(Error::invalid("UNet2DConditionModel::forward", problem))
    }
}
