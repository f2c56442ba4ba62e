//! CLIP: the text encoder of Stable Diffusion, and both towers of a contrastive model.

mod config;
mod encoder;
mod model;
mod preprocess;
mod text;
mod vision;

pub use config::{ClipConfig, ClipTextConfig, ClipVisionConfig};
pub use model::ClipModel;
pub use preprocess::ClipPreprocess;
pub use text::ClipTextModel;
