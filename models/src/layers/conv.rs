//! Convolution.

use std::sync::{Arc, OnceLock};

use candle_core::Tensor;

use super::cpu::{build, floats};
use super::{composed, use_kernels};
use crate::kernels::Lhs;
use crate::kernels::product::{self, Mixing, Window};
use crate::kernels::winograd::{Kernels, Weights, conv3x3};
use crate::{Error, Result, Tape};

/// Zeros around the input of a [`Conv2d`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Padding {
    /// As many on each of the four sides.
    Symmetric(usize),
    /// Below and to the right only: the `(0, 1, 0, 1)` of diffusers' VAE downsampling.
    BottomRight(usize),
}

impl Padding {
    /// Zeros before (top, left) and after (bottom, right).
    pub(crate) fn before_after(self) -> (usize, usize) {
        match self {
            Self::Symmetric(p) => (p, p),
            Self::BottomRight(p) => (0, p),
        }
    }
}

/// How a [`Conv2d`] moves over its input.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Conv2dConfig {
    /// Step in both directions.
    pub stride: usize,
    /// Zeros around the input.
    pub padding: Padding,
}

impl Conv2dConfig {
    /// 3 x 3, stride 1, pad 1: keeps the size.
    pub const SAME_3X3: Self = Self { stride: 1, padding: Padding::Symmetric(1) };
    /// 1 x 1.
    pub const POINTWISE: Self = Self { stride: 1, padding: Padding::Symmetric(0) };

    /// Non-overlapping patches of side `k`, as a vision transformer embeds them.
    pub const fn patches(k: usize) -> Self {
        Self { stride: k, padding: Padding::Symmetric(0) }
    }
}

/// A two-dimensional convolution with a square kernel, one group, no dilation.
#[derive(Debug, Clone)]
pub struct Conv2d {
    weight: Tensor,
    bias: Option<Tensor>,
    config: Conv2dConfig,
    /// Winograd's weights for the forward and the backward pass, made when first needed.
    winograd: Arc<[OnceLock<Vec<f32>>; 2]>,
}

/// Most floats of transformed weights that are kept (16 MiB: 320 x 320 channels). They take four times the
/// memory of the kernels, so large ones are made anew at each call.
const KEPT: usize = 1 << 22;

/// Pixels up to which a layer whose transformed weights are not kept multiplies directly: at 8 x 8 Winograd's
/// tiles fill a panel by a quarter.
const SMALL: usize = 64;

impl Conv2d {
    /// A layer from its weight `[c_out, c_in, k, k]` and bias `[c_out]`.
    ///
    /// # Errors
    /// When the shapes do not fit, the kernel is not square, or the stride is 0.
    pub fn new(weight: Tensor, bias: Option<Tensor>, config: Conv2dConfig) -> Result<Self> {
        super::expect("Conv2d weight", &weight, 4, "[c_out, c_in, k, k]")?;
        let (c_out, _, kh, kw) = weight.dims4()?;
        super::expect_bias("Conv2d bias", bias.as_ref(), c_out)?;
        let (before, after) = config.padding.before_after();
        if kh != kw || kh == 0 || config.stride == 0 || before.max(after) >= kh {
            return Err(Error::invalid(
                "Conv2d",
                format!("kernel {kh} x {kw} with {config:?} is not supported"),
            ));
        }
        let bias = bias.map(|bias| bias.contiguous()).transpose()?;
        Ok(Self { weight: weight.contiguous()?, bias, config, winograd: Arc::default() })
    }

    /// `[b, c_in, h, w]` -> `[b, c_out, h', w']`. Saves nothing but the shape.
    ///
    /// # Errors
    /// When `x` has another number of channels or is smaller than the kernel.
    pub fn forward(&self, x: &Tensor, tape: &mut Tape) -> Result<Tensor> {
        tape.go_on()?;
        super::expect("Conv2d::forward", x, 4, "[b, c, h, w]")?;
        let (c_in, k) = (self.weight.dim(1)?, self.weight.dim(2)?);
        let (_, c, h, w) = x.dims4()?;
        let (before, after) = self.config.padding.before_after();
        if c != c_in || h.min(w) + before + after < k {
            return Err(Error::invalid(
                "Conv2d::forward",
                format!(
                    "expected {c_in} channels and sides of at least {}, got {:?}",
                    k - before - after,
                    x.dims()
                ),
            ));
        }
        if self.config.stride > 1 {
            tape.push(&Tensor::new(&[h as u32, w as u32], &candle_core::Device::Cpu)?);
        }
        if use_kernels(x.device()) {
            return self.forward_on_cpu(&x.contiguous()?);
        }
        composed::conv2d(x, &self.weight, self.bias.as_ref(), self.config)
    }

