//! One block: image and text tokens attend together, each with weights of its own (Esser et al. 2024).

use candle_core::{D, DType, Device, Tensor};

use super::attention::{JointAttention, SelfAttention};
use super::config::Sd3TransformerConfig;
use crate::layers::{Activation, LayerNorm, Linear, add, add_scaled, scale_backward, scale_shift};
use crate::weights::Scope;
use crate::{Result, Tape};

/// Epsilon of every norm.
const EPS: f64 = 1e-6;

/// Factors, shifts and gates of one kind of token, made of the condition: so many `[b, width]`.
#[derive(Debug)]
pub(super) struct Modulation {
    linear: Linear,
    parts: usize,
}

impl Modulation {
    pub(super) fn new(scope: &Scope<'_>, width: usize, parts: usize) -> Result<Self> {
        Ok(Self { linear: scope.linear("linear", width, parts * width)?, parts })
    }

    /// Of the condition after its SiLU, `[b, width]`.
    pub(super) fn forward(&self, condition: &Tensor) -> Result<Vec<Tensor>> {
        let all = self.linear.forward(condition, &mut Tape::off())?;
        all.chunk(self.parts, D::Minus1)?.iter().map(|part| Ok(part.contiguous()?)).collect()
    }
}

/// `norm(x) (1 + scale) + shift`, the norm without weights of its own.
#[derive(Debug)]
pub(super) struct ModulatedNorm(LayerNorm);

impl ModulatedNorm {
    pub(super) fn new(width: usize, device: &Device) -> Result<Self> {
        Ok(Self(LayerNorm::plain(width, EPS, device)?))
    }

    pub(super) fn forward(
        &self,
        x: &Tensor,
        shift: &Tensor,
        scale: &Tensor,
        tape: &mut Tape,
    ) -> Result<Tensor> {
        scale_shift(&self.0.forward(x, tape)?, &(scale + 1.0)?, shift, tape)
    }

    pub(super) fn backward(&self, dy: &Tensor, tape: &mut Tape) -> Result<Tensor> {
        self.0.backward(&scale_backward(dy, tape)?, tape)
    }
}

/// What follows attention for one kind of token: `x + gate output(attended)`, then
/// `x + gate feed_forward(norm(x))`.
#[derive(Debug)]
struct Rest {
    output: Linear,
    /// Of the second attention.
    second_output: Option<Linear>,
    norm: ModulatedNorm,
    widen: Linear,
    narrow: Linear,
}

impl Rest {
    fn new(
        block: &Scope<'_>,
        width: usize,
        output: Linear,
        second_output: Option<Linear>,
        feed_forward: &str,
    ) -> Result<Self> {
        let net = block.at(feed_forward).at("net");
        Ok(Self {
            norm: ModulatedNorm::new(width, block.device())?,
            output,
            second_output,
            widen: net.linear("0.proj", width, 4 * width)?,
            narrow: net.linear("2", 4 * width, width)?,
        })
    }

    fn forward(
        &self,
        x: &Tensor,
        attended: &Tensor,
        second: Option<&Tensor>,
        m: &[Tensor],
        tape: &mut Tape,
    ) -> Result<Tensor> {
        let mut x = add_scaled(x, &self.output.forward(attended, tape)?, &m[2], tape)?;
        if let (Some(output), Some(second)) = (&self.second_output, second) {
            x = add_scaled(&x, &output.forward(second, tape)?, &m[8], tape)?;
        }
        let y = self.widen.forward(&self.norm.forward(&x, &m[3], &m[4], tape)?, tape)?;
        let y = self.narrow.forward(&Activation::GeluTanh.forward(&y, tape)?, tape)?;
        add_scaled(&x, &y, &m[5], tape)
    }

    /// Gradients with respect to `x`, what attention gave, and what the second one gave.
    fn backward(&self, dy: &Tensor, tape: &mut Tape) -> Result<(Tensor, Tensor, Option<Tensor>)> {
        let d = self.narrow.backward(&scale_backward(dy, tape)?, tape)?;
        let d = self.widen.backward(&Activation::GeluTanh.backward(&d, tape)?, tape)?;
        let dx = add(dy, &self.norm.backward(&d, tape)?)?;
        let through = |output: &Linear, tape: &mut Tape| {
            let d = scale_backward(&dx, tape)?;
            output.backward(&d, tape)
        };
        let second = self.second_output.as_ref().map(|o| through(o, tape)).transpose()?;
        let attended = through(&self.output, tape)?;
        Ok((dx, attended, second))
    }
}

