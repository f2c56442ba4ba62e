//! Vectors of length 1, between which a scalar product is a cosine.

use candle_core::{D, Tensor};

use crate::{Error, Result, Tape};

/// `y = x / |x|` along the last dimension. Saves `y` and `|x|`.
pub(crate) fn unit(x: &Tensor, tape: &mut Tape) -> Result<Tensor> {
    let norm = x.sqr()?.sum_keepdim(D::Minus1)?.sqrt()?;
    let y = x.broadcast_div(&norm)?;
    tape.push(&y);
    tape.push(&norm);
    Ok(y)
}

/// `dx = (dy - y (y . dy)) / |x|`.
pub(crate) fn unit_backward(dy: &Tensor, tape: &mut Tape) -> Result<Tensor> {
    let (norm, y) = (tape.pop()?, tape.pop()?);
    if dy.dims() != y.dims() {
        let problem = format!("expected {:?}, got {:?}", y.dims(), dy.dims());
        return Err(Error::invalid("image_features_backward", problem));
    }
    let along = (dy * &y)?.sum_keepdim(D::Minus1)?;
    Ok((dy - y.broadcast_mul(&along)?)?.broadcast_div(&norm)?)
}
