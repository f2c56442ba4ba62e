//! The decoder: latents to pixels, with the gradient back to the latents.

use candle_core::Tensor;

use super::config::{AutoencoderKlConfig, EPS};
use super::mid::MidBlock;
use crate::layers::{Conv2d, GroupNorm, UpsampleNearest2x};
use crate::resnet::ResnetBlock;
use crate::weights::Scope;
use crate::{Result, Tape};

/// `[b, latent_channels, h, w]` -> `[b, 3, f h, f w]`.
#[derive(Debug)]
pub(super) struct Decoder {
    conv_in: Conv2d,
    mid: MidBlock,
    blocks: Vec<UpBlock>,
    norm_out: GroupNorm,
    conv_out: Conv2d,
}

/// Residual blocks of one resolution, then twice the resolution except at the last.
#[derive(Debug)]
struct UpBlock {
    resnets: Vec<ResnetBlock>,
    upsampler: Option<Conv2d>,
}

impl Decoder {
    pub(super) fn new(scope: &Scope<'_>, config: &AutoencoderKlConfig) -> Result<Self> {
        let mut blocks = Vec::new();
        let mut c_in = config.deepest();
        for (i, &channels) in config.block_out_channels.iter().rev().enumerate() {
            let block = scope.at("up_blocks").at(i);
            let resnets = (0..=config.layers_per_block).map(|j| {
                let from = if j == 0 { c_in } else { channels };
                ResnetBlock::new(&block.at("resnets").at(j), config.resnet(from, channels))
            });
            let resnets = resnets.collect::<Result<_>>()?;
            let last = i + 1 == config.block_out_channels.len();
            let upsampler =
                (!last).then(|| block.at("upsamplers").at(0).conv3x3("conv", channels, channels));
            blocks.push(UpBlock { resnets, upsampler: upsampler.transpose()? });
            c_in = channels;
        }
        let norm_out = scope.group_norm("conv_norm_out", c_in, config.norm_num_groups, EPS)?;
        Ok(Self {
            conv_in: scope.conv3x3("conv_in", config.latent_channels, config.deepest())?,
            mid: MidBlock::new(&scope.at("mid_block"), config)?,
            blocks,
            norm_out: norm_out.with_silu(),
            conv_out: scope.conv3x3("conv_out", c_in, 3)?,
        })
    }

    pub(super) fn forward(&self, z: &Tensor, tape: &mut Tape) -> Result<Tensor> {
        let x = self.mid.forward(&self.conv_in.forward(z, tape)?, tape)?;
        let x = self.blocks.iter().try_fold(x, |x, block| block.forward(&x, tape))?;
        self.conv_out.forward(&self.norm_out.forward(&x, tape)?, tape)
    }

    pub(super) fn backward(&self, dy: &Tensor, tape: &mut Tape) -> Result<Tensor> {
        let d = self.norm_out.backward(&self.conv_out.backward(dy, tape)?, tape)?;
        let d = self.blocks.iter().rev().try_fold(d, |d, block| block.backward(&d, tape))?;
        self.conv_in.backward(&self.mid.backward(&d, tape)?, tape)
    }
}

impl UpBlock {
    fn forward(&self, x: &Tensor, tape: &mut Tape) -> Result<Tensor> {
        let x = self.resnets.iter().try_fold(x.clone(), |x, r| r.forward(&x, None, tape))?;
        match &self.upsampler {
            Some(conv) => conv.forward(&UpsampleNearest2x.forward(&x, tape)?, tape),
            None => Ok(x),
        }
    }

    fn backward(&self, dy: &Tensor, tape: &mut Tape) -> Result<Tensor> {
        let d = match &self.upsampler {
            Some(conv) => UpsampleNearest2x.backward(&conv.backward(dy, tape)?, tape)?,
            None => dy.clone(),
        };
        self.resnets.iter().rev().try_fold(d, |d, r| r.backward(&d, tape))
    }
}
