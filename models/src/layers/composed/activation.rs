//! Activations and their slopes.

use std::f64::consts::{FRAC_1_SQRT_2, FRAC_2_PI, PI};

use candle_core::Tensor;

use crate::Result;
use crate::layers::Activation;

/// Factor of `x` in the sigmoid of [`Activation::GeluQuick`].
const QUICK: f64 = 1.702;
/// Factor of the cube in [`Activation::GeluTanh`].
const CUBIC: f64 = 0.044715;

/// `f(x)`, element by element.
pub(in crate::layers) fn activation(kind: Activation, x: &Tensor) -> Result<Tensor> {
    Ok(match kind {
        Activation::GeluErf => (x * normal_cdf(x)?)?,
        Activation::GeluTanh => (x * half_one_plus_tanh(x)?)?,
        Activation::GeluQuick => (x * sigmoid(&(x * QUICK)?)?)?,
        Activation::Silu => (x * sigmoid(x)?)?,
    })
}

/// `f'(x)`, element by element.
pub(in crate::layers) fn activation_slope(kind: Activation, x: &Tensor) -> Result<Tensor> {
    Ok(match kind {
        Activation::GeluErf => {
            let density = ((x.sqr()? * -0.5)?.exp()? * (1.0 / (2.0 * PI).sqrt()))?;
            (normal_cdf(x)? + (x * density)?)?
        }
        Activation::GeluTanh => {
            let p = half_one_plus_tanh(x)?;
            let inner = ((x.sqr()? * (3.0 * CUBIC))? + 1.0)?;
            let spread = (&p * (1.0 - &p)?)?;
            (&p + (((x * spread)? * inner)? * (2.0 * FRAC_2_PI.sqrt()))?)?
        }
        Activation::GeluQuick => sigmoid_product_slope(x, QUICK)?,
        Activation::Silu => sigmoid_product_slope(x, 1.0)?,
    })
}

/// The slope of `x sigmoid(a x)`: `s + a x s (1 - s)`.
fn sigmoid_product_slope(x: &Tensor, a: f64) -> Result<Tensor> {
    let s = sigmoid(&(x * a)?)?;
    let spread = (&s * (1.0 - &s)?)?;
    Ok((&s + ((x * spread)? * a)?)?)
}

fn sigmoid(x: &Tensor) -> Result<Tensor> {
    Ok(((x.neg()?.exp()? + 1.0)?).recip()?)
}

fn normal_cdf(x: &Tensor) -> Result<Tensor> {
    Ok((((x * FRAC_1_SQRT_2)?.erf()? + 1.0)? * 0.5)?)
}

fn half_one_plus_tanh(x: &Tensor) -> Result<Tensor> {
    let cube = ((x.sqr()? * x)? * CUBIC)?;
    Ok((((((x + cube)? * FRAC_2_PI.sqrt())?.tanh()?) + 1.0)? * 0.5)?)
}
