//! Tests of what comes over the wire: good images to the byte, bad ones with a reason.

use fairlead_fuzz::{bounded, bounded_by, fuzz, mend_png, spoiled};
use fairlead_proto::v1::Datatype;
use proptest::prelude::any;
use prost::Message;
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
    let error = finished_image(png, 8, 8, Filter::BicubicAntialias).expect_err("refused");
    assert_eq!(error.code(), Code::InvalidArgument);
    error.to_string()
}

#[test]
fn a_png_becomes_planar_pixels_between_zero_and_one() {
    let bytes = png_of(4, 3, |_| {});
    let image = finished_image(&bytes, 3, 4, Filter::BicubicAntialias).expect("decoded");
    // Pixel (row 1, column 2) is the seventh: bytes 18, 19, 20 of the pattern.
    let expected = [18, 19, 20].map(|i: u32| (i * 7 % 251) as f32 / 255.0);
    let got = [0, 1, 2].map(|channel| image.pixels[channel * 12 + 6]);
    assert_eq!(got, expected);
    assert_eq!(image.sha256, hex::encode(Sha256::digest(&bytes)));
}

#[test]
fn another_size_is_resized_as_a_whole() {
    let bytes = png_of(40, 24, |_| {});
    let image = finished_image(&bytes, 8, 8, Filter::BicubicAntialias).expect("decoded");
    assert_eq!(image.pixels.len(), 3 * 64);
    let bilinear = finished_image(&bytes, 8, 8, Filter::BilinearAntialias).expect("decoded");
    assert_ne!(bilinear.pixels, image.pixels, "the filter is the scorer's");
    let full = finished_image(&bytes, 24, 40, Filter::BicubicAntialias).expect("decoded");
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
        // Width and height follow the signature, length and type of IHDR; then the chunk's checksum.
        bytes[16..20].copy_from_slice(&u32::to_be_bytes(width));
        bytes[20..24].copy_from_slice(&u32::to_be_bytes(height));
        mend_png(&mut bytes);
        let text = refusal(&bytes);
        assert!(text.contains("at most") || text.contains("limit"), "{text}");
    }
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

#[test]
fn spoiled_pngs_are_judged_in_full_or_refused() {
    let valid = png_of(5, 4, |encoder| {
        encoder.add_text_chunk("Title".into(), "a cat".into()).expect("a text");
    });
    // What a picture of the largest size takes as bytes and as values.
    let largest = 5 * 3 * MAX_PIXELS as usize;
    fuzz((spoiled(valid), any::<bool>()), |(bytes, mend)| {
        let mut bytes = bytes.to_vec();
        // Most changes end at a checksum; with it mended they get further.
        if mend {
            mend_png(&mut bytes);
        }
        match bounded_by(largest, || finished_image(&bytes, 8, 8, Filter::BicubicAntialias)) {
            Ok(image) => assert_eq!(image.pixels.len(), 3 * 64),
            Err(error) => assert_eq!(error.code(), Code::InvalidArgument, "{error}"),
        }
    });
}

#[test]
fn spoiled_clean_estimates_are_in_range_or_refused() {
    let values = (0..24).map(|i| i as f32 / 24.0).collect::<Vec<_>>();
    let valid = tensor::encode("pixels", &[2, 3, 2, 2], &values, Datatype::F16).encode_to_vec();
    fuzz(spoiled(valid), |bytes| {
        let Ok(tensor) = v1::Tensor::decode(&*bytes) else { return };
        match bounded(bytes.len(), || clean_estimates(Some(&tensor), 2, 2, 2)) {
            Ok(values) => {
                let sound = |value: &f32| (-OVERSHOOT..=1.0 + OVERSHOOT).contains(value);
                assert!(values.len() == 24 && values.iter().all(sound), "{values:?}");
            }
            Err(error) => assert_eq!(error.code(), Code::InvalidArgument, "{error}"),
        }
    });
}
