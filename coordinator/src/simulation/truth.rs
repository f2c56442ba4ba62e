//! What is true in the simulated world: which bytes an image has, and what can be seen in them. Both are
//! functions, so that everybody can tell a lie.

use fairlead_proto::v1::{
    CalibrationEnvelope, CalibrationInfo, CalibrationKey, ConceptInfo, ConceptRef, ImageSize,
    JobSpec, ModelInfo, NodeInfo,
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

/// The image that a generator makes of `spec` and the image's seed: a PNG as far as its header.
pub(super) fn png(spec: &JobSpec, seed: u64) -> Vec<u8> {
    let mut png = b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR".to_vec();
    png.extend(spec.width().to_be_bytes());
    png.extend(spec.height().to_be_bytes());
    png.extend(Sha256::digest(format!("{} {seed}", spec.prompt)));
    png
}

/// Whether `concept` is to be seen in the image.
pub(super) fn shows(concept: &str, png: &[u8]) -> bool {
    Sha256::new().chain_update(concept).chain_update(png).finalize()[0] < 40
}
