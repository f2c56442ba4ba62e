//! The encoder: pixels to latents. Nothing is differentiated through it.

use candle_core::Tensor;

use super::config::{AutoencoderKlConfig, EPS};
use super::mid::MidBlock;
use crate::layers::{Conv2d, Conv2dConfig, GroupNorm, Padding};
use crate::resnet::ResnetBlock;
use crate::weights::Scope;
use crate::{Result, Tape};

/// diffusers pads below and to the right only before it halves the size.
const HALVE: Conv2dConfig = Conv2dConfig { stride: 2, padding: Padding::BottomRight(1) };

/// `[b, 3, f h, f w]` -> means and log-variances `[b, 2 latent_channels, h, w]`.
#[derive(Debug)]
pub(super) struct Encoder {
    conv_in: Conv2d,
    blocks: Vec<(Vec<ResnetBlock>, Option<Conv2d>)>,
    mid: MidBlock,
    norm_out: GroupNorm,
    conv_out: Conv2d,
}

impl Encoder {
    pub(super) fn new(scope: &Scope<'_>, config: &AutoencoderKlConfig) -> Result<Self> {
        let mut blocks = Vec::new();
        let mut c_in = config.block_out_channels[0];
        for (i, &channels) in config.block_out_channels.iter().enumerate() {
            let block = scope.at("down_blocks").at(i);
            let resnets = (0..config.layers_per_block).map(|j| {
                let from = if j == 0 { c_in } else { channels };
                ResnetBlock::new(&block.at("resnets").at(j), config.resnet(from, channels))
            });
            let resnets = resnets.collect::<Result<_>>()?;
            let last = i + 1 == config.block_out_channels.len();
            let sampler = block.at("downsamplers").at(0);
            let sampler = (!last).then(|| sampler.conv("conv", [channels, channels, 3], HALVE));
            blocks.push((resnets, sampler.transpose()?));
            c_in = channels;
        }
        let norm_out = scope.group_norm("conv_norm_out", c_in, config.norm_num_groups, EPS)?;
        Ok(Self {
            conv_in: scope.conv3x3("conv_in", 3, config.block_out_channels[0])?,
            blocks,
            mid: MidBlock::new(&scope.at("mid_block"), config)?,
            norm_out: norm_out.with_silu(),
            conv_out: scope.conv3x3("conv_out", c_in, 2 * config.latent_channels)?,
        })
    }

    pub(super) fn forward(&self, pixels: &Tensor) -> Result<Tensor> {
        let tape = &mut Tape::off();
        let mut x = self.conv_in.forward(pixels, tape)?;
        for (resnets, downsampler) in &self.blocks {
            x = resnets.iter().try_fold(x, |x, resnet| resnet.forward(&x, None, tape))?;
            if let Some(conv) = downsampler {
                x = conv.forward(&x, tape)?;
            }
        }
        let x = self.norm_out.forward(&self.mid.forward(&x, tape)?, tape)?;
        self.conv_out.forward(&x, tape)
    }
}
