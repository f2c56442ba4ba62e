//! Clean estimates as pixels, and gradients on the pixels pulled back to the latents.

use candle_core::{Device, Tensor};
use fairlead_models::{
    Tape,
    layers::{Filter, resize, resize_backward},
};
use fairlead_proto::v1::{InputSpec, ResizeFilter};
use tokio_util::sync::CancellationToken;

use crate::{energy::Answer, error::Result, generator::Generator};

/// The filter between the decoder's size and an energy node's, as the node wants it. Nodes whose
/// filter is not known here are not asked.
fn filter(input: &InputSpec) -> Filter {
    match input.filter() {
        ResizeFilter::Nearest => Filter::Nearest,
        ResizeFilter::Lanczos => Filter::Lanczos,
        ResizeFilter::Bilinear => Filter::BilinearAntialias,
        ResizeFilter::Unspecified | ResizeFilter::Bicubic => Filter::BicubicAntialias,
        ResizeFilter::Box => Filter::Box,
        ResizeFilter::Hamming => Filter::Hamming,
    }
}

/// Pixels that are decoded together with everything saved for the backward pass; a decoder keeps
/// about ten kilobytes for each.
const RECORDED_PIXELS: usize = 256 * 256;

/// Pixels that are decoded together without a tape; each takes about three kilobytes meanwhile.
const PLAIN_PIXELS: usize = 4 * RECORDED_PIXELS;

/// How many images are decoded together; it bounds memory and changes no pixel.
#[derive(Debug, Clone, Copy)]
pub(super) struct Cut {
    /// So many, from the first on, are decoded on a tape: they probably need a gradient.
    recorded: usize,
    /// The rest is decoded so many at a time, at least 1.
    plain: usize,
}

impl Cut {
    /// For images of `width` x `height` pixels of which the first `likely` probably need a gradient.
    pub(super) fn new(likely: usize, width: u32, height: u32) -> Self {
        let pixels = width as usize * height as usize;
        Self {
            recorded: likely.min(RECORDED_PIXELS / pixels),
            plain: (PLAIN_PIXELS / pixels).max(1),
        }
    }
}

/// Decoded clean estimates of some images.
pub(super) struct Estimates<'a> {
    generator: &'a dyn Generator,
    latents: Vec<Vec<f32>>,
    shape: [usize; 3],
    /// `[k, 3, H, W]`, about -1 to 1, not clamped.
    pixels: Tensor,
    /// The first so many rows were decoded on this tape.
    recorded: Option<(usize, Tape)>,
    /// Ends decoding and pulling back within a layer.
    cancel: CancellationToken,
}

impl<'a> Estimates<'a> {
    /// Decodes `latents`, of `shape` each, in the parts that `cut` says.
    pub(super) fn decode(
        generator: &'a dyn Generator,
        latents: Vec<Vec<f32>>,
        shape: [usize; 3],
        cut: Cut,
        cancel: &CancellationToken,
    ) -> Result<Self> {
        let likely = cut.recorded;
        let part = |range: std::ops::Range<usize>, tape: &mut Tape| {
            let rows: Vec<&[f32]> = latents[range].iter().map(Vec::as_slice).collect();
            generator.decode(&stack(&rows, shape, generator.device())?, tape)
        };
        let all = latents.len();
        let mut parts = Vec::new();
        let mut recorded = None;
        if likely > 0 {
            let mut tape = stopped_by(Tape::recording(), cancel);
            let pixels = part(0..likely, &mut tape)?;
            parts.push(pixels);
            recorded = Some((likely, tape));
        }
        for start in (likely..all).step_by(cut.plain) {
            let mut tape = stopped_by(Tape::off(), cancel);
            parts.push(part(start..all.min(start + cut.plain), &mut tape)?);
        }
        let pixels = Tensor::cat(&parts, 0)?;
        Ok(Self { generator, latents, shape, pixels, recorded, cancel: cancel.clone() })
    }

