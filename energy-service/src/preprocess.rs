//! From the wire to pixels: tensors of clean estimates and encoded finished images.
//!
//! Both come out as RGB, row-major `[b, 3, h, w]`, black 0 and white 1, in the scorer's size. A
//! finished image is resized as a whole (aspect ratio not kept: no part of it escapes the check)
//! with the filter that the scorer's model was trained with, the one workers use on clean
//! estimates.

use std::io::Cursor;

use candle_core::{Device, Tensor};
use fairlead_common::tensor::{self, TensorError};
use fairlead_models::layers::{Filter, resize};
use fairlead_proto::v1;
use png::{BitDepth, ColorType};
use sha2::{Digest as _, Sha256};

use crate::{error::RequestError, scorer::ScorerError};

/// Largest side of a finished image.
const MAX_SIDE: u32 = 8192;

/// Most pixels of a finished image.
const MAX_PIXELS: u64 = 1 << 24;

/// Clean estimates may overshoot black and white by this much; values beyond it come from pixels
/// in another range, e.g. 0 to 255.
const OVERSHOOT: f32 = 8.0;

/// Decodes clean estimates that must be `[images, 3, height, width]`, finite and in range.
pub(crate) fn clean_estimates(
    pixels: Option<&v1::Tensor>,
    images: usize,
    height: usize,
    width: usize,
) -> Result<Vec<f32>, RequestError> {
    let invalid = |why: String| RequestError::Invalid { field: "pixels", why };
    let pixels = pixels.ok_or_else(|| invalid("is missing".to_owned()))?;
    let expected = [images as i64, 3, height as i64, width as i64];
    if pixels.shape != expected {
        return Err(RequestError::Tensor(TensorError::Shape {
            name: "pixels".to_owned(),
            shape: pixels.shape.clone(),
            expected: format!("{expected:?}: one image per sample, in the size of Describe"),
        }));
    }
    let (_, values) = tensor::decode(pixels)?;
    let per_image = 3 * height * width;
    if let Some(at) = values.iter().position(|value| !value.is_finite()) {
        return Err(invalid(format!("of image {} hold {}", at / per_image, values[at])));
    }
    let outside = |value: &f32| *value < -OVERSHOOT || *value > 1.0 + OVERSHOOT;
    if let Some(at) = values.iter().position(outside) {
        return Err(invalid(format!(
            "of image {} hold {}; black is 0 and white is 1 (see Describe)",
            at / per_image,
            values[at]
        )));
    }
    Ok(values)
}

/// What workers are told of the filter.
pub(crate) fn on_the_wire(filter: Filter) -> v1::ResizeFilter {
    match filter {
        Filter::Nearest => v1::ResizeFilter::Nearest,
        Filter::Lanczos => v1::ResizeFilter::Lanczos,
        Filter::BilinearAntialias => v1::ResizeFilter::Bilinear,
        Filter::BicubicAntialias => v1::ResizeFilter::Bicubic,
        Filter::Box => v1::ResizeFilter::Box,
        Filter::Hamming => v1::ResizeFilter::Hamming,
    }
}

/// A finished image, ready to score.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct FinishedImage {
    /// `[3, height, width]`.
    pub(crate) pixels: Vec<f32>,
    /// SHA-256 of the encoded bytes, lower-case hex.
    pub(crate) sha256: String,
}

/// Decodes and resizes a PNG: 8-bit RGB, a single frame, nothing transparent, of bounded size. What
/// a viewer could show in another way than it is judged here is refused.
pub(crate) fn finished_image(
    png: &[u8],
    height: usize,
    width: usize,
    filter: Filter,
) -> Result<FinishedImage, RequestError> {
    if png.is_empty() {
        let why = "is empty; send the finished image".to_owned();
        return Err(RequestError::Invalid { field: "png", why });
    }
    let (h, w, rgb) = decode(png)?;
    let mut pixels = vec![0f32; rgb.len()];
    for (at, pixel) in rgb.chunks_exact(3).enumerate() {
        for (channel, &value) in pixel.iter().enumerate() {
            pixels[channel * h * w + at] = f32::from(value) / 255.0;
        }
    }
    let pixels = if (h, w) == (height, width) {
        pixels
    } else {
        let image = Tensor::from_vec(pixels, (1, 3, h, w), &Device::Cpu);
        let resized = resize(&image.map_err(ScorerError::from)?, height, width, filter);
        let resized = resized.map_err(ScorerError::from)?;
        resized.flatten_all().and_then(|t| t.to_vec1()).map_err(ScorerError::from)?
    };
    Ok(FinishedImage { pixels, sha256: hex::encode(Sha256::digest(png)) })
}

/// Height, width and interleaved RGB.
fn decode(bytes: &[u8]) -> Result<(usize, usize, Vec<u8>), RequestError> {
    let broken = |error: png::DecodingError| RequestError::Png(format!("not a PNG: {error}"));
    let limits = png::Limits { bytes: 64 << 20 };
    let decoder = png::Decoder::new_with_limits(Cursor::new(bytes), limits);
    let mut reader = decoder.read_info().map_err(broken)?;
    let info = reader.info();
    let (width, height) = (info.width, info.height);
    if width > MAX_SIDE || height > MAX_SIDE || u64::from(width) * u64::from(height) > MAX_PIXELS {
        return Err(RequestError::Png(format!(
            "{width} x {height} pixels; at most {MAX_SIDE} a side and {MAX_PIXELS} in all are judged"
        )));
    }
    if (info.color_type, info.bit_depth) != (ColorType::Rgb, BitDepth::Eight) {
        return Err(RequestError::Png(format!(
            "{:?} of {:?} bits; only 8-bit RGB is judged",
            info.color_type, info.bit_depth as u8
        )));
    }
    if info.trns.is_some() {
        return Err(RequestError::Png(
            "it has a transparent colour; only opaque images are".into(),
        ));
    }
    if info.animation_control.is_some() {
        return Err(RequestError::Png("it is animated; only single images are judged".into()));
    }
    let mut rgb = vec![0; width as usize * height as usize * 3];
    reader.next_frame(&mut rgb).map_err(broken)?;
    reader.finish().map_err(broken)?;
    Ok((height as usize, width as usize, rgb))
}

#[cfg(test)]
mod tests;
