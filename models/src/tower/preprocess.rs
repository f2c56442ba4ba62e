//! How an image tower wants its pixels: `preprocessor_config.json`.

use std::path::Path;

use candle_core::{Device, Tensor};
use serde_json::Value;

use crate::config::ConfigFile;
use crate::{Error, Result};

/// Settings that say how a picture gets to RGB in 0..1, which is not done here, or only name things.
const HARMLESS: [&str; 14] = [
    "crop_pct",
    "data_format",
    "default_to_square",
    "device",
    "disable_grouping",
    "do_center_crop",
    "do_convert_rgb",
    "do_resize",
    "feature_extractor_type",
    "image_processor_type",
    "input_data_format",
    "pad_size",
    "processor_class",
    "return_tensors",
];

/// What happens to RGB in 0..1 before the image tower: `(x - mean) / std`, at the model's size.
#[derive(Debug, Clone, PartialEq)]
pub struct ImagePreprocess {
    /// Mean of red, green and blue in 0..1.
    pub mean: [f32; 3],
    /// Standard deviation of red, green and blue, above 0.
    pub std: [f32; 3],
}

impl ImagePreprocess {
    /// OpenAI's, the default of `CLIPImageProcessor`.
    pub(crate) const OPENAI: Self = Self {
        mean: [0.481_454_66, 0.457_827_5, 0.408_210_73],
        std: [0.268_629_54, 0.261_302_6, 0.275_777_1],
    };
    /// The default of `SiglipImageProcessor`: -1..1.
    pub(crate) const HALF: Self = Self { mean: [0.5; 3], std: [0.5; 3] };

    /// Reads `preprocessor_config.json`, or the `image_processor` section of the newer
    /// `processor_config.json`, for a model that takes images of `side` pixels; `absent` stands for
    /// fields that are not there.
    pub(crate) fn read(dir: &Path, side: usize, absent: &Self) -> Result<Self> {
        let (old, new) = (dir.join("preprocessor_config.json"), dir.join("processor_config.json"));
        let fields = if !old.is_file() && new.is_file() {
            ConfigFile::read(&new)?.section("image_processor", &[])?
        } else {
            ConfigFile::read(&old)?
        };
        for field in ["size", "crop_size"] {
            let fits = fields.get(field).is_none_or(|size| covers(size, side));
            if !fits {
                return Err(fields.unsupported(field, format!("{side}, the model's image_size")));
            }
        }
        if fields.get("resample").is_some_and(|filter| filter.as_u64() != Some(3)) {
            return Err(fields.unsupported("resample", "3 (bicubic)"));
        }
        let rescale = fields.number("rescale_factor", 1.0 / 255.0)?;
        if !fields.flag("do_rescale", true)? || (rescale * 255.0 - 1.0).abs() > 1e-6 {
            return Err(fields.unsupported("rescale_factor", "1/255 with do_rescale true"));
        }
        let normalize = fields.flag("do_normalize", true)?;
        let triple = |field, default| -> Result<[f32; 3]> {
            let given = fields.numbers(field, 3)?.filter(|_| normalize);
            Ok(given.map_or(default, |v| [v[0], v[1], v[2]]))
        };
        let mean = triple("image_mean", if normalize { absent.mean } else { [0.0; 3] })?;
        let std = triple("image_std", if normalize { absent.std } else { [1.0; 3] })?;
        if std.iter().any(|&s| s <= 0.0) {
            return Err(fields.unsupported("image_std", "three numbers above 0"));
        }
        fields.finish(&HARMLESS)?;
        Ok(Self { mean, std })
    }
}

/// Whether a size setting (a number, `shortest_edge`, or `height` and `width`) means this side.
fn covers(size: &Value, side: usize) -> bool {
    let side = Some(side as u64);
    let field = |name: &str| size.get(name).and_then(Value::as_u64);
    size.as_u64() == side
        || field("shortest_edge") == side
        || (field("height") == side && field("width") == side)
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