    /// Pixels of row `row`, `[3, H, W]`.
    pub(super) fn row(&self, row: usize) -> Result<Vec<f32>> {
        Ok(self.pixels.narrow(0, row, 1)?.flatten_all()?.to_vec1()?)
    }

    /// All rows as a node wants them: `[k, 3, height, width]` in its range.
    pub(super) fn render(&self, input: &InputSpec) -> Result<Vec<f32>> {
        let (height, width) = (input.height as usize, input.width as usize);
        let pixels = if self.size()? == (height, width) {
            self.pixels.clone()
        } else {
            resize(&self.pixels, height, width, filter(input))?
        };
        let (scale, shift) = to_range(input);
        Ok(pixels.affine(scale, shift)?.flatten_all()?.to_vec1()?)
    }

    /// The gradient of the summed energies on the latents of `rows`, `[c, h, w]` each.
    pub(super) fn pull_back(mut self, answers: &[Answer], rows: &[usize]) -> Result<Vec<Vec<f32>>> {
        let dpixels = self.pixel_gradient(answers, rows)?;
        let mut gradients = vec![Vec::new(); rows.len()];
        let mut later: Vec<usize> = (0..rows.len()).collect();
        if let Some((count, mut tape)) = self.recorded.take() {
            later.retain(|&i| rows[i] >= count);
            if later.len() < rows.len() {
                let width = dpixels[0].len();
                let mut all = vec![vec![0.0; width]; count];
                for (i, &row) in rows.iter().enumerate().filter(|(_, row)| **row < count) {
                    all[row].clone_from(&dpixels[i]);
                }
                let latent = self.backward(&all, &mut tape)?;
                for (i, &row) in rows.iter().enumerate().filter(|(_, row)| **row < count) {
                    gradients[i].clone_from(&latent[row]);
                }
            }
        }
        let (height, width) = self.size()?;
        for chunk in later.chunks((RECORDED_PIXELS / (height * width)).max(1)) {
            let latents: Vec<&[f32]> =
                chunk.iter().map(|&i| self.latents[rows[i]].as_slice()).collect();
            let mut tape = stopped_by(Tape::recording(), &self.cancel);
            let x = stack(&latents, self.shape, self.generator.device())?;
            self.generator.decode(&x, &mut tape)?;
            let wanted: Vec<Vec<f32>> = chunk.iter().map(|&i| dpixels[i].clone()).collect();
            for (&i, latent) in chunk.iter().zip(self.backward(&wanted, &mut tape)?) {
                gradients[i] = latent;
            }
        }
        Ok(gradients)
    }

    fn backward(&self, dpixels: &[Vec<f32>], tape: &mut Tape) -> Result<Vec<Vec<f32>>> {
        let (height, width) = self.size()?;
        let dpixels: Vec<&[f32]> = dpixels.iter().map(Vec::as_slice).collect();
        let dy = stack(&dpixels, [3, height, width], self.generator.device())?;
        rows(&self.generator.decode_backward(&dy, tape)?)
    }

    /// The weighted sum of the gradients on the decoder's pixels of each of `rows`, `[3, H, W]`.
    fn pixel_gradient(&self, answers: &[Answer], rows: &[usize]) -> Result<Vec<Vec<f32>>> {
        let (height, width) = self.size()?;
        let mut sum: Option<Tensor> = None;
        for answer in answers {
            let Some(gradient) = &answer.gradient else { continue };
            let shape = [3, answer.input.height as usize, answer.input.width as usize];
            let size: usize = shape.iter().product();
            let picked: Vec<&[f32]> =
                rows.iter().map(|&row| &gradient[row * size..(row + 1) * size]).collect();
            let dy = stack(&picked, shape, self.generator.device())?;
            let dx = if (shape[1], shape[2]) == (height, width) {
                dy
            } else {
                resize_backward(&dy, height, width, filter(&answer.input))?
            };
            let dx = (dx * (f64::from(answer.weight) * to_range(&answer.input).0))?;
            sum = Some(match sum {
                None => dx,
                Some(sum) => (sum + dx)?,
            });
        }
        match sum {
            Some(sum) => self::rows(&sum),
            None => Ok(vec![vec![0.0; 3 * height * width]; rows.len()]),
        }
    }

