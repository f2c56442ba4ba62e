//! Latents to tokens and back.

use candle_core::Tensor;

use super::config::Sd3TransformerConfig;
use crate::attend::{to_image, to_tokens};
use crate::layers::{Conv2d, Conv2dConfig};
use crate::weights::Scope;
use crate::{Result, Tape};

/// Square patches as tokens, with the middle of a table of positions added (diffusers' `PatchEmbed`).
#[derive(Debug)]
pub(super) struct PatchEmbedding {
    projection: Conv2d,
    /// `[most, most, width]`.
    positions: Tensor,
    width: usize,
    most: usize,
}

impl PatchEmbedding {
    pub(super) fn new(scope: &Scope<'_>, config: &Sd3TransformerConfig) -> Result<Self> {
        let (width, most, patch) = (config.width(), config.pos_embed_max_size, config.patch_size);
        let sizes = [config.in_channels, width, patch];
        let positions = scope.tensor("pos_embed", &[1, most * most, width])?;
        Ok(Self {
            projection: scope.conv("proj", sizes, Conv2dConfig::patches(patch))?,
            positions: positions.reshape((most, most, width))?,
            width,
            most,
        })
    }

    /// `[b, c, h, w]` -> `[b, h w / patch^2, width]`. A side is at most `most` patches.
    pub(super) fn forward(&self, x: &Tensor, tape: &mut Tape) -> Result<Tensor> {
        let x = self.projection.forward(x, tape)?;
        let (_, _, h, w) = x.dims4()?;
        let (top, left) = ((self.most - h) / 2, (self.most - w) / 2);
        let positions = self.positions.narrow(0, top, h)?.narrow(1, left, w)?;
        let positions = positions.contiguous()?.reshape((h * w, self.width))?;
        Ok(to_tokens(&x)?.broadcast_add(&positions)?)
    }

    /// The gradient with respect to a latent of `grid` patches.
    pub(super) fn backward(
        &self,
        dy: &Tensor,
        (h, w): (usize, usize),
        tape: &mut Tape,
    ) -> Result<Tensor> {
        let shape = (dy.dim(0)?, self.width, h, w).into();
        self.projection.backward(&to_image(dy, &shape)?, tape)
    }
}

/// Tokens `[b, h w, p p c]` of `grid` `(h, w)` -> `[b, c, h p, w p]`.
pub(super) fn unpatch(x: &Tensor, (h, w): (usize, usize), p: usize) -> Result<Tensor> {
    let (b, _, values) = x.dims3()?;
    let c = values / (p * p);
    let x = x.reshape((b, h, w, p, p, c))?.permute((0, 5, 1, 3, 2, 4))?;
    Ok(x.contiguous()?.reshape((b, c, h * p, w * p))?)
}

/// The inverse of [`unpatch`], and so its backward pass.
pub(super) fn patch(x: &Tensor, p: usize) -> Result<Tensor> {
    let (b, c, height, width) = x.dims4()?;
    let (h, w) = (height / p, width / p);
    let x = x.contiguous()?.reshape((b, c, h, p, w, p))?.permute((0, 2, 4, 3, 5, 1))?;
    Ok(x.contiguous()?.reshape((b, h * w, p * p * c))?)
}
