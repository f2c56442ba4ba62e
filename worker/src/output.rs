//! Finished pictures: from pixels in -1..1 to the bytes that may leave.

use png::{BitDepth, ColorType, Compression, Encoder, EncodingError};
use sha2::{Digest, Sha256};

/// Key of the PNG text chunk with the safety record's id.
pub const RECORD_KEY: &str = "fairlead-record";

/// An RGB picture, 8 bits a channel, rows from the top, interleaved.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Rgb8 {
    /// Width in pixels.
    pub width: u32,
    /// Height in pixels.
    pub height: u32,
    /// `3 * width * height` values.
    pub data: Vec<u8>,
}

impl Rgb8 {
    /// Converts pixels `[3, height, width]` in -1..1 as diffusers' `VaeImageProcessor` does: to
    /// 0..1, clamped, times 255, rounded half to even. `None` if some value is not finite.
    pub fn from_planes(pixels: &[f32], width: u32, height: u32) -> Option<Self> {
        let plane = width as usize * height as usize;
        debug_assert_eq!(pixels.len(), 3 * plane);
        if !pixels.iter().all(|value| value.is_finite()) {
            return None;
        }
        let byte =
            |value: f32| ((value * 0.5 + 0.5).clamp(0.0, 1.0) * 255.0).round_ties_even() as u8;
        let data = (0..plane)
            .flat_map(|i| [pixels[i], pixels[plane + i], pixels[2 * plane + i]].map(byte))
            .collect();
        Some(Self { width, height, data })
    }

    /// SHA-256 of the pixels, lower-case hex.
    pub fn sha256(&self) -> String {
        sha256(&self.data)
    }

    /// Encodes the picture with `texts` as text chunks (Latin-1 where the text allows it, else
    /// UTF-8). The same picture and texts give the same bytes.
    ///
    /// # Errors
    /// If a text's keyword is not allowed in a PNG.
    pub fn to_png(&self, texts: &[(&str, &str)]) -> Result<Vec<u8>, EncodingError> {
        let mut bytes = Vec::new();
        let mut encoder = Encoder::new(&mut bytes, self.width, self.height);
        encoder.set_color(ColorType::Rgb);
        encoder.set_depth(BitDepth::Eight);
        encoder.set_compression(Compression::Balanced);
        for (key, text) in texts {
            if text.chars().all(|c| u32::from(c) < 256) {
                encoder.add_text_chunk((*key).to_owned(), (*text).to_owned())?;
            } else {
                encoder.add_itxt_chunk((*key).to_owned(), (*text).to_owned())?;
            }
        }
        let mut writer = encoder.write_header()?;
        writer.write_image_data(&self.data)?;
        writer.finish()?;
        Ok(bytes)
    }
}

/// SHA-256 of `bytes`, lower-case hex.
pub fn sha256(bytes: &[u8]) -> String {
    hex::encode(Sha256::digest(bytes))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn picture() -> Rgb8 {
        let pixels: Vec<f32> = (0..3 * 6).map(|i| i as f32 / 9.0 - 1.0).collect();
        Rgb8::from_planes(&pixels, 3, 2).expect("all values are finite")
    }

    #[test]
    fn rounding_is_numpys() {
        // numpy: ((np.float32([-1, 1, 0, -2, 2, 1/255]) / 2 + .5).clip(0, 1) * 255).round()
        let pixels = [-1.0, 1.0, 0.0, -2.0, 2.0, 1.0 / 255.0];
        let rgb = Rgb8::from_planes(&pixels, 2, 1).expect("finite");
        assert_eq!(rgb.data, [0, 128, 255, 255, 0, 128]);
    }

    #[test]
    fn a_pixel_that_is_not_finite_is_no_picture() {
        assert_eq!(Rgb8::from_planes(&[0.0, f32::NAN, 0.0], 1, 1), None);
        assert_eq!(Rgb8::from_planes(&[0.0, f32::INFINITY, 0.0], 1, 1), None);
    }

    #[test]
    fn the_png_decodes_to_the_same_pixels_and_texts() {
        let texts = [("parameters", "a café"), (RECORD_KEY, "記録")];
        let bytes = picture().to_png(&texts).expect("it encodes");
        assert_eq!(bytes, picture().to_png(&texts).expect("it encodes"));
        let mut reader =
            png::Decoder::new(std::io::Cursor::new(&bytes)).read_info().expect("a PNG");
        let mut data = vec![0; reader.output_buffer_size().expect("a small picture")];
        reader.next_frame(&mut data).expect("a frame");
        assert_eq!(data, picture().data);
        let info = reader.info();
        assert_eq!(info.uncompressed_latin1_text[0].text, "a café");
        assert_eq!(info.utf8_text[0].get_text().expect("it is not compressed"), "記録");
    }
}
