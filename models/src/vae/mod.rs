//! Stable Diffusion's autoencoder: latents to pixels and back.

mod attention;
mod config;
mod decoder;
mod encoder;
mod mid;
mod model;

pub use config::AutoencoderKlConfig;
pub use model::AutoencoderKl;
