//! What the towers of CLIP and SigLIP share: the transformer, the way from pixels to its input, and unit
//! vectors at its end.

mod config;
mod embedding;
mod encoder;
mod preprocess;
mod unit;

pub(crate) use config::{Defaults, HARMLESS, TowerConfig, only_architecture};
pub(crate) use embedding::TokenEmbedding;
pub(crate) use encoder::{Encoder, Perceptron};
pub use preprocess::ImagePreprocess;
pub(crate) use preprocess::PixelNorm;
pub(crate) use unit::{unit, unit_backward};
