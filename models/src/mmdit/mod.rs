//! The multimodal diffusion transformer of Stable Diffusion 3 and 3.5.

mod attention;
mod block;
mod config;
mod model;
mod patches;

pub use config::Sd3TransformerConfig;
pub use model::{Sd3Transformer, TextConditions};
