//! Layers with frozen weights: each has `forward(&self, x, &mut Tape)` and
//! `backward(&self, dy, &mut Tape)`, the gradient with respect to its input. Weights are plain storage.
//!
//! All tensors are `f32`. A backward pass pops exactly what its forward pass pushed, in reverse order.

mod activation;
mod attention;
mod composed;
mod conv;
mod cpu;
mod linear;
mod modulation;
mod norm;
mod resize;
mod shape;
mod upsample;

use std::cell::Cell;

use candle_core::{DType, Device, Tensor};

use crate::{Error, Result};

pub use activation::Activation;
pub use attention::Attention;
pub(crate) use composed::MOST_COLUMNS;
pub use conv::{Conv2d, Conv2dConfig, Padding};
pub use linear::Linear;
pub use modulation::{add_scaled, scale_backward, scale_shift};
pub use norm::{GroupNorm, LayerNorm};
pub(crate) use resize::Taps;
pub use resize::{Filter, resize, resize_backward};
pub use shape::{add, concat_channels, merge_heads, split_channels, split_heads};
pub use upsample::UpsampleNearest2x;

thread_local! {
    static COMPOSED: Cell<bool> = const { Cell::new(false) };
}

/// Runs `f` with every layer on this thread composed of candle's operations, as on devices for which
/// there are no kernels here. It exists so that this path can be tested where there is only a CPU.
pub fn composed_of_candle_ops<T>(f: impl FnOnce() -> T) -> T {
    struct Restore(bool);
    impl Drop for Restore {
        fn drop(&mut self) {
            COMPOSED.set(self.0);
        }
    }
    let _restore = Restore(COMPOSED.replace(true));
    f()
}

/// Whether to run the CPU kernels for tensors of this device.
fn use_kernels(device: &Device) -> bool {
    device.is_cpu() && !COMPOSED.get()
}

/// Refuses a tensor that is not `f32` or has another rank.
fn expect(what: &'static str, t: &Tensor, rank: usize, shape: &str) -> Result<()> {
    if t.dtype() != DType::F32 {
        return Err(Error::invalid(
            what,
            format!("expected f32, got {:?}; convert it first", t.dtype()),
        ));
    }
    if t.rank() != rank {
        return Err(Error::invalid(what, format!("expected {shape}, got {:?}", t.dims())));
    }
    Ok(())
}

/// Refuses a bias that is not `f32` `[n]`.
fn expect_bias(what: &'static str, bias: Option<&Tensor>, n: usize) -> Result<()> {
    let Some(bias) = bias else { return Ok(()) };
    expect(what, bias, 1, "[outputs]")?;
    if bias.dims1()? != n {
        return Err(Error::invalid(what, format!("expected [{n}], got {:?}", bias.dims())));
    }
    Ok(())
}
