//! Stable Diffusion 3 and 3.5: a `StableDiffusion3Pipeline` folder of diffusers.

use candle_core::{D, DType, Device, Tensor};
use fairlead_models::{
    AutoencoderKl, ClipTextModelWithProjection, ClipTokenizer, EncodedPrompt, FileTokenizer,
    PipelineFolder, Sd3Transformer, T5EncoderModel, Tape, TextConditions,
};

use super::{
    Context, EncodedText, Generator,
    latent::{Denoiser, Kind, UNUSED, assemble, check_latents, check_window, refusal},
};
use crate::{error::Result, sampler};

/// Tokens of the third text encoder; as many of zeros stand in where there is none.
const LONG_WINDOW: usize = 256;

const COMPONENTS: [&str; 9] = [
    "scheduler",
    "tokenizer",
    "tokenizer_2",
    "tokenizer_3",
    "text_encoder",
    "text_encoder_2",
    "text_encoder_3",
    "vae",
    "transformer",
];

/// A tokenizer with its text encoder.
struct Clip {
    tokenizer: ClipTokenizer,
    encoder: ClipTextModelWithProjection,
}

impl Clip {
    fn load(folder: &PipelineFolder, suffix: &str, device: &Device) -> Result<Self> {
        let component = |name: &str| folder.component(&format!("{name}{suffix}"));
        let tokenizer = ClipTokenizer::load(&component("tokenizer")?)?;
        let encoder = ClipTextModelWithProjection::load(&component("text_encoder")?, device)?;
        check_window(folder, tokenizer.max_length(), encoder.config().max_position_embeddings)?;
        Ok(Self { tokenizer, encoder })
    }

    /// States `[1, tokens, width]` of each of so many chunks, and the projection of the first,
    /// `[1, d]`.
    fn encode(&self, prompt: &EncodedPrompt, chunks: usize) -> Result<(Vec<Tensor>, Tensor)> {
        let blank = self.tokenizer.encode("")?.chunks;
        // Each chunk by itself: what is computed for one must not depend on how many there are.
        let texts = prompt
            .chunks
            .iter()
            .chain(std::iter::repeat(&blank[0]))
            .take(chunks)
            .map(|chunk| self.encoder.forward(std::slice::from_ref(chunk)))
            .collect::<Result<Vec<_>, _>>()?;
        let embeds = texts[0].embeds.clone();
        Ok((texts.into_iter().map(|text| text.penultimate).collect(), embeds))
    }
}

/// The third text encoder with its tokenizer.
struct T5 {
    tokenizer: FileTokenizer,
    encoder: T5EncoderModel,
}

impl T5 {
    /// `None` if the pipeline has none, as diffusers allows.
    fn load(folder: &PipelineFolder, device: &Device) -> Result<Option<Self>> {
        if folder.component_class("text_encoder_3").is_none() {
            return Ok(None);
        }
        let tokenizer = FileTokenizer::load(&folder.component("tokenizer_3")?, LONG_WINDOW)?;
        let encoder = T5EncoderModel::load(&folder.component("text_encoder_3")?, device)?;
        Ok(Some(Self { tokenizer, encoder }))
    }

    /// States `[chunks, 256, width]`.
    fn encode(&self, prompt: &str) -> Result<Tensor> {
        let prompt = self.tokenizer.encode(prompt)?;
        // Each chunk by itself, as with the CLIPs.
        let chunks = prompt.chunks.chunks(1).map(|chunk| self.encoder.forward(chunk));
        Ok(Tensor::cat(&chunks.collect::<Result<Vec<_>, _>>()?, 0)?)
    }
}

/// The transformer and its text encoders.
struct Network {
    clips: [Clip; 2],
    t5: Option<T5>,
    transformer: Sd3Transformer,
    device: Device,
}

