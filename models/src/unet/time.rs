//! The time embedding.

use candle_core::Tensor;

use super::config::UNet2DConditionConfig;
use crate::layers::{Activation, Linear};
use crate::weights::Scope;
use crate::{Result, Tape};

/// Sines and cosines of the time step, then two linear layers with a SiLU between.
#[derive(Debug)]
pub(super) struct TimeEmbedding {
    linear1: Linear,
    linear2: Linear,
    width: usize,
    flip_sin_to_cos: bool,
    freq_shift: f32,
}

impl TimeEmbedding {
    pub(super) fn new(scope: &Scope<'_>, config: &UNet2DConditionConfig) -> Result<Self> {
        let (width, out) = (config.levels[0].channels, config.time_embedding_dim);
        Ok(Self {
            linear1: scope.linear("linear_1", width, out)?,
            linear2: scope.linear("linear_2", out, out)?,
            width,
            flip_sin_to_cos: config.flip_sin_to_cos,
            freq_shift: config.freq_shift as f32,
        })
    }

    /// The embedding of `b` time steps after the SiLU that every residual block applies, `[b, width]`.
    pub(super) fn forward(&self, timesteps: &[f32], like: &Tensor) -> Result<Tensor> {
        let rows: Vec<f32> = timesteps.iter().flat_map(|&t| self.waves(t)).collect();
        let x = Tensor::from_vec(rows, (timesteps.len(), self.width), like.device())?;
        let tape = &mut Tape::off();
        let x = Activation::Silu.forward(&self.linear1.forward(&x, tape)?, tape)?;
        Activation::Silu.forward(&self.linear2.forward(&x, tape)?, tape)
    }

    /// `get_timestep_embedding` of diffusers, in f32 as there: for `i < width / 2` the sine and the cosine of
    /// `t exp(-ln(10000) i / (width / 2 - freq_shift))`; an odd width ends in a zero.
    fn waves(&self, t: f32) -> Vec<f32> {
        let half = self.width / 2;
        let angle = |i| {
            let exponent = -(10_000f64.ln() as f32) * i as f32 / (half as f32 - self.freq_shift);
            t * exponent.exp()
        };
        let sines = (0..half).map(|i| angle(i).sin());
        let cosines = (0..half).map(|i| angle(i).cos());
        let mut waves: Vec<f32> = if self.flip_sin_to_cos {
            cosines.chain(sines).collect()
        } else {
            sines.chain(cosines).collect()
        };
        waves.resize(self.width, 0.0);
        waves
    }
}
