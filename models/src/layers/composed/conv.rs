//! Convolution, linear and upsampling.

use candle_core::Tensor;

use crate::layers::Conv2dConfig;
use crate::{Error, Result};

/// Numbers in the matrix of columns that candle makes of a convolution's input on a GPU. It counts
/// them in 32 bits when it starts the kernel that fills the matrix: beyond, a part would stay as it
/// was, and what lay in that memory before would become pixels (huggingface/candle 3604).
pub(crate) const MOST_COLUMNS: usize = u32::MAX as usize;

/// `x w + b` with `w` `[inputs, outputs]` on the last dimension of `x`.
pub(in crate::layers) fn linear(x: &Tensor, w: &Tensor, bias: Option<&Tensor>) -> Result<Tensor> {
    let (inputs, outputs) = w.dims2()?;
    let mut shape = x.dims().to_vec();
    let rows = x.elem_count() / inputs;
    if let Some(last) = shape.last_mut() {
        *last = outputs;
    }
    let y = x.contiguous()?.reshape((rows, inputs))?.matmul(w)?;
    let y = match bias {
        Some(bias) => y.broadcast_add(bias)?,
        None => y,
    };
    Ok(y.reshape(shape)?)
}

/// The convolution of `[b, c_in, h, w]`.
pub(in crate::layers) fn conv2d(
    x: &Tensor,
    weight: &Tensor,
    bias: Option<&Tensor>,
    config: Conv2dConfig,
) -> Result<Tensor> {
    let (before, after) = config.padding.before_after();
    let y = if before == after {
        convolve(x, weight, before, config.stride)?
    } else {
        let padded = x.pad_with_zeros(2, before, after)?.pad_with_zeros(3, before, after)?;
        convolve(&padded, weight, 0, config.stride)?
    };
    match bias {
        Some(bias) => Ok(y.broadcast_add(&bias.reshape((1, (), 1, 1))?)?),
        None => Ok(y),
    }
}

/// candle's convolution, of as many images at a time as [`MOST_COLUMNS`] allows.
fn convolve(x: &Tensor, weight: &Tensor, padding: usize, stride: usize) -> Result<Tensor> {
    let (b, c, h, w) = x.dims4()?;
    let k = weight.dim(2)?;
    let out = |side: usize| (side + 2 * padding - k) / stride + 1;
    let columns = out(h) * out(w) * c * k * k;
    let most = MOST_COLUMNS / columns.max(1);
    if most == 0 {
        return Err(Error::invalid(
            "Conv2d",
            format!(
                "{h} x {w} pixels of {c} channels make {columns} columns, more than the {MOST_COLUMNS} \
                 that this device takes; ask for a smaller image"
            ),
        ));
    }
    let part = |x: &Tensor| x.contiguous()?.conv2d(weight, padding, stride, 1, 1);
    if b <= most {
        return Ok(part(x)?);
    }
    let starts = (0..b).step_by(most);
    let parts = starts.map(|start| part(&x.narrow(0, start, most.min(b - start))?));
    Ok(Tensor::cat(&parts.collect::<candle_core::Result<Vec<_>>>()?, 0)?)
}

/// The input gradient, `[b, c_in, h, w]`: a convolution of `dy`, spread out by the stride, with the
/// flipped and transposed kernel (`conv_transpose2d` has no cuDNN path).
pub(in crate::layers) fn conv2d_backward(
    dy: &Tensor,
    weight: &Tensor,
    config: Conv2dConfig,
    h: usize,
    w: usize,
) -> Result<Tensor> {
    let k = weight.dim(2)?;
    let (before, _) = config.padding.before_after();
    if config.stride == k && before == 0 {
        return patches_backward(dy, weight, h, w);
    }
    let kernel = weight.flip(&[2, 3])?.transpose(0, 1)?.contiguous()?;
    let spread = spread(dy, config.stride)?;
    let mut dx = convolve(&spread, &kernel, k - 1, 1)?;
    for (dim, side) in [(2, h), (3, w)] {
        let missing = (before + side).saturating_sub(dx.dim(dim)?);
        dx = dx.pad_with_zeros(dim, 0, missing)?.narrow(dim, before, side)?;
    }
    Ok(dx.contiguous()?)
}

/// Non-overlapping patches: one matrix product, then the patches laid out as an image.
fn patches_backward(dy: &Tensor, weight: &Tensor, h: usize, w: usize) -> Result<Tensor> {
    let (b, c_out, ho, wo) = dy.dims4()?;
    let (_, c_in, k, _) = weight.dims4()?;
    let rows = dy.permute((0, 2, 3, 1))?.contiguous()?.reshape((b * ho * wo, c_out))?;
    let patches = rows.matmul(&weight.reshape((c_out, c_in * k * k))?)?;
    let image = patches
        .reshape((b, ho, wo, c_in, k * k))?
        .permute((0, 3, 1, 2, 4))?
        .contiguous()?
        .reshape((b * c_in * ho, wo, k, k))?
        .transpose(1, 2)?
        .contiguous()?
        .reshape((b, c_in, ho * k, wo * k))?;
    let image = image.pad_with_zeros(2, 0, h - ho * k)?.pad_with_zeros(3, 0, w - wo * k)?;
    Ok(image.contiguous()?)
}

/// `stride - 1` zeros after every row and column.
fn spread(dy: &Tensor, stride: usize) -> Result<Tensor> {
    if stride == 1 {
        return Ok(dy.clone());
    }
    let (b, c, h, w) = dy.dims4()?;
    let wide = dy
        .contiguous()?
        .reshape((b * c * h, w, 1))?
        .pad_with_zeros(2, 0, stride - 1)?
        .reshape((b * c, h, 1, w * stride))?
        .pad_with_zeros(2, 0, stride - 1)?;
    Ok(wide.contiguous()?.reshape((b, c, h * stride, w * stride))?)
}

/// Every pixel twice in both directions.
pub(in crate::layers) fn upsample2x(x: &Tensor) -> Result<Tensor> {
    let (b, c, h, w) = x.dims4()?;
    let x = x.contiguous()?.reshape((b * c, h, 1, w, 1))?.broadcast_as((b * c, h, 2, w, 2))?;
    Ok(x.contiguous()?.reshape((b, c, 2 * h, 2 * w))?)
}

/// The sum over each 2 x 2 block.
pub(in crate::layers) fn upsample2x_backward(dy: &Tensor) -> Result<Tensor> {
    let (b, c, h, w) = dy.dims4()?;
    let blocks = dy.contiguous()?.reshape((b * c, h / 2, 2, w / 2, 2))?;
    Ok(blocks.sum(4)?.sum(2)?.reshape((b, c, h / 2, w / 2))?)
}
