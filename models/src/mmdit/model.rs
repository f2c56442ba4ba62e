//! The denoiser.

use candle_core::{Device, Tensor};

use super::block::{Block, ModulatedNorm, Modulation};
use super::config::Sd3TransformerConfig;
use super::patches::{PatchEmbedding, patch, unpatch};
use crate::layers::{Activation, Linear};
use crate::time::{ConditionMlp, TimeEmbedding, Waves};
use crate::{Error, ModelFolder, Result, Tape, weights};

/// How diffusers embeds the time step of this model.
const WAVES: Waves = Waves { width: 256, flip_sin_to_cos: true, freq_shift: 0.0 };

/// The text as [`Sd3Transformer`] takes it.
#[derive(Debug, Clone, Copy)]
pub struct TextConditions<'a> {
    /// States of the tokens, `[b, n, joint_attention_dim]`.
    pub states: &'a Tensor,
    /// The whole text, `[b, pooled_projection_dim]`.
    pub pooled: &'a Tensor,
}

/// diffusers' `SD3Transformer2DModel`.
///
/// Sampling runs it forward only. Its input gradient is here because it proves every layer inside.
#[derive(Debug)]
pub struct Sd3Transformer {
    config: Sd3TransformerConfig,
    patches: PatchEmbedding,
    time: TimeEmbedding,
    pooled: ConditionMlp,
    text: Linear,
    blocks: Vec<Block>,
    modulation_out: Modulation,
    norm_out: ModulatedNorm,
    proj_out: Linear,
}

impl Sd3Transformer {
    /// Reads a diffusers folder: `config.json` and `diffusion_pytorch_model.safetensors` (or its shards).
    ///
    /// The last text token stands for `repeats` equal ones (1: for itself). Text tokens have no position, so
    /// equal ones stay equal from the first block to the last: without a third text encoder diffusers
    /// appends 256 tokens of zeros, and one token that counts 256 times is the same.
    ///
    /// # Errors
    /// When a file is missing or malformed, a setting is not supported, or the weights do not fit it.
    pub fn load(dir: impl Into<ModelFolder>, repeats: usize, device: &Device) -> Result<Self> {
        let folder = dir.into();
        let config = Sd3TransformerConfig::read(&folder.file("config.json"))?;
        let width = config.width();
        let values = config.patch_size * config.patch_size * config.out_channels;
        weights::load(&folder, "diffusion_pytorch_model", device, |root| {
            let blocks = root.at("transformer_blocks");
            let block = |i| Block::new(&blocks.at(i), &config, i, repeats);
            let embed = root.at("time_text_embed");
            Ok(Self {
                patches: PatchEmbedding::new(&root.at("pos_embed"), &config)?,
                time: TimeEmbedding::new(&embed.at("timestep_embedder"), WAVES, width)?,
                pooled: ConditionMlp::new(
                    &embed.at("text_embedder"),
                    config.pooled_projection_dim,
                    width,
                )?,
                text: root.linear("context_embedder", config.joint_attention_dim, width)?,
                blocks: (0..config.num_layers).map(block).collect::<Result<_>>()?,
                modulation_out: Modulation::new(&root.at("norm_out"), width, 2)?,
                norm_out: ModulatedNorm::new(width, device)?,
                proj_out: root.linear("proj_out", width, values)?,
                config,
            })
        })
    }

    /// What `config.json` says.
    pub fn config(&self) -> &Sd3TransformerConfig {
        &self.config
    }

    /// The velocity `[b, out_channels, h, w]` for latents `x` `[b, in_channels, h, w]`, one time step (sigma
    /// times 1000) each, and their text.
    ///
    /// # Errors
    /// When the shapes do not fit one another or the configuration.
    pub fn forward(
        &self,
        x: &Tensor,
        timesteps: &[f32],
        text: TextConditions<'_>,
        tape: &mut Tape,
    ) -> Result<Tensor> {
        let grid = self.check(x, timesteps, text)?;
        let condition = (self.time.forward(timesteps, x)? + self.pooled.forward(text.pooled)?)?;
        let condition = Activation::Silu.forward(&condition, &mut Tape::off())?;
        let mut c = self.text.forward(text.states, &mut Tape::off())?;
        let mut x = self.patches.forward(x, tape)?;
        for block in &self.blocks {
            (x, c) = block.forward(&x, c, &condition, tape)?;
        }
        // Its shape, for the way back.
        tape.push(&c);
        let m = self.modulation_out.forward(&condition)?;
        let y = self.norm_out.forward(&x, &m[1], &m[0], tape)?;
        unpatch(&self.proj_out.forward(&y, tape)?, grid, self.config.patch_size)
    }

    /// The gradient with respect to the latents, from that with respect to the velocity.
    ///
    /// # Errors
    /// When the tape is empty or `dy` is not of the shape of the output.
    pub fn backward(&self, dy: &Tensor, tape: &mut Tape) -> Result<Tensor> {
        let p = self.config.patch_size;
        let (_, _, h, w) = dy.dims4()?;
        let d = self.proj_out.backward(&patch(dy, p)?, tape)?;
        let mut dx = self.norm_out.backward(&d, tape)?;
        let mut dc = tape.pop()?.zeros_like()?;
        for block in self.blocks.iter().rev() {
            (dx, dc) = block.backward(&dx, &dc, tape)?;
        }
        self.patches.backward(&dx, (h / p, w / p), tape)
    }

    fn check(
        &self,
        x: &Tensor,
        timesteps: &[f32],
        text: TextConditions<'_>,
    ) -> Result<(usize, usize)> {
        let Sd3TransformerConfig { in_channels: c, patch_size: p, .. } = self.config;
        let (states, pooled) = (self.config.joint_attention_dim, self.config.pooled_projection_dim);
        let (b, most) = (timesteps.len(), self.config.pos_embed_max_size);
        let side = |side: usize| side > 0 && side.is_multiple_of(p) && side / p <= most;
        let fits = b > 0
            && matches!(x.dims(), [n, ch, h, w] if *n == b && *ch == c && side(*h) && side(*w))
            && matches!(text.states.dims(), [n, m, d] if *n == b && *m > 0 && *d == states)
            && text.pooled.dims() == [b, pooled];
        if fits {
            return Ok((x.dim(2)? / p, x.dim(3)? / p));
        }
        let problem = format!(
            "expected latents [b, {c}, h, w] with sides that are multiples of {p} up to {}, b time steps, \
             text [b, n, {states}] and pooled text [b, {pooled}]; got {:?}, {b}, {:?} and {:?}",
            most * p,
            x.dims(),
            text.states.dims(),
            text.pooled.dims()
        );
        Err(Error::invalid("Sd3Transformer::forward", problem))
    }
}