    /// `[b, c_out, h', w']` -> `[b, c_in, h, w]`.
    ///
    /// # Errors
    /// When `dy` has another shape than the output had, or the tape is empty.
    pub fn backward(&self, dy: &Tensor, tape: &mut Tape) -> Result<Tensor> {
        tape.go_on()?;
        super::expect("Conv2d::backward", dy, 4, "[b, c, h, w]")?;
        let (c_out, k) = (self.weight.dim(0)?, self.weight.dim(2)?);
        let (_, c, ho, wo) = dy.dims4()?;
        let (before, after) = self.config.padding.before_after();
        let (h, w) = if self.config.stride > 1 {
            let size = tape.pop()?.to_vec1::<u32>()?;
            (size[0] as usize, size[1] as usize)
        } else {
            (ho + k - 1 - before - after, wo + k - 1 - before - after)
        };
        let out = |side: usize| (side + before + after - k) / self.config.stride + 1;
        if c != c_out || (out(h), out(w)) != (ho, wo) {
            return Err(Error::invalid(
                "Conv2d::backward",
                format!("expected [b, {c_out}, {}, {}], got {:?}", out(h), out(w), dy.dims()),
            ));
        }
        if use_kernels(dy.device()) {
            return self.backward_on_cpu(&dy.contiguous()?, h, w);
        }
        composed::conv2d_backward(dy, &self.weight, self.config, h, w)
    }

    fn window(&self, h: usize, w: usize) -> Result<Window> {
        let (side, stride) = (self.weight.dim(2)?, self.config.stride);
        let (before, after) = self.config.padding.before_after();
        let out = |side_in: usize| (side_in + before + after - side) / stride + 1;
        Ok(Window { side, stride, before, image: (h, w), out: (out(h), out(w)) })
    }

    fn forward_on_cpu(&self, x: &Tensor) -> Result<Tensor> {
        let (c_out, c_in, _, _) = self.weight.dims4()?;
        let (b, _, h, w) = x.dims4()?;
        let window = self.window(h, w)?;
        let (xs, weight) = (floats(x)?, floats(&self.weight)?);
        let bias = self.bias.as_ref().map(floats).transpose()?;
        let kernels = Kernels::forward(&weight, c_out, c_in);
        build((b, c_out, window.out.0, window.out.1), |y| match (window.side, self.config) {
            (3, Conv2dConfig::SAME_3X3) if !is_small(kernels, h, w) => {
                let u = self.transformed(0, kernels);
                conv3x3(kernels, u, bias.as_deref(), &xs, [b, h, w], y);
            }
            (1, Conv2dConfig::POINTWISE) => {
                let a = Lhs { data: &weight, row: c_in, col: 1 };
                product::pointwise(
                    Mixing { weight: a, from: c_in, to: c_out },
                    bias.as_deref(),
                    &xs,
                    h * w,
                    y,
                );
            }
            _ => product::conv(&weight, bias.as_deref(), &xs, [c_out, c_in], window, y),
        })
    }

    fn backward_on_cpu(&self, dy: &Tensor, h: usize, w: usize) -> Result<Tensor> {
        let (c_out, c_in, _, _) = self.weight.dims4()?;
        let b = dy.dim(0)?;
        let window = self.window(h, w)?;
        let (dys, weight) = (floats(dy)?, floats(&self.weight)?);
        build((b, c_in, h, w), |dx| match (window.side, self.config) {
            (3, Conv2dConfig::SAME_3X3) => {
                let kernels = Kernels::backward(&weight, c_out, c_in);
                conv3x3(kernels, self.transformed(1, kernels), None, &dys, [b, h, w], dx);
            }
            (1, Conv2dConfig::POINTWISE) => {
                let a = Lhs { data: &weight, row: 1, col: c_in };
                product::pointwise(
                    Mixing { weight: a, from: c_out, to: c_in },
                    None,
                    &dys,
                    h * w,
                    dx,
                );
            }
            _ => product::conv_backward(&weight, &dys, [c_out, c_in], window, dx),
        })
    }

    /// The transformed weights of the forward (0) or the backward pass (1), unless they are too large to keep.
    fn transformed(&self, pass: usize, kernels: Kernels<'_>) -> Weights<'_> {
        if kernels.transformed_len() > KEPT {
            return Weights::Made;
        }
        Weights::Kept(self.winograd[pass].get_or_init(|| kernels.transform()))
    }
}

/// Whether the image is so small that making the transformed weights costs more than they save.
fn is_small(kernels: Kernels<'_>, h: usize, w: usize) -> bool {
    kernels.transformed_len() > KEPT && h * w <= SMALL
}
