//! Stable Diffusion 1 and 2: a `StableDiffusionPipeline` folder of diffusers.

use candle_core::{Device, Tensor};
use fairlead_models::{
    AutoencoderKl, ClipTextModel, ClipTokenizer, PipelineFolder, Tape, UNet2DConditionModel,
};

use super::{
    Context, EncodedText, Generator,
    latent::{Denoiser, Kind, UNUSED, assemble, check_latents, check_window, refusal},
};
use crate::{error::Result, sampler};

/// Latent side of Stable Diffusion 1, taken where the UNet's configuration names none.
const DEFAULT_SAMPLE_SIZE: usize = 64;

/// The UNet and its text encoder.
struct Network {
    tokenizer: ClipTokenizer,
    text_encoder: ClipTextModel,
    unet: UNet2DConditionModel,
}

const COMPONENTS: [&str; 5] = ["scheduler", "tokenizer", "text_encoder", "vae", "unet"];

/// Loads the components of `folder` and checks that they fit together.
pub(super) fn load(
    folder: &PipelineFolder,
    name: &str,
    device: &Device,
) -> Result<Box<dyn Generator>> {
    let notices = folder.account(&COMPONENTS, &UNUSED)?;
    let mut chosen = sampler::for_stable_diffusion(folder)?;
    chosen.notices.extend(notices);
    let tokenizer = ClipTokenizer::load(&folder.component("tokenizer")?)?;
    let text_encoder = ClipTextModel::load(&folder.component("text_encoder")?, device)?;
    let vae = AutoencoderKl::load(&folder.component("vae")?, device)?;
    let unet = UNet2DConditionModel::load(&folder.component("unet")?, device)?;
    let config = unet.config();
    check_latents(folder, &vae, "unet", (config.in_channels, config.out_channels))?;
    check_window(folder, tokenizer.max_length(), text_encoder.config().max_position_embeddings)?;
    let width = text_encoder.config().hidden_size;
    let mut attended = config.levels.iter().map(|level| level.cross_attention_dim);
    if let Some(other) = attended.find(|&other| other != width) {
        return Err(refusal(
            folder,
            format!(
                "the text encoder's states are {width} wide, the unet attends to {other}; take both \
                 from the same model"
            ),
        ));
    }
    let kind = Kind {
        family: "stable-diffusion",
        latent_size: config.sample_size.unwrap_or([DEFAULT_SAMPLE_SIZE; 2]),
        // The UNet halves the latent at every level but the last and doubles it back.
        latent_granularity: 1 << config.levels.len().saturating_sub(1),
        max_latent_side: None,
        prompt_tokens: tokenizer.max_length(),
        defaults: (25, 7.5),
    };
    let network = Network { tokenizer, text_encoder, unet };
    assemble(folder, name, &kind, vae, chosen, Box::new(network), device)
}

impl Denoiser for Network {
    fn encode(&self, prompt: &str) -> Result<EncodedText> {
        let prompt = self.tokenizer.encode(prompt)?;
        // Each chunk by itself: what is computed for one must not depend on how many there are.
        let states = prompt
            .chunks
            .iter()
            .map(|chunk| self.text_encoder.forward(std::slice::from_ref(chunk)))
            .collect::<Result<Vec<_>, _>>()?;
        let parts = vec![Tensor::cat(&states, 0)?];
        Ok(EncodedText { parts, pooled: None, tokens: prompt.tokens })
    }

    fn denoise(&self, latents: &Tensor, timestep: f32, context: &Context) -> Result<Tensor> {
        let timesteps = vec![timestep; latents.dim(0)?];
        Ok(self.unet.forward(latents, &timesteps, &context.states, &mut Tape::off())?)
    }
}
