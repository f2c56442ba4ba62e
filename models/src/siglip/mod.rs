//! SigLIP: both towers of a contrastive model whose image tower ends in an attention pool.

mod config;
mod model;
mod text;
mod vision;

pub use config::SiglipConfig;
pub use model::SiglipModel;
