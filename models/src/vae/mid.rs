//! The block between encoder or decoder and the latent (`UNetMidBlock2D`).

use candle_core::Tensor;

use super::attention::PixelAttention;
use super::config::AutoencoderKlConfig;
use crate::resnet::ResnetBlock;
use crate::weights::Scope;
use crate::{Result, Tape};

/// A residual block, self-attention if the configuration has it, a residual block.
#[derive(Debug)]
pub(super) struct MidBlock {
    first: ResnetBlock,
    attention: Option<PixelAttention>,
    second: ResnetBlock,
}

impl MidBlock {
    pub(super) fn new(scope: &Scope<'_>, config: &AutoencoderKlConfig) -> Result<Self> {
        let (channels, resnets) = (config.deepest(), scope.at("resnets"));
        let attention = config.mid_block_add_attention.then(|| {
            PixelAttention::new(&scope.at("attentions").at(0), channels, config.norm_num_groups)
        });
        Ok(Self {
            first: ResnetBlock::new(&resnets.at(0), config.resnet(channels, channels))?,
            attention: attention.transpose()?,
            second: ResnetBlock::new(&resnets.at(1), config.resnet(channels, channels))?,
        })
    }

    pub(super) fn forward(&self, x: &Tensor, tape: &mut Tape) -> Result<Tensor> {
        let mut x = self.first.forward(x, None, tape)?;
        if let Some(attention) = &self.attention {
            x = attention.forward(&x, tape)?;
        }
        self.second.forward(&x, None, tape)
    }

    pub(super) fn backward(&self, dy: &Tensor, tape: &mut Tape) -> Result<Tensor> {
        let mut d = self.second.backward(dy, tape)?;
        if let Some(attention) = &self.attention {
            d = attention.backward(&d, tape)?;
        }
        self.first.backward(&d, tape)
    }
}
