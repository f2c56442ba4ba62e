//! Builds layers from the keys of a [`Scope`], so that networks read like their configuration.

use candle_core::Tensor;

use crate::Result;
use crate::layers::{Conv2d, Conv2dConfig, GroupNorm, LayerNorm, Linear};
use crate::weights::Scope;

impl Scope<'_> {
    /// `name.weight` `[outputs, inputs]` and `name.bias`.
    pub(crate) fn linear(&self, name: &str, inputs: usize, outputs: usize) -> Result<Linear> {
        let (weight, bias) = self.pair(name, &[outputs, inputs])?;
        Linear::new(weight, Some(bias))
    }

    /// `name.weight` `[outputs, inputs]` alone.
    pub(crate) fn projection(&self, name: &str, inputs: usize, outputs: usize) -> Result<Linear> {
        Linear::new(self.at(name).tensor("weight", &[outputs, inputs])?, None)
    }

    /// `name.weight` `[c_out, c_in, k, k]` and `name.bias`.
    pub(crate) fn conv(
        &self,
        name: &str,
        [c_in, c_out, k]: [usize; 3],
        config: Conv2dConfig,
    ) -> Result<Conv2d> {
        let (weight, bias) = self.pair(name, &[c_out, c_in, k, k])?;
        Conv2d::new(weight, Some(bias), config)
    }

    /// A 3 x 3 convolution that keeps the size.
    pub(crate) fn conv3x3(&self, name: &str, c_in: usize, c_out: usize) -> Result<Conv2d> {
        self.conv(name, [c_in, c_out, 3], Conv2dConfig::SAME_3X3)
    }

    /// A 1 x 1 convolution.
    pub(crate) fn conv1x1(&self, name: &str, c_in: usize, c_out: usize) -> Result<Conv2d> {
        self.conv(name, [c_in, c_out, 1], Conv2dConfig::POINTWISE)
    }

    /// `name.weight` and `name.bias` over `channels`.
    pub(crate) fn group_norm(
        &self,
        name: &str,
        channels: usize,
        groups: usize,
        eps: f64,
    ) -> Result<GroupNorm> {
        let (weight, bias) = self.pair(name, &[channels])?;
        GroupNorm::new(weight, bias, groups, eps)
    }

    /// `name.weight` and `name.bias` over the last dimension.
    pub(crate) fn layer_norm(&self, name: &str, width: usize, eps: f64) -> Result<LayerNorm> {
        let (weight, bias) = self.pair(name, &[width])?;
        LayerNorm::new(weight, bias, eps)
    }

    /// A weight of the given shape and the bias of its first dimension.
    fn pair(&self, name: &str, shape: &[usize]) -> Result<(Tensor, Tensor)> {
        let scope = self.at(name);
        Ok((scope.tensor("weight", shape)?, scope.tensor("bias", &shape[..1])?))
    }
}
