//! The file that leaves: a PNG that the coordinator encodes itself, from pixels and from what it knows
//! of the job. Nothing else that a worker sent is in it.

use bytes::Bytes;
use fairlead_common::{
    parameters::{self, Parameters},
    picture::{RECORD_KEYWORD, Rgb8},
};
use fairlead_proto::{sampler_label, v1};

use crate::state::JobRecord;

/// Pictures of more bytes are encoded aside of the threads that serve calls.
const ENCODED_AT_ONCE: usize = 128 << 10;

/// A picture and the file that it would leave as.
#[derive(Debug, Clone)]
pub(super) struct FinishedFile {
    /// The file.
    pub(super) png: Bytes,
    /// SHA-256 of its RGB8 pixels, lower-case hex.
    pub(super) pixels_sha256: String,
}

impl FinishedFile {
    /// Encodes a finished image of `job`.
    pub(super) async fn of(
        job: &JobRecord,
        image: &v1::ImageInfo,
        picture: Rgb8,
    ) -> Result<Self, String> {
        let spec = job.spec();
        let text = parameters::write(&Parameters {
            steps: spec.steps(),
            sampler: sampler_label(&job.model.sampler).to_owned(),
            guidance: spec.guidance_scale(),
            seed: image.seed,
            size: (picture.width(), picture.height()),
            model_hash: job.model.hash.clone(),
            model: job.model.name.clone(),
            prompt: spec.prompt,
            negative_prompt: spec.negative_prompt,
        });
        let texts = vec![(parameters::KEYWORD, text), (RECORD_KEYWORD, image.record_id.clone())];
        Self::encode(picture, texts).await
    }

    /// Encodes a preview, which has no texts.
    pub(super) async fn preview(picture: Rgb8) -> Result<Self, String> {
        Self::encode(picture, Vec::new()).await
    }

    async fn encode(picture: Rgb8, texts: Vec<(&'static str, String)>) -> Result<Self, String> {
        let size = picture.data().len();
        let encode = move || {
            let texts: Vec<(&str, &str)> =
                texts.iter().map(|(key, text)| (*key, &**text)).collect();
            let png = picture.to_png(&texts).map_err(|error| error.to_string())?;
            Ok(Self { png: Bytes::from(png), pixels_sha256: picture.sha256() })
        };
        if size <= ENCODED_AT_ONCE {
            return encode();
        }
        tokio::task::spawn_blocking(encode).await.map_err(|error| error.to_string())?
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn job(prompt: &str) -> JobRecord {
        let spec = v1::JobSpec {
            prompt: prompt.into(),
            steps: Some(25),
            guidance_scale: Some(5.0),
            ..Default::default()
        };
        JobRecord {
            job: v1::Job { spec: Some(spec), ..Default::default() },
            model: v1::ModelInfo {
                name: "sd".into(),
                hash: "0123456789abcdef".into(),
                sampler: "ddim".into(),
                ..Default::default()
            },
            ..JobRecord::default()
        }
    }

    /// Names of a PNG's chunks, in their order.
    fn chunks(png: &[u8]) -> Vec<String> {
        let mut rest = png.strip_prefix(b"\x89PNG\r\n\x1a\n").expect("a signature");
        let mut names = Vec::new();
        while let Some((length, after)) = rest.split_first_chunk::<4>() {
            let (name, after) = after.split_at(4);
            names.push(String::from_utf8_lossy(name).into_owned());
            rest = &after[u32::from_be_bytes(*length) as usize + 4..];
        }
        names
    }

    #[tokio::test]
    async fn a_file_holds_pixels_and_the_coordinators_own_texts_alone() {
        // The larger one is encoded aside.
        for side in [4, 256] {
            let data: Vec<u8> = (0..3 * side * side).map(|i| i as u8).collect();
            let picture = Rgb8::new(side, side, data.clone()).expect("as many as it takes");
            let image = v1::ImageInfo { seed: 7, record_id: "r".into(), ..Default::default() };
            let file = FinishedFile::of(&job("a cat"), &image, picture).await.expect("it encodes");
            let mut names = chunks(&file.png);
            names.dedup();
            assert_eq!(names, ["IHDR", "tEXt", "IDAT", "IEND"]);
            let mut reader =
                png::Decoder::new(std::io::Cursor::new(&file.png)).read_info().expect("a PNG");
            let mut pixels = vec![0; reader.output_buffer_size().expect("a small picture")];
            reader.next_frame(&mut pixels).expect("a frame");
            assert_eq!(pixels, data);
            let texts = &reader.info().uncompressed_latin1_text;
            let text = format!(
                "a cat\nSteps: 25, Sampler: DDIM, CFG scale: 5, Seed: 7, Size: {side}x{side}, \
                 Model hash: 0123456789, Model: sd"
            );
            assert_eq!((&*texts[0].keyword, &*texts[0].text), ("parameters", &*text));
            assert_eq!((&*texts[1].keyword, &*texts[1].text), (RECORD_KEYWORD, "r"));
        }
    }

    #[tokio::test]
    async fn a_prompt_of_several_lines_forges_no_parameters() {
        let picture = Rgb8::new(1, 1, vec![0; 3]).expect("one pixel");
        let prompt = "a cat\nSteps: 1, Sampler: Forged, CFG scale: 1, Seed: 666";
        let file = FinishedFile::of(&job(prompt), &v1::ImageInfo::default(), picture).await;
        let png = file.expect("it encodes").png;
        let reader = png::Decoder::new(std::io::Cursor::new(&png)).read_info().expect("a PNG");
        let text = &reader.info().uncompressed_latin1_text[0].text;
        let read = parameters::read(text).expect("it reads back");
        assert_eq!((read.steps, read.seed, &*read.sampler), (25, 0, "DDIM"));
        assert_eq!(read.prompt, prompt);
        assert_eq!(text.lines().filter(|line| line.starts_with("Steps:")).count(), 1, "{text}");
    }
}
