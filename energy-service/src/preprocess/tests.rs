//! Tests of what comes over the wire: good images to the byte, bad ones with a reason.

use fairlead_proto::v1::Datatype;
use proptest::prelude::*;
use tonic::Code;

use super::*;

fn png_of(
    width: u32,
    height: u32,
    set: impl FnOnce(&mut png::Encoder<'_, &mut Vec<u8>>),
) -> Vec<u8> {
    let mut bytes = Vec::new();
    let mut encoder = png::Encoder::new(&mut bytes, width, height);
    encoder.set_color(ColorType::Rgb);
    encoder.set_depth(BitDepth::Eight);
    set(&mut encoder);
    let mut writer = encoder.write_header().expect("a header");
    let data = (0..width * height * 3).map(|i| (i * 7 % 251) as u8).collect::<Vec<_>>();
    writer.write_image_data(&data).expect("pixels");
    writer.finish().expect("the end");
    bytes
}

fn refusal(png: &[u8]) -> String {
    let error = finished_image(png, 8, 8).expect_err("refused");
    assert_eq!(error.code(), Code::InvalidArgument);
    error.to_string()
}

#[test]
fn a_png_becomes_planar_pixels_between_zero_and_one() {
    let bytes = png_of(4, 3, |_| {});
    let image = finished_image(&bytes, 3, 4).expect("decoded");
    // Pixel (row 1, column 2) is the seventh: bytes 18, 19, 20 of the pattern.
    let expected = [18, 19, 20].map(|i: u32| (i * 7 % 251) as f32 / 255.0);
    let got = [0, 1, 2].map(|channel| image.pixels[channel * 12 + 6]);
    assert_eq!(got, expected);
    assert_eq!(image.sha256, hex::encode(Sha256::digest(&bytes)));
}

#[test]
fn another_size_is_resized_as_a_whole() {
    let bytes = png_of(40, 24, |_| {});
    let image = finished_image(&bytes, 8, 8).expect("decoded");
    assert_eq!(image.pixels.len(), 3 * 64);
    let full = finished_image(&bytes, 24, 40).expect("decoded");
    let mean = |values: &[f32]| values.iter().sum::<f32>() / values.len() as f32;
    assert!((mean(&image.pixels) - mean(&full.pixels)).abs() < 0.01);
}

#[test]
fn what_is_no_plain_rgb_image_is_refused() {
    let gray = {
        let mut bytes = Vec::new();
        let mut encoder = png::Encoder::new(&mut bytes, 2, 2);
        encoder.set_color(ColorType::Grayscale);
        let mut writer = encoder.write_header().expect("a header");
        writer.write_image_data(&[0; 4]).expect("pixels");
        writer.finish().expect("the end");
        bytes
    };
    assert!(refusal(&gray).contains("8-bit RGB"));
    assert!(refusal(&png_of(4, 4, |e| e.set_trns(vec![0, 1, 0, 2, 0, 3]))).contains("transparent"));
    let animated = png_of(4, 4, |e| e.set_animated(1, 0).expect("one frame"));
    assert!(refusal(&animated).contains("animated"));
    assert!(refusal(b"").contains("`png` is empty"));
    assert!(refusal(b"not a picture").contains("not a PNG"));
    let whole = png_of(32, 32, |_| {});
    assert!(refusal(&whole[..whole.len() / 2]).contains("not a PNG"));
}

#[test]
fn a_decompression_bomb_is_refused_by_its_header() {
    for (width, height) in [(100_000, 2), (8000, 8000), (u32::MAX >> 1, u32::MAX >> 1)] {
        let mut bytes = png_of(2, 2, |_| {});
        // Width and height follow the signature, length and type of IHDR; then the chunk's CRC.
        bytes[16..20].copy_from_slice(&u32::to_be_bytes(width));
        bytes[20..24].copy_from_slice(&u32::to_be_bytes(height));
        let crc = crc32(&bytes[12..29]).to_be_bytes();
        bytes[29..33].copy_from_slice(&crc);
        let text = refusal(&bytes);
        assert!(text.contains("at most") || text.contains("limit"), "{text}");
    }
}

/// CRC-32 of PNG (annex D of its specification).
fn crc32(bytes: &[u8]) -> u32 {
    let step = |crc: u32| if crc & 1 == 1 { 0xedb8_8320 ^ (crc >> 1) } else { crc >> 1 };
    !bytes.iter().fold(u32::MAX, |crc, &byte| (0..8).fold(crc ^ u32::from(byte), |c, _| step(c)))
}

#[test]
fn clean_estimates_may_overshoot_but_not_lie() {
    let tensor = |values: &[f32], shape: &[usize], datatype| {
        Some(tensor::encode("pixels", shape, values, datatype))
    };
    let values = (0..24).map(|i| i as f32 / 10.0 - 0.5).collect::<Vec<_>>();
    let shape = [2, 3, 2, 2];
    let good = tensor(&values, &shape, Datatype::F32);
    assert_eq!(clean_estimates(good.as_ref(), 2, 2, 2).expect("decoded"), values);
    let half = tensor(&values, &shape, Datatype::F16);
    let decoded = clean_estimates(half.as_ref(), 2, 2, 2).expect("decoded");
    assert!(decoded.iter().zip(&values).all(|(a, b)| (a - b).abs() < 2e-3));

    let with = |value: f32| {
        let mut values = values.clone();
        values[13] = value;
        tensor(&values, &shape, Datatype::F32)
    };
    for (pixels, part) in [
        (None, "missing"),
        (with(f32::NAN), "image 1 hold NaN"),
        (with(f32::INFINITY), "image 1 hold inf"),
        (with(255.0), "image 1 hold 255"),
        (tensor(&values, &[1, 3, 2, 4], Datatype::F32), "[2, 3, 2, 2]"),
        (tensor(&values[..12], &[1, 3, 2, 2], Datatype::F32), "one image per sample"),
        (
            good.clone().map(|mut t| {
                t.data.pop();
                t
            }),
            "bytes",
        ),
        (
            good.map(|mut t| {
                t.datatype = 7;
                t
            }),
            "datatype 7",
        ),
    ] {
        let error = clean_estimates(pixels.as_ref(), 2, 2, 2).expect_err("refused");
        assert_eq!(error.code(), Code::InvalidArgument);
        assert!(error.to_string().contains(part), "{part}: {error}");
    }
}

proptest! {
    #[test]
    fn no_bytes_make_the_decoder_panic(
        mut flips in prop::collection::vec((0usize..200, any::<u8>()), 0..6), cut in 0usize..200,
    ) {
        let mut bytes = png_of(5, 4, |_| {});
        flips.retain(|&(at, _)| at < bytes.len());
        flips.iter().for_each(|&(at, value)| bytes[at] = value);
        bytes.truncate(bytes.len().saturating_sub(cut));
        if let Ok(image) = finished_image(&bytes, 8, 8) {
            prop_assert_eq!(image.pixels.len(), 3 * 64);
        }
    }
}