    fn size(&self) -> Result<(usize, usize)> {
        let (_, _, height, width) = self.pixels.dims4()?;
        Ok((height, width))
    }
}

/// A tape for passes that end within a layer once they are cancelled.
pub(super) fn stopped_by(tape: Tape, cancel: &CancellationToken) -> Tape {
    let cancel = cancel.clone();
    tape.stopped_by(move || cancel.is_cancelled())
}

/// Scale and shift from the decoder's -1..1 to the node's range, by way of 0..1.
fn to_range(input: &InputSpec) -> (f64, f64) {
    let (low, high) = (f64::from(input.range_min), f64::from(input.range_max));
    (0.5 * (high - low), low + 0.5 * (high - low))
}

/// Rows of `shape` as one tensor `[k, ..shape]`.
pub(super) fn stack(rows: &[&[f32]], shape: [usize; 3], device: &Device) -> Result<Tensor> {
    let [c, h, w] = shape;
    Ok(Tensor::from_vec(rows.concat(), (rows.len(), c, h, w), device)?)
}

/// The rows of `[k, ..]`, flattened.
pub(super) fn rows(tensor: &Tensor) -> Result<Vec<Vec<f32>>> {
    Ok(tensor.flatten_from(1)?.to_vec2()?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        error::Error,
        generator::{Context, EncodedText},
        noise,
        sampler::Sampler,
    };
    use fairlead_proto::v1::ModelInfo;

    /// A decoder that is `tanh`, enlarged four times.
    struct Decoder;

    impl Generator for Decoder {
        fn info(&self) -> &ModelInfo {
            unreachable!("only the decoder is used")
        }

        fn device(&self) -> &Device {
            &Device::Cpu
        }

        fn sampler(&self) -> &dyn Sampler {
            unreachable!("only the decoder is used")
        }

        fn notices(&self) -> &[String] {
            &[]
        }

        fn latent_shape(&self, _: u32, _: u32) -> [usize; 3] {
            SHAPE
        }

        fn encode(&self, _: &str) -> Result<EncodedText> {
            unreachable!("only the decoder is used")
        }

        fn denoise(&self, _: &Tensor, _: f32, _: &Context) -> Result<Tensor> {
            unreachable!("only the decoder is used")
        }

        fn decode(&self, latents: &Tensor, tape: &mut Tape) -> Result<Tensor> {
            tape.go_on()?;
            let pixels = latents.tanh()?;
            tape.push(&pixels);
            let (_, _, h, w) = latents.dims4()?;
            Ok(pixels.upsample_nearest2d(4 * h, 4 * w)?)
        }

        fn decode_backward(&self, dpixels: &Tensor, tape: &mut Tape) -> Result<Tensor> {
            tape.go_on()?;
            let slope = tape.pop()?.sqr()?.affine(-1.0, 1.0)?;
            Ok(((dpixels.avg_pool2d(4)? * 16.0)? * slope)?)
        }
    }

    const SHAPE: [usize; 3] = [3, 3, 3];

    #[test]
    fn a_cancelled_decoding_ends_and_so_does_a_gradient() {
        let cut = Cut { recorded: 1, plain: 2 };
        let cancel = CancellationToken::new();
        let estimates = || Estimates::decode(&Decoder, latents(), SHAPE, cut, &cancel);
        let (first, second) = (estimates().expect("it decodes"), estimates().expect("it decodes"));
        cancel.cancel();
        assert!(matches!(estimates().err(), Some(Error::Cancelled)));
        let answers = inputs().map(answer);
        for (estimates, row) in [(first, 0), (second, 2)] {
            let ended = estimates.pull_back(&answers, &[row]);
            assert!(matches!(ended, Err(Error::Cancelled)), "row {row}");
        }
    }

    fn latents() -> Vec<Vec<f32>> {
        (0..3).map(|seed| noise::normal(seed, 27)).collect()
    }

    fn inputs() -> [InputSpec; 2] {
        let input = |side, range_min, range_max| InputSpec {
            height: side,
            width: side,
            range_min,
            range_max,
            ..Default::default()
        };
        [input(5, 0.0, 1.0), input(12, -2.0, 2.0)]
    }

    /// One node's energy of one image: a fixed weighting of what it is shown.
    fn weights(input: &InputSpec) -> Vec<f32> {
        noise::normal(u64::from(input.width), 3 * (input.height * input.width) as usize)
    }

    /// How much the node's energy counts.
    fn weight_of(input: &InputSpec) -> f32 {
        if input.width == 12 { 0.5 } else { 1.0 }
    }

    fn energy(latent: &[f32]) -> f64 {
        let estimates = Estimates::decode(
            &Decoder,
            vec![latent.to_vec()],
            SHAPE,
            Cut { recorded: 0, plain: 1 },
            &CancellationToken::new(),
        )
        .expect("it decodes");
        let of = |input: &InputSpec| -> f64 {
            let pixels = estimates.render(input).expect("it renders");
            let sum: f64 = pixels.iter().zip(weights(input)).map(|(p, w)| f64::from(p * w)).sum();
            f64::from(weight_of(input)) * sum
        };
        inputs().iter().map(of).sum()
    }

    fn answer(input: InputSpec) -> Answer {
        Answer {
            input,
            weight: weight_of(&input),
            samples: Vec::new(),
            gradient: Some(weights(&input).repeat(3)),
        }
    }

    fn gradients(likely: usize, rows: &[usize]) -> Vec<Vec<f32>> {
        let cut = Cut { recorded: likely, plain: 2 };
        Estimates::decode(&Decoder, latents(), SHAPE, cut, &CancellationToken::new())
            .and_then(|estimates| estimates.pull_back(&inputs().map(answer), rows))
            .expect("it has a gradient")
    }

    #[test]
    fn the_gradient_is_that_of_the_rendered_energies() {
        let (latents, gradients) = (latents(), gradients(0, &[0, 1, 2]));
        for (latent, gradient) in latents.iter().zip(&gradients) {
            for i in 0..latent.len() {
                let moved = |by: f32| {
                    let mut latent = latent.clone();
                    latent[i] += by;
                    energy(&latent)
                };
                let finite = (moved(1e-2) - moved(-1e-2)) / 2e-2;
                let ours = f64::from(gradient[i]);
                assert!((finite - ours).abs() < 2e-3 * ours.abs().max(1.0), "{finite} {ours}");
            }
        }
    }

    #[test]
    fn recorded_ahead_or_decoded_again_is_the_same() {
        let all = gradients(0, &[0, 1, 2]);
        for likely in 1..=3 {
            assert_eq!(gradients(likely, &[0, 1, 2]), all);
            assert_eq!(gradients(likely, &[2, 0]), [all[2].clone(), all[0].clone()]);
        }
    }

    #[test]
    fn pixels_beyond_the_range_are_shown_as_they_are() {
        let input = InputSpec { height: 12, width: 12, range_max: 1.0, ..Default::default() };
        let estimates = Estimates {
            generator: &Decoder,
            latents: Vec::new(),
            shape: SHAPE,
            pixels: Tensor::full(1.5f32, (1, 3, 12, 12), &Device::Cpu).expect("a tensor"),
            recorded: None,
            cancel: CancellationToken::new(),
        };
        assert!(estimates.render(&input).expect("it renders").iter().all(|&v| v == 1.25));
    }
}
