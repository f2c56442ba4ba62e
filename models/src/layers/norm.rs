//! Normalisations.

use candle_core::{DType, Device, Tensor};

use super::cpu::{build, floats, tensor};
use super::{composed, use_kernels};
use crate::kernels::norm::{self as kernel, Affine, Groups, RowNorm};
use crate::{Error, Result, Tape};

/// Group normalisation over `[b, c, ..]`, optionally followed by SiLU in the same pass.
#[derive(Debug, Clone)]
pub struct GroupNorm {
    weight: Tensor,
    bias: Tensor,
    groups: usize,
    eps: f64,
    silu: bool,
}

impl GroupNorm {
    /// A layer from its weight `[c]` and bias `[c]`.
    ///
    /// # Errors
    /// When `c` is not a multiple of `groups`, or the shapes do not fit.
    pub fn new(weight: Tensor, bias: Tensor, groups: usize, eps: f64) -> Result<Self> {
        super::expect("GroupNorm weight", &weight, 1, "[c]")?;
        let c = weight.dims1()?;
        super::expect_bias("GroupNorm bias", Some(&bias), c)?;
        if groups == 0 || c % groups != 0 {
            return Err(Error::invalid("GroupNorm", format!("{c} channels over {groups} groups")));
        }
        let (weight, bias) = (weight.contiguous()?, bias.contiguous()?);
        Ok(Self { weight, bias, groups, eps, silu: false })
    }

    /// The same layer with `y sigmoid(y)` applied to its output.
    pub fn with_silu(mut self) -> Self {
        self.silu = true;
        self
    }

    /// `[b, c, ..]` -> the same shape. Saves the input and the statistics of each group.
    ///
    /// # Errors
    /// When `x` has another number of channels.
    pub fn forward(&self, x: &Tensor, tape: &mut Tape) -> Result<Tensor> {
        tape.go_on()?;
        let shape = self.grouped("GroupNorm::forward", x)?;
        let x = &x.contiguous()?;
        let (y, stats) = if use_kernels(x.device()) {
            self.forward_on_cpu(x, shape)?
        } else {
            composed::group_norm(x, shape, &self.weight, &self.bias, self.eps, self.silu)?
        };
        tape.push(x);
        tape.push(&stats);
        Ok(y)
    }

    /// The input gradient, of the shape of the input.
    ///
    /// # Errors
    /// When the tape is empty or the shape is another one.
    pub fn backward(&self, dy: &Tensor, tape: &mut Tape) -> Result<Tensor> {
        tape.go_on()?;
        let shape = self.grouped("GroupNorm::backward", dy)?;
        let (stats, x) = (tape.pop()?, tape.pop()?);
        same_shape("GroupNorm::backward", dy, &x)?;
        if use_kernels(dy.device()) {
            return self.backward_on_cpu(&dy.contiguous()?, &x, &stats, shape);
        }
        composed::group_norm_backward(dy, &x, &stats, shape, &self.weight, &self.bias, self.silu)
    }

    fn groups(&self, [_, groups, channels, pixels]: [usize; 4]) -> Groups {
        Groups { groups, channels, pixels, silu: self.silu }
    }

    fn forward_on_cpu(&self, x: &Tensor, shape: [usize; 4]) -> Result<(Tensor, Tensor)> {
        let (weight, bias, values) = (floats(&self.weight)?, floats(&self.bias)?, floats(x)?);
        let affine = Affine { weight: &weight, bias: &bias };
        let [b, groups, ..] = shape;
        let mut stats = vec![0f32; 2 * b * groups];
        let split = stats.split_at_mut(b * groups);
        let y = build(x.shape(), |y| {
            kernel::group_norm(&values, self.groups(shape), affine, self.eps, split, y)
        })?;
        Ok((y, tensor(stats, (2, b, groups))?))
    }

    fn backward_on_cpu(
        &self,
        dy: &Tensor,
        x: &Tensor,
        stats: &Tensor,
        shape: [usize; 4],
    ) -> Result<Tensor> {
        let (weight, bias) = (floats(&self.weight)?, floats(&self.bias)?);
        let affine = Affine { weight: &weight, bias: &bias };
        let (dys, xs, stats) = (floats(dy)?, floats(x)?, floats(stats)?);
        let split = stats.split_at(stats.len() / 2);
        build(x.shape(), |dx| {
            kernel::group_norm_backward(&dys, &xs, self.groups(shape), affine, split, dx)
        })
    }

    /// `[samples, groups, channels per group, pixels]`.
    fn grouped(&self, what: &'static str, x: &Tensor) -> Result<[usize; 4]> {
        super::expect(what, x, x.rank(), "f32")?;
        let c = self.weight.dims1()?;
        match x.dims() {
            [b, channels, rest @ ..] if *channels == c => {
                Ok([*b, self.groups, c / self.groups, rest.iter().product()])
            }
            dims => Err(Error::invalid(what, format!("expected [b, {c}, ..], got {dims:?}"))),
        }
    }
}