/// Loads the components of `folder` and checks that they fit together.
pub(super) fn load(
    folder: &PipelineFolder,
    name: &str,
    device: &Device,
) -> Result<Box<dyn Generator>> {
    let notices = folder.account(&COMPONENTS, &UNUSED)?;
    let mut chosen = sampler::for_flow(folder)?;
    chosen.notices.extend(notices);
    let clips = [Clip::load(folder, "", device)?, Clip::load(folder, "_2", device)?];
    let vae = AutoencoderKl::load(&folder.component("vae")?, device)?;
    let t5 = T5::load(folder, device)?;
    // Without it, one token of zeros counts for the whole window.
    let repeats = if t5.is_some() { 1 } else { LONG_WINDOW };
    let transformer = Sd3Transformer::load(&folder.component("transformer")?, repeats, device)?;
    let config = transformer.config();
    check_latents(folder, &vae, "transformer", (config.in_channels, config.out_channels))?;
    fitting(folder, &clips, t5.as_ref(), &transformer)?;
    let kind = Kind {
        family: "stable-diffusion-3",
        latent_size: [config.sample_size; 2],
        latent_granularity: config.patch_size,
        max_latent_side: Some(config.pos_embed_max_size * config.patch_size),
        prompt_tokens: clips[0].tokenizer.max_length(),
        defaults: (28, 7.0),
    };
    let network = Network { clips, t5, transformer, device: device.clone() };
    assemble(folder, name, &kind, vae, chosen, Box::new(network), device)
}

/// Refuses text encoders whose states the transformer cannot take.
fn fitting(
    folder: &PipelineFolder,
    clips: &[Clip; 2],
    t5: Option<&T5>,
    transformer: &Sd3Transformer,
) -> Result<()> {
    let config = transformer.config();
    let [first, second] = clips.each_ref().map(|clip| clip.tokenizer.max_length());
    if first != second {
        return Err(refusal(
            folder,
            format!(
                "tokenizer makes windows of {first} tokens, tokenizer_2 of {second}; their states \
                 stand side by side and must be as many"
            ),
        ));
    }
    let widths = clips.each_ref().map(|clip| clip.encoder.config().hidden_size);
    let (wide, attended) = (widths.iter().sum::<usize>(), config.joint_attention_dim);
    if wide > attended {
        return Err(refusal(
            folder,
            format!(
                "the text encoders' states are {} and {} wide, more than the {attended} the \
                 transformer attends to; take all from the same model",
                widths[0], widths[1]
            ),
        ));
    }
    if let Some(width) = t5.map(|t5| t5.encoder.width()).filter(|width| *width != attended) {
        return Err(refusal(
            folder,
            format!(
                "text_encoder_3's states are {width} wide, the transformer attends to {attended}; \
                 take both from the same model"
            ),
        ));
    }
    let embeds = clips.each_ref().map(|clip| clip.encoder.projection_dim());
    if embeds.iter().sum::<usize>() != config.pooled_projection_dim {
        return Err(refusal(
            folder,
            format!(
                "the text encoders' projections are {} and {} wide, the transformer takes {} \
                 together; take all from the same model",
                embeds[0], embeds[1], config.pooled_projection_dim
            ),
        ));
    }
    Ok(())
}

impl Denoiser for Network {
    /// The states of both CLIPs side by side in each token, filled up with zeros, then T5's states or
    /// one token of zeros in their place; the projections side by side. A prompt of several chunks is
    /// pooled by its first.
    fn encode(&self, prompt: &str) -> Result<EncodedText> {
        let prompts =
            [self.clips[0].tokenizer.encode(prompt)?, self.clips[1].tokenizer.encode(prompt)?];
        let chunks = prompts[0].chunks.len().max(prompts[1].chunks.len());
        let (first, first_pooled) = self.clips[0].encode(&prompts[0], chunks)?;
        let (second, second_pooled) = self.clips[1].encode(&prompts[1], chunks)?;
        let width = self.transformer.config().joint_attention_dim;
        let states = first
            .iter()
            .zip(&second)
            .map(|(first, second)| {
                let both = Tensor::cat(&[first, second], D::Minus1)?;
                Ok(both.pad_with_zeros(D::Minus1, 0, width - both.dim(D::Minus1)?)?)
            })
            .collect::<Result<Vec<_>>>()?;
        let third = match &self.t5 {
            Some(t5) => t5.encode(prompt)?,
            None => Tensor::zeros((1, 1, width), DType::F32, &self.device)?,
        };
        Ok(EncodedText {
            parts: vec![Tensor::cat(&states, 0)?, third],
            pooled: Some(Tensor::cat(&[first_pooled, second_pooled], D::Minus1)?),
            tokens: prompts[0].tokens,
        })
    }

    fn denoise(&self, latents: &Tensor, timestep: f32, context: &Context) -> Result<Tensor> {
        let timesteps = vec![timestep; latents.dim(0)?];
        let Some(pooled) = &context.pooled else {
            return Err(fairlead_models::Error::invalid("Sd3Transformer", "no pooled text").into());
        };
        let text = TextConditions { states: &context.states, pooled };
        Ok(self.transformer.forward(latents, &timesteps, text, &mut Tape::off())?)
    }
}
