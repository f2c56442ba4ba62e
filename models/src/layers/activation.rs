//! Element-wise activations.

use candle_core::Tensor;

use super::cpu::{floats, tensor};
use super::{composed, use_kernels};
use crate::kernels::elementwise;
use crate::{Error, Result, Tape};

/// An element-wise activation. The forward pass saves its input.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Activation {
    /// `x Phi(x)` with the normal distribution function `Phi`: torch's and transformers' `gelu`.
    GeluErf,
    /// `0.5 x (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3)))`: transformers' `gelu_new`, `gelu_pytorch_tanh`.
    GeluTanh,
    /// `x sigmoid(1.702 x)`: transformers' `quick_gelu`, used by CLIP.
    GeluQuick,
    /// `x sigmoid(x)`: `silu`, `swish`.
    Silu,
}

impl Activation {
    /// Any shape; saves `x`.
    ///
    /// # Errors
    /// When `x` is not `f32`.
    pub fn forward(&self, x: &Tensor, tape: &mut Tape) -> Result<Tensor> {
        super::expect("Activation::forward", x, x.rank(), "f32")?;
        let x = &x.contiguous()?;
        let y = if use_kernels(x.device()) {
            let values = floats(x)?;
            tensor(elementwise::activation(*self, &values), x.shape())?
        } else {
            composed::activation(*self, x)?
        };
        tape.push(x);
        Ok(y)
    }

    /// `dx = dy f'(x)`.
    ///
    /// # Errors
    /// When the tape is empty or `dy` has another shape than the saved input.
    pub fn backward(&self, dy: &Tensor, tape: &mut Tape) -> Result<Tensor> {
        let x = tape.pop()?;
        if dy.dims() != x.dims() {
            return Err(Error::invalid(
                "Activation::backward",
                format!("expected {:?}, got {:?}", x.dims(), dy.dims()),
            ));
        }
        if !use_kernels(dy.device()) {
            return Ok((composed::activation_slope(*self, &x)? * dy)?);
        }
        let dy = dy.contiguous()?;
        let (x, dy_values) = (floats(&x)?, floats(&dy)?);
        tensor(elementwise::activation_backward(*self, &x, &dy_values), dy.shape())
    }
}
