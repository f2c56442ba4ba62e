//! Nearest-neighbour upsampling by two.

use candle_core::Tensor;

use super::cpu::{build, floats};
use super::{composed, use_kernels};
use crate::kernels::elementwise;
use crate::{Error, Result, Tape};

/// Repeats every pixel twice in both directions. It saves nothing.
#[derive(Debug, Clone, Copy, Default)]
pub struct UpsampleNearest2x;

impl UpsampleNearest2x {
    /// `[b, c, h, w]` -> `[b, c, 2h, 2w]`.
    ///
    /// # Errors
    /// When `x` is not of rank 4.
    pub fn forward(&self, x: &Tensor, _tape: &mut Tape) -> Result<Tensor> {
        super::expect("UpsampleNearest2x::forward", x, 4, "[b, c, h, w]")?;
        if !use_kernels(x.device()) {
            return composed::upsample2x(x);
        }
        let (b, c, h, w) = x.dims4()?;
        let x = x.contiguous()?;
        let values = floats(&x)?;
        build((b, c, 2 * h, 2 * w), |y| elementwise::upsample2x(&values, w, y))
    }

    /// `[b, c, 2h, 2w]` -> `[b, c, h, w]`: the sum over each 2 x 2 block.
    ///
    /// # Errors
    /// When a side is odd.
    pub fn backward(&self, dy: &Tensor, _tape: &mut Tape) -> Result<Tensor> {
        super::expect("UpsampleNearest2x::backward", dy, 4, "[b, c, 2h, 2w]")?;
        let (b, c, h, w) = dy.dims4()?;
        if h % 2 != 0 || w % 2 != 0 {
            return Err(Error::invalid(
                "UpsampleNearest2x::backward",
                format!("expected even sides, got {h} x {w}"),
            ));
        }
        if !use_kernels(dy.device()) {
            return composed::upsample2x_backward(dy);
        }
        let dy = dy.contiguous()?;
        let values = floats(&dy)?;
        build((b, c, h / 2, w / 2), |dx| elementwise::upsample2x_backward(&values, w / 2, dx))
    }
}
