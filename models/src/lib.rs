//! Every neural network of Fairlead, with frozen weights, and nothing else.
//!
//! # What is where
//! | | |
//! |---|---|
//! | [`layers`] | convolution, linear, norms, attention, activations, upsampling, resizing: forward and input gradient |
//! | [`ClipTextModel`], [`ClipModel`], [`SiglipModel`] | the text encoder of Stable Diffusion; both towers of a contrastive model |
//! | [`AutoencoderKl`] | latents to pixels with a gradient, pixels to latents |
//! | [`UNet2DConditionModel`], [`Sd3Transformer`] | the denoisers of Stable Diffusion 1 and 2, and 3 |
//! | [`T5EncoderModel`] | the third text encoder of Stable Diffusion 3, candle-transformers' network |
//! | [`Judge`], [`OnnxClassifier`] | classifiers that measure and never steer: Emojiland's own, and those of others |
//! | [`ClipTokenizer`] | token for token transformers' `CLIPTokenizer`, long prompts in several windows |
//! | [`PipelineFolder`] | a diffusers folder |
//! | [`ModelFolder`] | the files that a model is loaded from, and the hash of them that identifies it |
//!
//! Networks are read from the folders of **diffusers** and **transformers** (`config.json` and safetensors files in f32,
//! f16 or bf16, computed in f32). Loading is strict: a setting that is not supported, a key that is
//! missing, unexpected, of another shape or not finite is an [`Error`] that names it, and nothing is loaded.
//! No weight is ever made up.
//!
//! # Gradients without autograd
//! Steering needs `dE/dlatent` through the decoder and an energy model, with weights that never change. Each
//! layer and network therefore has two methods: `forward(x, tape)`, which saves on the [`Tape`] what the way
//! back needs, and `backward(dy, tape)`, the vector-Jacobian product, which takes it off again in
//! reverse order. Memory falls while the gradient is computed, nothing is ever computed for a weight, and a
//! forward pass with [`Tape::off`] saves nothing.
//!
//! candle's own autograd is not used. Several of its operations (fused softmax, layer norm, rotary
//! embeddings) cut the graph without an error, others give wrong gradients (nearest upsampling of an input
//! used twice, some pooling), gradients are computed for frozen weights too, and every activation lives until
//! the end. Here each layer and network is tested against torch and against finite differences.
//!
//! ```
//! # use fairlead_models::{AutoencoderKl, Result, Tape};
//! # use candle_core::{Device, Tensor};
//! # fn steer(dir: &std::path::Path, latent: &Tensor, energy_gradient: impl Fn(&Tensor) -> Tensor) -> Result<Tensor> {
//! let vae = AutoencoderKl::load(dir, &Device::Cpu)?;
//! let mut tape = Tape::recording();
//! let pixels = vae.decode(latent, &mut tape)?;
//! let dpixels = energy_gradient(&pixels);
//! vae.decode_backward(&dpixels, &mut tape)
//! # }
//! ```
//!
//! # Devices and determinism
//! On the CPU the layers run kernels of their own; on other devices the same layers are composed of candle's
//! operations ([`DeviceName`] opens them; CUDA takes the feature `cuda`). On the CPU a sample's numbers depend neither
//! on its batch nor on the number of threads; elsewhere that is the library's to promise.

mod attend;
mod classifier;
mod clip;
mod config;
mod contrastive;
mod device;
mod error;
mod folder;
mod hub;
mod judge;
mod kernels;
pub mod layers;
mod mmdit;
mod parts;
mod picture;
mod pipeline;
mod processor;
mod resnet;
mod siglip;
mod t5;
mod tape;
mod time;
mod tokenizer;
mod tower;
mod unet;
mod vae;
mod variants;
mod weights;

pub use classifier::OnnxClassifier;
pub use clip::{
    ClipConfig, ClipModel, ClipTextConfig, ClipTextModel, ClipTextModelWithProjection,
    ClipVisionConfig, ProjectedText,
};
pub use config::ConfigFile;
pub use contrastive::{ContrastiveModel, load_contrastive};
pub use device::DeviceName;
pub use error::{Error, KeyProblems, Result};
pub use folder::ModelFolder;
pub use judge::Judge;
pub use kernels::prepare_process;
pub use mmdit::{Sd3Transformer, Sd3TransformerConfig, TextConditions};
pub use pipeline::PipelineFolder;
pub use siglip::{SiglipConfig, SiglipModel};
pub use t5::T5EncoderModel;
pub use tape::Tape;
pub use tokenizer::{ClipTokenizer, EncodedPrompt, FileTokenizer};
pub use tower::ImagePreprocess;
pub use unet::{UNet2DConditionConfig, UNet2DConditionModel, UNetLevel};
pub use vae::{AutoencoderKl, AutoencoderKlConfig};
