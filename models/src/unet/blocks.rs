//! The levels of the U: down, bottom and up.

use candle_core::Tensor;

use super::config::{UNet2DConditionConfig, UNetLevel};
use super::transformer::Transformer;
use crate::layers::{
    Conv2d, Conv2dConfig, Padding, UpsampleNearest2x, add, concat_channels, split_channels,
};
use crate::resnet::ResnetBlock;
use crate::weights::Scope;
use crate::{Result, Tape};

const HALVE: Conv2dConfig = Conv2dConfig { stride: 2, padding: Padding::Symmetric(1) };

/// What every block is conditioned on.
pub(super) struct Conditions<'a> {
    /// The time embedding, `[b, width]`.
    pub(super) time: &'a Tensor,
    /// The text, `[b, n, cross_attention_dim]`.
    pub(super) context: &'a Tensor,
}

/// A residual block and the transformer that may follow it.
#[derive(Debug)]
struct Layer {
    resnet: ResnetBlock,
    transformer: Option<Transformer>,
}

impl Layer {
    /// The `i`-th layer of `scope`, from `c_in` channels to those of `level`.
    fn new(
        scope: &Scope<'_>,
        config: &UNet2DConditionConfig,
        level: &UNetLevel,
        (i, c_in, attends): (usize, usize, bool),
    ) -> Result<Self> {
        let resnet = config.resnet(c_in, level.channels);
        let (groups, linear) = (config.norm_num_groups, config.use_linear_projection);
        let transformer = attends
            .then(|| Transformer::new(&scope.at("attentions").at(i), level, groups, linear))
            .transpose()?;
        Ok(Self { resnet: ResnetBlock::new(&scope.at("resnets").at(i), resnet)?, transformer })
    }

    fn forward(&self, x: &Tensor, on: &Conditions<'_>, tape: &mut Tape) -> Result<Tensor> {
        let x = self.resnet.forward(x, Some(on.time), tape)?;
        match &self.transformer {
            Some(transformer) => transformer.forward(&x, on.context, tape),
            None => Ok(x),
        }
    }

    fn backward(&self, dy: &Tensor, tape: &mut Tape) -> Result<Tensor> {
        match &self.transformer {
            Some(transformer) => self.resnet.backward(&transformer.backward(dy, tape)?, tape),
            None => self.resnet.backward(dy, tape),
        }
    }
}

/// One level on the way down. Each layer's output, and that of the downsampling, is kept for the way up.
#[derive(Debug)]
pub(super) struct DownBlock {
    layers: Vec<Layer>,
    downsampler: Option<Conv2d>,
}

impl DownBlock {
    /// Level `i`, from `c_in` channels.
    pub(super) fn new(
        scope: &Scope<'_>,
        config: &UNet2DConditionConfig,
        i: usize,
        c_in: usize,
    ) -> Result<Self> {
        let level = &config.levels[i];
        let layers = (0..level.layers).map(|j| {
            let from = if j == 0 { c_in } else { level.channels };
            Layer::new(scope, config, level, (j, from, level.attends_down))
        });
        let shape = [level.channels, level.channels, 3];
        Ok(Self {
            layers: layers.collect::<Result<_>>()?,
            downsampler: (i + 1 < config.levels.len())
                .then(|| scope.at("downsamplers").at(0).conv("conv", shape, HALVE))
                .transpose()?,
        })
    }

    /// Pushes onto `skips` what the way up needs.
    pub(super) fn forward(
        &self,
        mut x: Tensor,
        on: &Conditions<'_>,
        skips: &mut Vec<Tensor>,
        tape: &mut Tape,
    ) -> Result<Tensor> {
        for layer in &self.layers {
            x = layer.forward(&x, on, tape)?;
            skips.push(x.clone());
        }
        if let Some(conv) = &self.downsampler {
            x = conv.forward(&x, tape)?;
            skips.push(x.clone());
        }
        Ok(x)
    }

    /// Takes from `skips` the gradients that reached this block along the skip connections.
    pub(super) fn backward(
        &self,
        mut d: Tensor,
        skips: &mut Vec<Tensor>,
        tape: &mut Tape,
    ) -> Result<Tensor> {
        if let Some(conv) = &self.downsampler {
            d = conv.backward(&add_skip(d, skips)?, tape)?;
        }
        for layer in self.layers.iter().rev() {
            d = layer.backward(&add_skip(d, skips)?, tape)?;
        }
        Ok(d)
    }
}

