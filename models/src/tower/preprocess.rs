//! How an image tower wants its pixels: `preprocessor_config.json`.

use candle_core::{Device, Tensor};

use crate::layers::Filter;
use crate::processor::{Processor, Size};
use crate::{Error, ModelFolder, Result};

/// A setting that is not done here: pictures are resized whole, so that no part of them escapes.
const HARMLESS: [&str; 1] = ["crop_pct"];

/// What happens to RGB in 0..1 before the image tower: `(x - mean) / std`, at the model's size.
#[derive(Debug, Clone, PartialEq)]
pub struct ImagePreprocess {
    /// Mean of red, green and blue in 0..1.
    pub mean: [f32; 3],
    /// Standard deviation of red, green and blue, above 0.
    pub std: [f32; 3],
    /// How pictures get to the model's size.
    pub filter: Filter,
}

impl ImagePreprocess {
    /// OpenAI's, the default of `CLIPImageProcessor`.
    pub(crate) const OPENAI: Self = Self {
        mean: [0.481_454_66, 0.457_827_5, 0.408_210_73],
        std: [0.268_629_54, 0.261_302_6, 0.275_777_1],
        filter: Filter::BicubicAntialias,
    };
    /// The default of `SiglipImageProcessor`: -1..1.
    pub(crate) const HALF: Self =
        Self { mean: [0.5; 3], std: [0.5; 3], filter: Filter::BicubicAntialias };

    /// Reads the processor's file for a model that takes images of `side` pixels; `absent` stands
    /// for fields that are not there. Whether pictures are cropped and resized is not asked: they
    /// are resized whole.
    pub(crate) fn read(folder: &ModelFolder, side: usize, absent: &Self) -> Result<Self> {
        let processor = Processor::read(folder, absent.filter, &HARMLESS)?;
        let fits =
            |size| matches!(size, Size::Shorter(n) if n == side) || size == Size::Exact([side; 2]);
        let crop = processor.crop.map(Size::Exact);
        for (field, size) in [("size", processor.size), ("crop_size", crop)] {
            if size.is_some_and(|size| !fits(size)) {
                let wanted = format!("{side}, the model's image_size");
                return Err(processor.fields.unsupported(field, wanted));
            }
        }
        Ok(Self {
            mean: processor.mean.unwrap_or(absent.mean),
            std: processor.std.unwrap_or(absent.std),
            filter: processor.filter,
        })
    }
}

/// [`ImagePreprocess`] as a layer. Its backward pass saves nothing.
#[derive(Debug)]
pub(crate) struct PixelNorm {
    preprocess: ImagePreprocess,
    side: usize,
    /// `[1, 3, 1, 1]`.
    mean: Tensor,
    /// `[1, 3, 1, 1]`.
    inverse_std: Tensor,
}

impl PixelNorm {
    pub(crate) fn new(preprocess: ImagePreprocess, side: usize, device: &Device) -> Result<Self> {
        let per_channel = |values: [f32; 3]| Tensor::new(&values, device)?.reshape((1, 3, 1, 1));
        let (mean, inverse_std) =
            (per_channel(preprocess.mean)?, per_channel(preprocess.std.map(f32::recip))?);
        Ok(Self { preprocess, side, mean, inverse_std })
    }

    pub(crate) fn preprocess(&self) -> &ImagePreprocess {
        &self.preprocess
    }

    /// RGB `[b, 3, side, side]` in 0..1, normalised; anything else is refused in the name of `what`.
    pub(crate) fn forward(&self, what: &'static str, pixels: &Tensor) -> Result<Tensor> {
        let side = self.side;
        match pixels.dims() {
            [b, 3, h, w] if *b > 0 && [*h, *w] == [side; 2] => {}
            dims => {
                let problem = format!("expected [b, 3, {side}, {side}], got {dims:?}");
                return Err(Error::invalid(what, problem));
            }
        }
        Ok(pixels.broadcast_sub(&self.mean)?.broadcast_mul(&self.inverse_std)?)
    }

    pub(crate) fn backward(&self, dy: &Tensor) -> Result<Tensor> {
        Ok(dy.broadcast_mul(&self.inverse_std)?)
    }
}
