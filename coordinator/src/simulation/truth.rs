//! What is true in the simulated world: which bytes an image has, and what can be seen in them. Both are
//! functions, so that everybody can tell a lie.

use fairlead_proto::v1::{
    CalibrationEnvelope, CalibrationInfo, CalibrationKey, CheckThreshold, ConceptInfo, ConceptRef,
    ImageSize, JobSpec, ModelInfo, NodeInfo,
};
use fairlead_proto::{PREPROCESSING_VERSION, PROTOCOL_VERSION};
use sha2::{Digest, Sha256};

/// The energy that every node watches with.
const ENERGY: &str = "clip";

/// The only generator.
pub(super) fn model() -> ModelInfo {
    ModelInfo {
        name: "sd".into(),
        hash: "hash-of-sd".into(),
        family: "stable-diffusion".into(),
        sampler: "ddim".into(),
        default_width: 32,
        default_height: 32,
        granularity: 4,
        max_side: 64,
        default_steps: 25,
        default_guidance_scale: 5.0,
        max_batch: 4,
        prompt_tokens: 77,
        workers: 0,
        train_timesteps: 1000,
        max_steps: 0,
    }
}

/// What a node says of itself.
pub(super) fn node(id: &str, address: &str, concepts: &[&str]) -> NodeInfo {
    let concept = |name: &&str| ConceptInfo {
        concept: Some(ConceptRef {
            name: (*name).into(),
            version: "1".into(),
            energy: ENERGY.into(),
        }),
        ..Default::default()
    };
    let key = CalibrationKey {
        generator: "hash-of-sd".into(),
        sampler: "ddim".into(),
        steps: 25,
        conditions: None,
    };
    NodeInfo {
        node_id: id.into(),
        address: address.into(),
        protocol_version: PROTOCOL_VERSION,
        preprocessing_version: PREPROCESSING_VERSION,
        kind: "contrastive".into(),
        model_name: ENERGY.into(),
        model_hash: "hash-of-clip".into(),
        concepts: concepts.iter().map(concept).collect(),
        calibrations: vec![CalibrationInfo {
            key: Some(key),
            id: "calibration-1".into(),
            crops: 4,
            window_start: 1.0,
            check_thresholds: concepts
                .iter()
                .map(|name| CheckThreshold {
                    concept: (*name).into(),
                    score: super::node::THRESHOLD,
                })
                .collect(),
            envelope: Some(CalibrationEnvelope {
                sizes: vec![ImageSize { width: 32, height: 32 }],
                guidance_least: 5.0,
                guidance_greatest: 5.0,
                negative_prompts: false,
            }),
            ..Default::default()
        }],
        ..Default::default()
    }
}

/// The pixels that a generator makes of `spec` and the image's seed.
pub(super) fn pixels(spec: &JobSpec, seed: u64) -> Vec<u8> {
    noise(&format!("{} {seed}", spec.prompt), spec.width(), spec.height())
}

/// Side of a preview.
pub(super) const PREVIEW_SIDE: u32 = 4;

/// The pixels of a preview at one step.
pub(super) fn preview(spec: &JobSpec, index: u32, step: u32) -> Vec<u8> {
    noise(&format!("{} {index} at {step}", spec.prompt), PREVIEW_SIDE, PREVIEW_SIDE)
}

fn noise(of: &str, width: u32, height: u32) -> Vec<u8> {
    let digest = Sha256::digest(of);
    digest.into_iter().cycle().take(3 * width as usize * height as usize).collect()
}

/// The pixels of a PNG.
pub(super) fn decode(png: &[u8]) -> Vec<u8> {
    let reader = png::Decoder::new(std::io::Cursor::new(png)).read_info();
    let Ok(mut reader) = reader else { return Vec::new() };
    let mut pixels = vec![0; reader.output_buffer_size().unwrap_or_default()];
    match reader.next_frame(&mut pixels) {
        Ok(_) => pixels,
        Err(_) => Vec::new(),
    }
}

/// Whether `concept` is to be seen in these pixels.
pub(super) fn shows(concept: &str, pixels: &[u8]) -> bool {
    Sha256::new().chain_update(concept).chain_update(pixels).finalize()[0] < 40
}
