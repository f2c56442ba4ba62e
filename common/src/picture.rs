//! Pictures: 8-bit RGB pixels, and the one way in which they become a file.

use png::{BitDepth, ColorType, Compression, Encoder, EncodingError};
use sha2::{Digest, Sha256};

/// Keyword of the PNG text chunk with the safety record's id.
pub const RECORD_KEYWORD: &str = "fairlead-record";

/// An RGB picture, 8 bits a channel, rows from the top, interleaved.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Rgb8 {
    width: u32,
    height: u32,
    data: Vec<u8>,
}

impl Rgb8 {
    /// The picture of `data`. `None` unless it is exactly `3 * width * height` values, at least one
    /// pixel.
    pub fn new(width: u32, height: u32, data: Vec<u8>) -> Option<Self> {
        let pixels = u64::from(width) * u64::from(height);
        let fits = pixels > 0 && pixels.checked_mul(3) == u64::try_from(data.len()).ok();
        fits.then_some(Self { width, height, data })
    }

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

    /// Width in pixels.
    pub fn width(&self) -> u32 {
        self.width
    }

    /// Height in pixels.
    pub fn height(&self) -> u32 {
        self.height
    }

    /// `3 * width * height` values.
    pub fn data(&self) -> &[u8] {
        &self.data
    }

    /// `3 * width * height` values.
    pub fn into_data(self) -> Vec<u8> {
        self.data
    }

    /// SHA-256 of the pixels, lower-case hex.
    pub fn sha256(&self) -> String {
        sha256(&self.data)
    }

    /// Encodes the picture with `texts` as text chunks (Latin-1 where the text allows it, else
    /// UTF-8): a signature, IHDR, the texts, IDAT and IEND, nothing else. The same picture and texts
    /// give the same bytes.
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
    fn bytes_of_another_number_are_no_picture() {
        assert!(Rgb8::new(2, 3, vec![0; 18]).is_some());
        for (width, height, bytes) in
            [(2, 3, 17), (2, 3, 19), (0, 3, 0), (2, 0, 0), (u32::MAX, u32::MAX, 3)]
        {
            assert_eq!(Rgb8::new(width, height, vec![0; bytes]), None, "{width}x{height}");
        }
    }

    #[test]
    fn the_png_decodes_to_the_same_pixels_and_texts() {
        let texts = [("parameters", "a café"), (RECORD_KEYWORD, "記録")];
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
