//! Generators: the networks that turn a prompt and noise into an image. A new generator is one
//! file and one row of [`load`]'s table.

mod latent;
mod stable_diffusion;
mod stable_diffusion_3;

use std::path::Path;

use candle_core::{Device, Tensor};
use fairlead_models::{ModelFolder, PipelineFolder, Tape};
use fairlead_proto::v1::ModelInfo;

use crate::{
    error::{Error, Result},
    sampler::Sampler,
};

/// A prompt as the text encoders give it back.
pub struct EncodedText {
    /// States of each chunk, `[chunks, tokens, width]`: one tensor for encoders that see the same
    /// chunks, and one for each that cuts the prompt in its own way. The denoiser gets all of them
    /// side by side. The first one's chunks are what users hear of.
    pub parts: Vec<Tensor>,
    /// The whole prompt as one vector, `[1, d]`, for denoisers that take one.
    pub pooled: Option<Tensor>,
    /// Tokens of the prompt, marks of start and end not counted.
    pub tokens: usize,
}

/// What a denoiser is told besides latents and time.
pub struct Context {
    /// States of the text, `[b, tokens, width]`.
    pub states: Tensor,
    /// The text as one vector, `[b, d]`, where the text encoders give one.
    pub pooled: Option<Tensor>,
}

/// One generative model, used by one thread at a time. Whatever it computes for a sample depends on that
/// sample alone: neither the batch size nor the place in the batch may change a bit.
pub trait Generator: Send + Sync {
    /// What it is and what it takes.
    fn info(&self) -> &ModelInfo;

    /// Where its tensors live.
    fn device(&self) -> &Device;

    /// Its sampler.
    fn sampler(&self) -> &dyn Sampler;

    /// Things that every caller should know.
    fn notices(&self) -> &[String];

    /// Channels, height and width of the latent of a `width` x `height` image.
    fn latent_shape(&self, width: u32, height: u32) -> [usize; 3];

    /// Encodes a prompt in as many chunks as it needs; an empty one has one chunk.
    ///
    /// # Errors
    /// If the text encoder fails.
    fn encode(&self, prompt: &str) -> Result<EncodedText>;

    /// The denoiser's prediction for latents `[b, c, h, w]` at the training step `timestep`
    /// (0 to T) under `context`: `[b, c, h, w]`.
    ///
    /// # Errors
    /// If the network fails.
    fn denoise(&self, latents: &Tensor, timestep: f32, context: &Context) -> Result<Tensor>;

    /// Pixels `[b, 3, H, W]`, about -1 to 1 and not clamped, of latents as the sampler holds them.
    ///
    /// # Errors
    /// If the network fails.
    fn decode(&self, latents: &Tensor, tape: &mut Tape) -> Result<Tensor>;

    /// Pulls a gradient on the pixels `[b, 3, H, W]` back to the latents `[b, c, h, w]` of the
    /// decoding recorded on `tape`.
    ///
    /// # Errors
    /// If the tape does not hold that decoding.
    fn decode_backward(&self, dpixels: &Tensor, tape: &mut Tape) -> Result<Tensor>;
}

type Load = fn(&PipelineFolder, &str, &Device) -> Result<Box<dyn Generator>>;

/// Pipeline classes that can be served.
const TABLE: &[(&str, Load)] = &[
    ("StableDiffusionPipeline", stable_diffusion::load),
    ("StableDiffusion3Pipeline", stable_diffusion_3::load),
];

/// Loads the pipeline that `dir` stands for, see [`ModelFolder::find`], onto `device`.
///
/// # Errors
/// [`Error::Folder`] if its class is not supported or its components do not fit together,
/// [`Error::Model`] if a component cannot be loaded.
pub fn load(dir: &Path, device: &Device) -> Result<Box<dyn Generator>> {
    let (name, pipeline, load) = open(dir)?;
    load(&pipeline, &name, device)
}

/// Whether `dir` stands for a pipeline of a class that can be served, without loading it.
///
/// # Errors
/// As [`load`] on the folder and its class.
pub fn check(dir: &Path) -> Result<()> {
    open(dir).map(|_| ())
}

/// The name of the pipeline that `dir` stands for, its folder and what loads it.
fn open(dir: &Path) -> Result<(String, PipelineFolder, Load)> {
    let folder = ModelFolder::find(dir)?;
    let name = folder.name()?;
    let pipeline = PipelineFolder::open(&folder)?;
    let class = pipeline.class_name();
    match TABLE.iter().find(|(known, _)| *known == class) {
        Some((_, load)) => Ok((name, pipeline, *load)),
        None => {
            let known = TABLE.iter().map(|(known, _)| *known).collect::<Vec<_>>().join(", ");
            Err(Error::Folder {
                path: dir.to_owned(),
                reason: format!("pipeline class `{class}` is not supported; supported: {known}"),
            })
        }
    }
}

/// The name of the model that `dir` stands for: that of its folder or repository.
///
/// # Errors
/// [`Error::Model`] if there is none.
pub fn model_name(dir: &Path) -> Result<String> {
    Ok(ModelFolder::find(dir)?.name()?)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refusal(dir: &Path) -> String {
        load(dir, &Device::Cpu).err().expect("it is refused").to_string()
    }

    #[test]
    fn folders_that_cannot_be_served_say_why() {
        let dir = tempfile::tempdir().expect("a folder");
        assert!(refusal(dir.path()).contains("model_index.json"));
        let index = dir.path().join("model_index.json");
        std::fs::write(&index, r#"{"_class_name": "FluxPipeline"}"#).expect("it is written");
        let message = refusal(dir.path());
        assert!(message.contains("FluxPipeline") && message.contains("StableDiffusionPipeline"));
        assert_eq!(check(dir.path()).expect_err("it is refused").to_string(), message);
        std::fs::write(&index, r#"{"_class_name": "StableDiffusionPipeline"}"#).expect("written");
        assert!(refusal(dir.path()).contains("scheduler"));
        let unknown = r#"{"_class_name": "StableDiffusionPipeline", "unet_2": ["diffusers", "A"]}"#;
        std::fs::write(&index, unknown).expect("written");
        let message = refusal(dir.path());
        assert!(message.contains("unet_2 is [\"diffusers\",\"A\"]"), "{message}");
        assert!(model_name(&dir.path().join("none")).is_err());
    }
}