/// `d` plus the last of `skips`, which is taken off.
pub(super) fn add_skip(d: Tensor, skips: &mut Vec<Tensor>) -> Result<Tensor> {
    let skip = skips.pop().expect("the way up gives one gradient per output of the way down");
    add(&d, &skip)
}

/// The bottom: a layer with a transformer, then a residual block.
#[derive(Debug)]
pub(super) struct MidBlock {
    first: Layer,
    second: ResnetBlock,
}

impl MidBlock {
    pub(super) fn new(scope: &Scope<'_>, config: &UNet2DConditionConfig) -> Result<Self> {
        let level = config.deepest();
        let second = config.resnet(level.channels, level.channels);
        Ok(Self {
            first: Layer::new(scope, config, level, (0, level.channels, true))?,
            second: ResnetBlock::new(&scope.at("resnets").at(1), second)?,
        })
    }

    pub(super) fn forward(
        &self,
        x: &Tensor,
        on: &Conditions<'_>,
        tape: &mut Tape,
    ) -> Result<Tensor> {
        self.second.forward(&self.first.forward(x, on, tape)?, Some(on.time), tape)
    }

    pub(super) fn backward(&self, dy: &Tensor, tape: &mut Tape) -> Result<Tensor> {
        self.first.backward(&self.second.backward(dy, tape)?, tape)
    }
}

/// One level on the way up: each layer takes its input and one kept output of the way down.
#[derive(Debug)]
pub(super) struct UpBlock {
    /// With the channels that come from below, before the kept ones.
    layers: Vec<(Layer, usize)>,
    upsampler: Option<Conv2d>,
}

impl UpBlock {
    /// The block of level `i`.
    pub(super) fn new(scope: &Scope<'_>, config: &UNet2DConditionConfig, i: usize) -> Result<Self> {
        let level = &config.levels[i];
        let below = config.levels.get(i + 1).unwrap_or(level).channels;
        let above = config.levels[i.saturating_sub(1)].channels;
        let layers = (0..=level.layers).map(|j| {
            let from = if j == 0 { below } else { level.channels };
            let kept = if j == level.layers { above } else { level.channels };
            let layer = Layer::new(scope, config, level, (j, from + kept, level.attends_up))?;
            Ok((layer, from))
        });
        let upsampler = (i > 0)
            .then(|| scope.at("upsamplers").at(0).conv3x3("conv", level.channels, level.channels));
        Ok(Self { layers: layers.collect::<Result<_>>()?, upsampler: upsampler.transpose()? })
    }

    /// Takes its kept outputs off the end of `skips`.
    pub(super) fn forward(
        &self,
        mut x: Tensor,
        on: &Conditions<'_>,
        skips: &mut Vec<Tensor>,
        tape: &mut Tape,
    ) -> Result<Tensor> {
        for (layer, _) in &self.layers {
            let skip = skips.pop().expect("the way down keeps one output per layer of the way up");
            x = layer.forward(&concat_channels(&x, &skip)?, on, tape)?;
        }
        let (Some(conv), Some(next)) = (&self.upsampler, skips.last()) else { return Ok(x) };
        let (_, _, h, w) = next.dims4()?;
        let x = UpsampleNearest2x.forward(&x, tape)?;
        // An odd side was halved upwards: doubling it gives one row or column too many.
        conv.forward(&x.narrow(2, 0, h)?.narrow(3, 0, w)?.contiguous()?, tape)
    }

    /// Pushes onto `skips` the gradients of the kept outputs, in the order in which the way down kept them.
    pub(super) fn backward(
        &self,
        mut d: Tensor,
        skips: &mut Vec<Tensor>,
        tape: &mut Tape,
    ) -> Result<Tensor> {
        if let Some(conv) = &self.upsampler {
            d = conv.backward(&d, tape)?;
            let (_, _, h, w) = d.dims4()?;
            d = d.pad_with_zeros(2, 0, h % 2)?.pad_with_zeros(3, 0, w % 2)?;
            d = UpsampleNearest2x.backward(&d.contiguous()?, tape)?;
        }
        for (layer, from) in self.layers.iter().rev() {
            let (below, kept) = split_channels(&layer.backward(&d, tape)?, *from)?;
            skips.push(kept);
            d = below;
        }
        Ok(d)
    }
}
