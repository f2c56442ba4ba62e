//! CLIP: the text encoders of Stable Diffusion, and both towers of a contrastive model.

mod config;
mod model;
pub(crate) mod open_clip;
mod projected;
mod text;
mod vision;

pub use config::{ClipConfig, ClipTextConfig, ClipVisionConfig};
pub use model::ClipModel;
pub use projected::{ClipTextModelWithProjection, ProjectedText};
pub use text::ClipTextModel;
