//! The residual block of diffusers' VAE and UNet (`ResnetBlock2D`).

use candle_core::Tensor;

use crate::layers::{Conv2d, GroupNorm, Linear, add};
use crate::weights::Scope;
use crate::{Result, Tape};

/// Sizes of a residual block.
#[derive(Debug, Clone, Copy)]
pub(crate) struct ResnetConfig {
    /// Channels that come in.
    pub(crate) c_in: usize,
    /// Channels that go out.
    pub(crate) c_out: usize,
    /// Groups of both norms.
    pub(crate) groups: usize,
    /// Epsilon of both norms.
    pub(crate) eps: f64,
    /// Width of the time embedding, `None` in a VAE.
    pub(crate) time: Option<usize>,
}

/// `shortcut(x) + conv2(silu(norm2(conv1(silu(norm1(x))) + time)))`.
#[derive(Debug)]
pub(crate) struct ResnetBlock {
    norm1: GroupNorm,
    conv1: Conv2d,
    time: Option<Linear>,
    norm2: GroupNorm,
    conv2: Conv2d,
    shortcut: Option<Conv2d>,
}

impl ResnetBlock {
    pub(crate) fn new(scope: &Scope<'_>, config: ResnetConfig) -> Result<Self> {
        let ResnetConfig { c_in, c_out, groups, eps, time } = config;
        let shortcut = (c_in != c_out).then(|| scope.conv1x1("conv_shortcut", c_in, c_out));
        Ok(Self {
            norm1: scope.group_norm("norm1", c_in, groups, eps)?.with_silu(),
            conv1: scope.conv3x3("conv1", c_in, c_out)?,
            time: time.map(|width| scope.linear("time_emb_proj", width, c_out)).transpose()?,
            norm2: scope.group_norm("norm2", c_out, groups, eps)?.with_silu(),
            conv2: scope.conv3x3("conv2", c_out, c_out)?,
            shortcut: shortcut.transpose()?,
        })
    }

    /// `[b, c_in, h, w]` -> `[b, c_out, h, w]`. `time` is the time embedding after its SiLU, `[b, width]`.
    pub(crate) fn forward(
        &self,
        x: &Tensor,
        time: Option<&Tensor>,
        tape: &mut Tape,
    ) -> Result<Tensor> {
        let mut h = self.conv1.forward(&self.norm1.forward(x, tape)?, tape)?;
        if let (Some(project), Some(time)) = (&self.time, time) {
            // The time embedding does not depend on `x`: nothing of it goes on the tape.
            let shift = project.forward(time, &mut Tape::off())?;
            h = h.broadcast_add(&shift.unsqueeze(2)?.unsqueeze(3)?)?;
        }
        let h = self.conv2.forward(&self.norm2.forward(&h, tape)?, tape)?;
        match &self.shortcut {
            Some(shortcut) => add(&shortcut.forward(x, tape)?, &h),
            None => add(x, &h),
        }
    }

    /// `[b, c_out, h, w]` -> `[b, c_in, h, w]`.
    pub(crate) fn backward(&self, dy: &Tensor, tape: &mut Tape) -> Result<Tensor> {
        let dx = match &self.shortcut {
            Some(shortcut) => shortcut.backward(dy, tape)?,
            None => dy.clone(),
        };
        let d = self.norm2.backward(&self.conv2.backward(dy, tape)?, tape)?;
        let d = self.norm1.backward(&self.conv1.backward(&d, tape)?, tape)?;
        add(&dx, &d)
    }
}