/// diffusers' `JointTransformerBlock`.
#[derive(Debug)]
pub(super) struct Block {
    image: Modulation,
    text: Modulation,
    norm: LayerNorm,
    attention: JointAttention,
    second: Option<SelfAttention>,
    image_rest: Rest,
    /// The last block leaves the text as it is.
    text_rest: Option<Rest>,
}

impl Block {
    pub(super) fn new(
        scope: &Scope<'_>,
        config: &Sd3TransformerConfig,
        index: usize,
        repeats: usize,
    ) -> Result<Self> {
        let width = config.width();
        let is_last = index + 1 == config.num_layers;
        let is_dual = config.dual_attention_layers.contains(&index);
        let (attn, attn2) = (scope.at("attn"), scope.at("attn2"));
        let output = attn.linear("to_out.0", width, width)?;
        let second_output = || attn2.linear("to_out.0", width, width);
        let second_output = is_dual.then(second_output).transpose()?;
        let text_rest = || {
            let output = attn.linear("to_add_out", width, width)?;
            Rest::new(scope, width, output, None, "ff_context")
        };
        let (image_parts, text_parts) = (if is_dual { 9 } else { 6 }, if is_last { 2 } else { 6 });
        Ok(Self {
            image: Modulation::new(&scope.at("norm1"), width, image_parts)?,
            text: Modulation::new(&scope.at("norm1_context"), width, text_parts)?,
            norm: LayerNorm::plain(width, EPS, scope.device())?,
            attention: JointAttention::new(&attn, config, repeats)?,
            second: is_dual.then(|| SelfAttention::new(&attn2, config)).transpose()?,
            image_rest: Rest::new(scope, width, output, second_output, "ff")?,
            text_rest: (!is_last).then(text_rest).transpose()?,
        })
    }

    /// Image `x` and text `c` under `condition` `[b, width]`, the time and pooled text after a SiLU.
    pub(super) fn forward(
        &self,
        x: &Tensor,
        c: Tensor,
        condition: &Tensor,
        tape: &mut Tape,
    ) -> Result<(Tensor, Tensor)> {
        let (m, t) = (self.image.forward(condition)?, self.text.forward(condition)?);
        // The last block's text has scale and shift in the other order.
        let (shift, scale) = if self.text_rest.is_some() { (&t[0], &t[1]) } else { (&t[1], &t[0]) };
        let normal = self.norm.forward(x, tape)?;
        let image = scale_shift(&normal, &(&m[1] + 1.0)?, &m[0], tape)?;
        let text = scale_shift(&self.norm.forward(&c, tape)?, &(scale + 1.0)?, shift, tape)?;
        let (attended, text_attended) = self.attention.forward(&image, &text, tape)?;
        let second = match &self.second {
            None => None,
            Some(attention) => {
                let image = scale_shift(&normal, &(&m[7] + 1.0)?, &m[6], tape)?;
                Some(attention.forward(&image, tape)?)
            }
        };
        let x = self.image_rest.forward(x, &attended, second.as_ref(), &m, tape)?;
        let c = match &self.text_rest {
            None => c,
            Some(rest) => rest.forward(&c, &text_attended, None, &t, tape)?,
        };
        Ok((x, c))
    }

    /// Gradients with respect to `x` and `c`, from those of what became of them.
    pub(super) fn backward(
        &self,
        dx: &Tensor,
        dc: &Tensor,
        tape: &mut Tape,
    ) -> Result<(Tensor, Tensor)> {
        let (dc, text_attended) = match &self.text_rest {
            None => (dc.clone(), Tensor::zeros(dc.dims(), DType::F32, dc.device())?),
            Some(rest) => {
                let (dc, attended, _) = rest.backward(dc, tape)?;
                (dc, attended)
            }
        };
        let (dx, attended, second) = self.image_rest.backward(dx, tape)?;
        let second = match (&self.second, second) {
            (Some(attention), Some(d)) => {
                let d = attention.backward(&d, tape)?;
                Some(scale_backward(&d, tape)?)
            }
            _ => None,
        };
        let (image, text) = self.attention.backward(&attended, &text_attended, tape)?;
        let d = scale_backward(&text, tape)?;
        let dc = add(&dc, &self.norm.backward(&d, tape)?)?;
        let mut normal = scale_backward(&image, tape)?;
        if let Some(second) = second {
            normal = add(&normal, &second)?;
        }
        Ok((add(&dx, &self.norm.backward(&normal, tape)?)?, dc))
    }
}
