//! Fully connected layer.

use std::sync::{Arc, OnceLock};

use candle_core::Tensor;

use super::cpu::{build, floats};
use super::{composed, use_kernels};
use crate::kernels::product;
use crate::{Error, Result, Tape};

/// `y = x W^T + b` on the last dimension, with any leading dimensions.
#[derive(Debug, Clone)]
pub struct Linear {
    weight: Tensor,
    bias: Option<Tensor>,
    inputs: usize,
    outputs: usize,
    /// The weight laid out for the forward and the backward kernel, made when first needed.
    packed: Arc<[OnceLock<Vec<f32>>; 2]>,
}

impl Linear {
    /// A layer from its weight `[outputs, inputs]` and bias `[outputs]`.
    ///
    /// # Errors
    /// When the shapes do not fit or the weight is not `f32`.
    pub fn new(weight: Tensor, bias: Option<Tensor>) -> Result<Self> {
        super::expect("Linear weight", &weight, 2, "[outputs, inputs]")?;
        let (outputs, inputs) = weight.dims2()?;
        super::expect_bias("Linear bias", bias.as_ref(), outputs)?;
        let bias = bias.map(|bias| bias.contiguous()).transpose()?;
        Ok(Self { weight: weight.contiguous()?, bias, inputs, outputs, packed: Arc::default() })
    }

    /// `[.., inputs]` -> `[.., outputs]`. Saves nothing.
    ///
    /// # Errors
    /// When the last dimension is not `inputs`.
    pub fn forward(&self, x: &Tensor, tape: &mut Tape) -> Result<Tensor> {
        tape.go_on()?;
        self.check("Linear::forward", x, self.inputs)?;
        if !use_kernels(x.device()) {
            return composed::linear(x, &self.weight.t()?, self.bias.as_ref());
        }
        let (x, weight) = (x.contiguous()?, floats(&self.weight)?);
        let packed =
            self.packed[0].get_or_init(|| product::pack_linear(&weight, self.outputs, self.inputs));
        let bias = self.bias.as_ref().map(floats).transpose()?;
        let rows = x.elem_count() / self.inputs;
        let values = floats(&x)?;
        build(self.shape(&x, self.outputs), |y| {
            product::linear(&values, packed, bias.as_deref(), [rows, self.outputs, self.inputs], y);
        })
    }

    /// `[.., outputs]` -> `[.., inputs]`: `dx = dy W`.
    ///
    /// # Errors
    /// When the last dimension is not `outputs`.
    pub fn backward(&self, dy: &Tensor, tape: &mut Tape) -> Result<Tensor> {
        tape.go_on()?;
        self.check("Linear::backward", dy, self.outputs)?;
        if !use_kernels(dy.device()) {
            return composed::linear(dy, &self.weight, None);
        }
        let (dy, weight) = (dy.contiguous()?, floats(&self.weight)?);
        let packed = self.packed[1]
            .get_or_init(|| product::pack_linear_backward(&weight, self.outputs, self.inputs));
        let rows = dy.elem_count() / self.outputs;
        let values = floats(&dy)?;
        build(self.shape(&dy, self.inputs), |dx| {
            product::linear(&values, packed, None, [rows, self.inputs, self.outputs], dx);
        })
    }

    /// The shape of `x` with another last dimension.
    fn shape(&self, x: &Tensor, last: usize) -> Vec<usize> {
        let mut shape = x.dims().to_vec();
        if let Some(width) = shape.last_mut() {
            *width = last;
        }
        shape
    }

    fn check(&self, what: &'static str, x: &Tensor, last: usize) -> Result<()> {
        if x.dims().last() != Some(&last) {
            return Err(Error::invalid(what, format!("expected [.., {last}], got {:?}", x.dims())));
        }
        super::expect(what, x, x.rank(), "f32")
    }
}
