//! Drawing: contact sheets of images with captions and score curves, as PNG.

use std::convert::Infallible;

use anyhow::{Context, Result, ensure};
use embedded_graphics::{
    Drawable, Pixel,
    draw_target::DrawTarget,
    geometry::{OriginDimensions, Point, Size},
    mono_font::{MonoTextStyle, ascii::FONT_6X10},
    pixelcolor::{Rgb888, RgbColor},
    primitives::{Line, Polyline, Primitive, PrimitiveStyle, Rectangle},
    text::{Baseline, Text},
};

/// Height of one line of text, pixels.
pub(crate) const LINE: i32 = 12;
/// Width of one character, pixels.
const CHARACTER: usize = 6;

/// Largest picture that is read: that of 4,096 pixels a side.
const MAX_BYTES: usize = 3 << 24;

/// An RGB picture held in memory.
pub(crate) struct Picture {
    pub(crate) width: usize,
    pub(crate) height: usize,
    /// RGB8, row by row.
    pub(crate) rgb: Vec<u8>,
}

impl Picture {
    /// A picture filled with `color`.
    pub(crate) fn new(width: usize, height: usize, color: Rgb888) -> Self {
        let rgb = [color.r(), color.g(), color.b()].repeat(width * height);
        Self { width, height, rgb }
    }

    /// Decodes an RGB8 PNG.
    pub(crate) fn from_png(bytes: &[u8]) -> Result<Self> {
        let mut reader = png::Decoder::new(std::io::Cursor::new(bytes)).read_info()?;
        let size = reader.output_buffer_size().filter(|&size| size <= MAX_BYTES);
        let size = size.with_context(|| format!("the image has more than {MAX_BYTES} bytes"))?;
        let mut rgb = vec![0; size];
        let info = reader.next_frame(&mut rgb)?;
        ensure!(
            info.color_type == png::ColorType::Rgb && info.bit_depth == png::BitDepth::Eight,
            "the image is not RGB8"
        );
        Ok(Self { width: info.width as usize, height: info.height as usize, rgb })
    }

    pub(crate) fn to_png(&self) -> Result<Vec<u8>> {
        let mut bytes = Vec::new();
        let mut encoder = png::Encoder::new(&mut bytes, self.width as u32, self.height as u32);
        encoder.set_color(png::ColorType::Rgb);
        encoder.set_depth(png::BitDepth::Eight);
        encoder.write_header()?.write_image_data(&self.rgb)?;
        Ok(bytes)
    }

    /// Draws `image` into a square of `side` pixels, by nearest neighbour.
    pub(crate) fn paste(&mut self, image: &Picture, left: i32, top: i32, side: usize) {
        for y in 0..side {
            for x in 0..side {
                let source = (y * image.height / side * image.width + x * image.width / side) * 3;
                let pixel = &image.rgb[source..source + 3];
                self.set(
                    Point::new(left + x as i32, top + y as i32),
                    Rgb888::new(pixel[0], pixel[1], pixel[2]),
                );
            }
        }
    }

    /// Writes `text` from `(left, top)`, broken between words into lines of at most `width`
    /// pixels; returns the number of lines.
    pub(crate) fn text(
        &mut self,
        text: &str,
        left: i32,
        top: i32,
        width: usize,
        color: Rgb888,
    ) -> usize {
        let lines = wrap(text, width / CHARACTER);
        let style = MonoTextStyle::new(&FONT_6X10, color);
        for (row, line) in lines.iter().enumerate() {
            let at = Point::new(left, top + LINE * row as i32);
            let Ok(_) = Text::with_baseline(line, at, style, Baseline::Top).draw(self);
        }
        lines.len()
    }

    /// Draws a filled rectangle.
    pub(crate) fn fill(&mut self, left: i32, top: i32, width: u32, height: u32, color: Rgb888) {
        let Ok(()) = Rectangle::new(Point::new(left, top), Size::new(width, height))
            .into_styled(PrimitiveStyle::with_fill(color))
            .draw(self);
    }

    /// Draws a straight line.
    pub(crate) fn line(&mut self, from: Point, to: Point, color: Rgb888) {
        let Ok(()) =
            Line::new(from, to).into_styled(PrimitiveStyle::with_stroke(color, 1)).draw(self);
    }

