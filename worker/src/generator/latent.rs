//! What latent generators share: an autoencoder, a sampler, and a denoiser with its text encoders.

use candle_core::{Device, Tensor};
use fairlead_models::{AutoencoderKl, PipelineFolder, Tape};
use fairlead_proto::v1::ModelInfo;

use super::{Context, EncodedText, Generator};
use crate::{
    error::{Error, Result},
    sampler::{Chosen, Sampler},
};

/// Largest side offered, but never less than the model's own.
const MAX_SIDE: usize = 2048;

/// Below this side a model is one of the small ones, which want less guidance.
const SMALL_SIDE: usize = 128;

/// Components of diffusers' pipelines that change nothing in an image made from text, with what
/// users should know of each, if anything.
pub(super) const UNUSED: [(&str, &str); 3] = [
    (
        "safety_checker",
        "the concepts of the policy are checked instead, by energy nodes of every one",
    ),
    ("feature_extractor", ""),
    ("image_encoder", "images are made from text alone"),
];

/// A denoising network with its text encoders; see [`Generator`] for what the two methods promise.
pub(super) trait Denoiser: Send + Sync {
    /// [`Generator::encode`].
    fn encode(&self, prompt: &str) -> Result<EncodedText>;

    /// [`Generator::denoise`].
    fn denoise(&self, latents: &Tensor, timestep: f32, context: &Context) -> Result<Tensor>;
}

/// What is special to one kind of pipeline.
pub(super) struct Kind {
    pub(super) family: &'static str,
    /// Height and width of the latent it was trained on.
    pub(super) latent_size: [usize; 2],
    /// A latent's sides are multiples of this.
    pub(super) latent_granularity: usize,
    /// The largest side of a latent, if there is one.
    pub(super) max_latent_side: Option<usize>,
    /// Tokens in one chunk of a prompt, marks included.
    pub(super) prompt_tokens: usize,
    /// Steps and guidance scale where a request names none.
    pub(super) defaults: (u32, f32),
}

/// The same for models of few pixels.
const SMALL_DEFAULTS: (u32, f32) = (25, 5.0);

/// A latent generator on one device, f32.
struct LatentGenerator {
    info: ModelInfo,
    device: Device,
    vae: AutoencoderKl,
    chosen: Chosen,
    denoiser: Box<dyn Denoiser>,
}

/// Puts a generator together from components that fit one another.
pub(super) fn assemble(
    folder: &PipelineFolder,
    name: &str,
    kind: &Kind,
    vae: AutoencoderKl,
    chosen: Chosen,
    denoiser: Box<dyn Denoiser>,
    device: &Device,
) -> Result<Box<dyn Generator>> {
    let factor = vae.downsample_factor();
    let [height, width] = kind.latent_size.map(|side| side * factor);
    let largest = height.max(width);
    let bounds = [
        kind.max_latent_side.map(|side| side * factor),
        (!device.is_cpu()).then(|| vae.max_decoded_pixels().isqrt()),
    ];
    let (steps, guidance) = if largest < SMALL_SIDE { SMALL_DEFAULTS } else { kind.defaults };
    let info = ModelInfo {
        name: name.to_owned(),
        hash: folder.folder().hash()?,
        family: kind.family.to_owned(),
        sampler: chosen.sampler.name().to_owned(),
        default_width: width as u32,
        default_height: height as u32,
        granularity: (factor * kind.latent_granularity) as u32,
        max_side: max_side(largest, &bounds) as u32,
        default_steps: steps,
        default_guidance_scale: guidance,
        max_batch: 0,
        prompt_tokens: kind.prompt_tokens as u32,
        workers: 0,
        train_timesteps: chosen.sampler.train_timesteps(),
        max_steps: most_steps(chosen.sampler.as_ref()),
    };
    Ok(Box::new(LatentGenerator { info, device: device.clone(), vae, chosen, denoiser }))
}

/// The largest side to offer, for a model made for `largest`; what the networks cannot take bounds
/// it.
fn max_side(largest: usize, bounds: &[Option<usize>]) -> usize {
    let offered = (4 * largest).min(MAX_SIDE).max(largest);
    bounds.iter().flatten().fold(offered, |side, bound| side.min(*bound))
}

/// The longest schedule there is, of no more steps than the model was trained in.
fn most_steps(sampler: &dyn Sampler) -> u32 {
    let has_schedule = |&steps: &u32| sampler.schedule(steps).is_ok();
    (1..=sampler.train_timesteps()).rev().find(has_schedule).unwrap_or_default()
}

impl Generator for LatentGenerator {
    fn info(&self) -> &ModelInfo {
        &self.info
    }

    fn device(&self) -> &Device {
        &self.device
    }

    fn sampler(&self) -> &dyn Sampler {
        self.chosen.sampler.as_ref()
    }

    fn notices(&self) -> &[String] {
        &self.chosen.notices
    }

    fn latent_shape(&self, width: u32, height: u32) -> [usize; 3] {
        let factor = self.vae.downsample_factor();
        [self.vae.config().latent_channels, height as usize / factor, width as usize / factor]
    }

    fn encode(&self, prompt: &str) -> Result<EncodedText> {
        self.denoiser.encode(prompt)
    }

    fn denoise(&self, latents: &Tensor, timestep: f32, context: &Context) -> Result<Tensor> {
        self.denoiser.denoise(latents, timestep, context)
    }

    fn decode(&self, latents: &Tensor, tape: &mut Tape) -> Result<Tensor> {
        Ok(self.vae.decode(latents, tape)?)
    }

    fn decode_backward(&self, dpixels: &Tensor, tape: &mut Tape) -> Result<Tensor> {
        Ok(self.vae.decode_backward(dpixels, tape)?)
    }
}

/// Refuses a denoiser, `what`, that takes or predicts other latents than the autoencoder's.
pub(super) fn check_latents(
    folder: &PipelineFolder,
    vae: &AutoencoderKl,
    what: &str,
    (input, output): (usize, usize),
) -> Result<()> {
    let latent = vae.config().latent_channels;
    if latent == input && input == output {
        return Ok(());
    }
    Err(refusal(
        folder,
        format!(
            "the vae has {latent} latent channels, the {what} takes {input} and predicts {output}; \
             they must agree (inpainting and depth pipelines are not supported)"
        ),
    ))
}

/// Refuses a tokenizer whose windows its text encoder cannot take.
pub(super) fn check_window(folder: &PipelineFolder, window: usize, positions: usize) -> Result<()> {
    if window <= positions {
        return Ok(());
    }
    Err(refusal(
        folder,
        format!(
            "the tokenizer makes windows of {window} tokens, the text encoder takes {positions}"
        ),
    ))
}

/// The error for components that were not made for one another.
pub(super) fn refusal(folder: &PipelineFolder, reason: String) -> Error {
    Error::Folder { path: folder.path(), reason }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sides_are_offered_as_far_as_the_networks_go() {
        assert_eq!(max_side(512, &[None, None]), 2048);
        assert_eq!(max_side(32, &[None, None]), 128);
        assert_eq!(max_side(4096, &[None, None]), 4096, "never less than the model's own");
        assert_eq!(max_side(1024, &[Some(1536), None]), 1536);
        // Stable Diffusion's decoder on a GPU.
        assert_eq!(max_side(512, &[None, Some(1365)]), 1365);
    }
}