/// Normalisation over the last dimension: layer norm, or with [`LayerNorm::rms`] its relative that takes no
/// mean away.
#[derive(Debug, Clone)]
pub struct LayerNorm {
    weight: Tensor,
    bias: Tensor,
    eps: f64,
    centred: bool,
}

impl LayerNorm {
    /// A layer from its weight `[d]` and bias `[d]`.
    ///
    /// # Errors
    /// When the shapes do not fit.
    pub fn new(weight: Tensor, bias: Tensor, eps: f64) -> Result<Self> {
        super::expect("LayerNorm weight", &weight, 1, "[d]")?;
        super::expect_bias("LayerNorm bias", Some(&bias), weight.dims1()?)?;
        let (weight, bias) = (weight.contiguous()?, bias.contiguous()?);
        Ok(Self { weight, bias, eps, centred: true })
    }

    /// A layer without weight and bias over `d` values.
    ///
    /// # Errors
    /// When the device fails.
    pub fn plain(d: usize, eps: f64, device: &Device) -> Result<Self> {
        let weight = Tensor::ones(d, DType::F32, device)?;
        Self::new(weight.clone(), weight.zeros_like()?, eps)
    }

    /// Root-mean-square normalisation (Zhang and Sennrich 2019): `x weight / sqrt(mean(x^2) + eps)`.
    ///
    /// # Errors
    /// When the weight is not `f32` `[d]`.
    pub fn rms(weight: Tensor, eps: f64) -> Result<Self> {
        let bias = weight.zeros_like()?;
        Ok(Self { centred: false, ..Self::new(weight, bias, eps)? })
    }

    /// `[.., d]` -> the same shape. Saves the input and the statistics of each row.
    ///
    /// # Errors
    /// When the last dimension is not `d`.
    pub fn forward(&self, x: &Tensor, tape: &mut Tape) -> Result<Tensor> {
        self.check("LayerNorm::forward", x)?;
        let x = &x.contiguous()?;
        let (y, stats) = if use_kernels(x.device()) {
            self.forward_on_cpu(x)?
        } else {
            composed::row_norm(x, self.composed())?
        };
        tape.push(x);
        tape.push(&stats);
        Ok(y)
    }

    /// The input gradient, of the shape of the input.
    ///
    /// # Errors
    /// When the tape is empty or the shape is another one.
    pub fn backward(&self, dy: &Tensor, tape: &mut Tape) -> Result<Tensor> {
        self.check("LayerNorm::backward", dy)?;
        let (stats, x) = (tape.pop()?, tape.pop()?);
        same_shape("LayerNorm::backward", dy, &x)?;
        if use_kernels(dy.device()) {
            let dy = dy.contiguous()?;
            let (dys, xs, stats) = (floats(&dy)?, floats(&x)?, floats(&stats)?);
            let (weight, bias) = (floats(&self.weight)?, floats(&self.bias)?);
            let split = stats.split_at(stats.len() / 2);
            return build(x.shape(), |dx| {
                kernel::row_norm_backward(&dys, &xs, self.kernel(&weight, &bias), split, dx)
            });
        }
        composed::row_norm_backward(dy, &x, &stats, self.composed())
    }

    fn kernel<'a>(&self, weight: &'a [f32], bias: &'a [f32]) -> RowNorm<'a> {
        RowNorm { affine: Affine { weight, bias }, eps: self.eps, centred: self.centred }
    }

    fn composed(&self) -> composed::RowNorm<'_> {
        let Self { weight, bias, eps, centred } = self;
        composed::RowNorm { weight, bias, eps: *eps, centred: *centred }
    }

    fn forward_on_cpu(&self, x: &Tensor) -> Result<(Tensor, Tensor)> {
        let (weight, bias, values) = (floats(&self.weight)?, floats(&self.bias)?, floats(x)?);
        let norm = self.kernel(&weight, &bias);
        let rows = x.elem_count() / weight.len();
        let mut stats = vec![0f32; 2 * rows];
        let split = stats.split_at_mut(rows);
        let y = build(x.shape(), |y| kernel::row_norm(&values, norm, split, y))?;
        Ok((y, tensor(stats, (2, rows))?))
    }

    fn check(&self, what: &'static str, x: &Tensor) -> Result<()> {
        let d = self.weight.dims1()?;
        if x.dims().last() != Some(&d) {
            return Err(Error::invalid(what, format!("expected [.., {d}], got {:?}", x.dims())));
        }
        super::expect(what, x, x.rank(), "f32")
    }
}

fn same_shape(what: &'static str, dy: &Tensor, x: &Tensor) -> Result<()> {
    if dy.dims() != x.dims() {
        return Err(Error::invalid(what, format!("expected {:?}, got {:?}", x.dims(), dy.dims())));
    }
    Ok(())
}
