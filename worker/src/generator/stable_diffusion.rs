//! Stable Diffusion 1 and 2: a `StableDiffusionPipeline` folder of diffusers.

use std::path::Path;

use candle_core::{Device, Tensor};
use fairlead_models::{
    AutoencoderKl, ClipTextModel, ClipTokenizer, PipelineFolder, Tape, UNet2DConditionModel,
};
use fairlead_proto::v1::ModelInfo;

use super::{EncodedText, Generator};
use crate::{
    error::{Error, Result},
    sampler::{self, Sampler},
};

/// Latent side of Stable Diffusion 1, taken where the UNet's configuration names none.
const DEFAULT_SAMPLE_SIZE: usize = 64;

/// Largest side offered, but never less than the model's own.
const MAX_SIDE: usize = 2048;

/// Below this side a model is one of the small ones, which want less guidance.
const SMALL_SIDE: usize = 128;

/// A Stable Diffusion pipeline on one device, f32.
pub(super) struct StableDiffusion {
    info: ModelInfo,
    device: Device,
    tokenizer: ClipTokenizer,
    text_encoder: ClipTextModel,
    unet: UNet2DConditionModel,
    vae: AutoencoderKl,
    sampler: Box<dyn Sampler>,
    notices: Vec<String>,
}

impl StableDiffusion {
    /// Loads the components of `folder` and checks that they fit together.
    pub(super) fn load(
        folder: &PipelineFolder,
        name: &str,
        device: &Device,
    ) -> Result<Box<dyn Generator>> {
        let chosen = sampler::for_stable_diffusion(&folder.component("scheduler")?)?;
        let tokenizer = ClipTokenizer::load(&folder.component("tokenizer")?)?;
        let text_encoder = ClipTextModel::load(&folder.component("text_encoder")?, device)?;
        let vae = AutoencoderKl::load(&folder.component("vae")?, device)?;
        let unet = UNet2DConditionModel::load(&folder.component("unet")?, device)?;
        fitting(folder.path(), &tokenizer, &text_encoder, &unet, &vae)?;
        let factor = vae.downsample_factor();
        let side = unet.config().sample_size.unwrap_or(DEFAULT_SAMPLE_SIZE) * factor;
        let halvings = unet.config().levels.len().saturating_sub(1) as u32;
        let info = ModelInfo {
            name: name.to_owned(),
            hash: folder.hash()?,
            family: "stable-diffusion".to_owned(),
            sampler: chosen.sampler.name().to_owned(),
            default_width: side as u32,
            default_height: side as u32,
            // The UNet halves the latent at every level but the last and doubles it back.
            granularity: (factor << halvings) as u32,
            max_side: (4 * side).min(MAX_SIDE).max(side) as u32,
            default_steps: 25,
            default_guidance_scale: if side < SMALL_SIDE { 5.0 } else { 7.5 },
            max_batch: 0,
            prompt_tokens: tokenizer.max_length() as u32,
            workers: 0,
            train_timesteps: chosen.sampler.train_timesteps(),
        };
        Ok(Box::new(Self {
            info,
            device: device.clone(),
            tokenizer,
            text_encoder,
            unet,
            vae,
            sampler: chosen.sampler,
            notices: chosen.notices,
        }))
    }
}

/// Refuses components that were not made for one another.
fn fitting(
    path: &Path,
    tokenizer: &ClipTokenizer,
    text_encoder: &ClipTextModel,
    unet: &UNet2DConditionModel,
    vae: &AutoencoderKl,
) -> Result<()> {
    let refuse = |reason: String| Err(Error::Folder { path: path.to_owned(), reason });
    let (latent, input, output) =
        (vae.config().latent_channels, unet.config().in_channels, unet.config().out_channels);
    if latent != input || input != output {
        return refuse(format!(
            "the vae has {latent} latent channels, the unet takes {input} and predicts {output}; \
             they must agree (inpainting and depth pipelines are not supported)"
        ));
    }
    let width = text_encoder.config().hidden_size;
    let mut attended = unet.config().levels.iter().map(|level| level.cross_attention_dim);
    if let Some(other) = attended.find(|&other| other != width) {
        return refuse(format!(
            "the text encoder's states are {width} wide, the unet attends to {other}; take both \
             from the same model"
        ));
    }
    let (window, positions) =
        (tokenizer.max_length(), text_encoder.config().max_position_embeddings);
    if window > positions {
        return refuse(format!(
            "the tokenizer makes windows of {window} tokens, the text encoder takes {positions}"
        ));
    }
    Ok(())
}

impl Generator for StableDiffusion {
    fn info(&self) -> &ModelInfo {
        &self.info
    }

    fn device(&self) -> &Device {
        &self.device
    }

    fn sampler(&self) -> &dyn Sampler {
        self.sampler.as_ref()
    }

    fn notices(&self) -> &[String] {
        &self.notices
    }

    fn latent_shape(&self, width: u32, height: u32) -> [usize; 3] {
        let factor = self.vae.downsample_factor();
        [self.vae.config().latent_channels, height as usize / factor, width as usize / factor]
    }

    fn encode(&self, prompt: &str) -> Result<EncodedText> {
        let prompt = self.tokenizer.encode(prompt)?;
        // Each chunk by itself: what is computed for one must not depend on how many there are.
        let states = prompt
            .chunks
            .iter()
            .map(|chunk| self.text_encoder.forward(std::slice::from_ref(chunk)))
            .collect::<Result<Vec<_>, _>>()?;
        Ok(EncodedText { states: Tensor::cat(&states, 0)?, tokens: prompt.tokens })
    }

    fn denoise(&self, latents: &Tensor, timestep: f32, context: &Tensor) -> Result<Tensor> {
        let timesteps = vec![timestep; latents.dim(0)?];
        Ok(self.unet.forward(latents, &timesteps, context, &mut Tape::off())?)
    }

    fn decode(&self, latents: &Tensor, tape: &mut Tape) -> Result<Tensor> {
        Ok(self.vae.decode(latents, tape)?)
    }

    fn decode_backward(&self, dpixels: &Tensor, tape: &mut Tape) -> Result<Tensor> {
        Ok(self.vae.decode_backward(dpixels, tape)?)
    }
}
