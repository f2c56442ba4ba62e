//! The embedding of a time step.

use candle_core::Tensor;

use crate::layers::{Activation, Linear};
use crate::weights::Scope;
use crate::{Result, Tape};

/// Sines and cosines of a number, as diffusers' `get_timestep_embedding` makes them.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Waves {
    /// How many values.
    pub(crate) width: usize,
    /// Whether the cosines come first.
    pub(crate) flip_sin_to_cos: bool,
    /// Shift of the frequencies.
    pub(crate) freq_shift: f32,
}

impl Waves {
    /// In f32 as there: for `i < width / 2` the sine and the cosine of
    /// `t exp(-ln(10000) i / (width / 2 - freq_shift))`; an odd width ends in a zero.
    fn of(self, t: f32) -> Vec<f32> {
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

/// Sines and cosines of the time step, then two linear layers with a SiLU between.
#[derive(Debug)]
pub(crate) struct TimeEmbedding {
    waves: Waves,
    layers: ConditionMlp,
}

impl TimeEmbedding {
    pub(crate) fn new(scope: &Scope<'_>, waves: Waves, width: usize) -> Result<Self> {
        Ok(Self { waves, layers: ConditionMlp::new(scope, waves.width, width)? })
    }

    /// The embedding of `b` time steps, `[b, width]`, on the device of `like`.
    pub(crate) fn forward(&self, timesteps: &[f32], like: &Tensor) -> Result<Tensor> {
        let rows: Vec<f32> = timesteps.iter().flat_map(|&t| self.waves.of(t)).collect();
        let x = Tensor::from_vec(rows, (timesteps.len(), self.waves.width), like.device())?;
        self.layers.forward(&x)
    }
}

/// `linear_2(silu(linear_1(x)))` of a condition. Nothing is differentiated with respect to it.
#[derive(Debug)]
pub(crate) struct ConditionMlp {
    linear1: Linear,
    linear2: Linear,
}

impl ConditionMlp {
    pub(crate) fn new(scope: &Scope<'_>, inputs: usize, width: usize) -> Result<Self> {
        Ok(Self {
            linear1: scope.linear("linear_1", inputs, width)?,
            linear2: scope.linear("linear_2", width, width)?,
        })
    }

    /// `[b, inputs]` -> `[b, width]`.
    pub(crate) fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let tape = &mut Tape::off();
        let x = Activation::Silu.forward(&self.linear1.forward(x, tape)?, tape)?;
        self.linear2.forward(&x, tape)
    }
}