    /// Draws a line through `points`.
    pub(crate) fn polyline(&mut self, points: &[Point], color: Rgb888) {
        let Ok(()) =
            Polyline::new(points).into_styled(PrimitiveStyle::with_stroke(color, 2)).draw(self);
    }

    fn set(&mut self, at: Point, color: Rgb888) {
        let (Ok(x), Ok(y)) = (usize::try_from(at.x), usize::try_from(at.y)) else { return };
        if x < self.width && y < self.height {
            let start = (y * self.width + x) * 3;
            self.rgb[start..start + 3].copy_from_slice(&[color.r(), color.g(), color.b()]);
        }
    }
}

impl OriginDimensions for Picture {
    fn size(&self) -> Size {
        Size::new(self.width as u32, self.height as u32)
    }
}

impl DrawTarget for Picture {
    type Color = Rgb888;
    type Error = Infallible;

    fn draw_iter<I: IntoIterator<Item = Pixel<Rgb888>>>(
        &mut self,
        pixels: I,
    ) -> Result<(), Infallible> {
        for Pixel(at, color) in pixels {
            self.set(at, color);
        }
        Ok(())
    }
}

/// Breaks `text` between words into lines of at most `columns` characters; a longer word is cut.
fn wrap(text: &str, columns: usize) -> Vec<String> {
    let columns = columns.max(1);
    let mut lines: Vec<String> = Vec::new();
    for word in text.split_whitespace() {
        let word: String = word.chars().take(columns).collect();
        match lines.last_mut() {
            Some(line) if line.chars().count() + 1 + word.chars().count() <= columns => {
                line.push(' ');
                line.push_str(&word);
            }
            _ => lines.push(word),
        }
    }
    lines
}

#[cfg(test)]
mod tests {
    use super::*;
    use fairlead_fuzz::{bounded_by, fuzz, mend_png, spoiled};
    use proptest::prelude::*;

    #[test]
    fn pictures_survive_png_and_enlarge_by_whole_pixels() {
        let mut small = Picture::new(2, 1, Rgb888::WHITE);
        small.set(Point::new(1, 0), Rgb888::RED);
        let small = Picture::from_png(&small.to_png().expect("it encodes")).expect("it decodes");
        let mut large = Picture::new(5, 4, Rgb888::BLACK);
        large.paste(&small, 1, 0, 4);
        let row: Vec<&[u8]> = large.rgb[..15].chunks(3).collect();
        let (black, white, red) = (&[0, 0, 0], &[255, 255, 255], &[255, 0, 0]);
        assert_eq!(row, [black, white, white, red, red].map(|pixel| &pixel[..]));
    }

    proptest! {
        #[test]
        fn wrapped_lines_fit_and_drawing_stays_inside(text in ".{0,80}", width in 0usize..90) {
            let columns = (width / CHARACTER).max(1);
            prop_assert!(wrap(&text, columns).iter().all(|l| l.chars().count() <= columns));
            let mut picture = Picture::new(20, 20, Rgb888::WHITE);
            picture.text(&text, -5, 10, width, Rgb888::BLACK);
            prop_assert_eq!(picture.rgb.len(), 1200);
        }
    }

    #[test]
    fn a_picture_larger_than_memory_is_refused_by_its_header() {
        let mut png = Picture::new(5, 4, Rgb888::WHITE).to_png().expect("it encodes");
        // Width and height follow the signature and the length and type of the first chunk.
        png[16..20].copy_from_slice(&u32::to_be_bytes(100_000));
        png[20..24].copy_from_slice(&u32::to_be_bytes(100_000));
        mend_png(&mut png);
        let refused = bounded_by(1 << 20, || Picture::from_png(&png)).err().expect("it is refused");
        assert!(refused.to_string().contains("more than 50331648 bytes"), "{refused}");
    }

    #[test]
    fn spoiled_pictures_are_whole_or_refused() {
        let valid = Picture::new(5, 4, Rgb888::WHITE).to_png().expect("it encodes");
        fuzz((spoiled(valid), any::<bool>()), |(bytes, mend)| {
            let mut bytes = bytes.to_vec();
            if mend {
                mend_png(&mut bytes);
            }
            if let Ok(picture) = bounded_by(MAX_BYTES + (2 << 20), || Picture::from_png(&bytes)) {
                assert_eq!(picture.rgb.len(), 3 * picture.width * picture.height);
            }
        });
    }
}
