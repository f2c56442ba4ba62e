//! Stable Diffusion's denoiser, versions 1 and 2.

mod blocks;
mod config;
mod model;
mod transformer;

pub use config::{UNet2DConditionConfig, UNetLevel};
pub use model::UNet2DConditionModel;
