//! What is measured.

use std::path::Path;

use anyhow::Result;
use candle_core::{Device, Tensor};
use fairlead_models::layers::{Activation, Attention, Conv2d, Conv2dConfig};
use fairlead_models::{
    AutoencoderKl, ClipModel, Sd3Transformer, Tape, TextConditions, UNet2DConditionModel,
};

use crate::fixture;

/// One case; `true` means with the input gradient.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Case {
    /// 3 x 3 convolution, 320 to 320 channels, 64 x 64 pixels.
    Conv(bool),
    /// Stable Diffusion's VAE decoder at this many pixels a side.
    Vae(usize, bool),
    /// Image features of CLIP ViT-B/32.
    Clip(bool),
    /// 8 heads of 40 over 4,096 tokens, the largest attention of Stable Diffusion 1 at 512 pixels.
    Attention(bool),
    /// The exact GELU of 4,096 x 1,280 values.
    Gelu(bool),
    /// Stable Diffusion 1's UNet at 256 pixels, 860 million weights.
    Unet,
    /// Six of the 24 blocks of Stable Diffusion 3 medium's transformer at 512 pixels.
    Mmdit,
}

/// A case that is ready to run.
pub(crate) type Run = Box<dyn Fn() -> Result<()>>;

impl Case {
    /// All cases, in the order of the table.
    pub(crate) const ALL: [Self; 14] = [
        Self::Conv(false),
        Self::Conv(true),
        Self::Vae(128, false),
        Self::Vae(128, true),
        Self::Vae(256, false),
        Self::Vae(256, true),
        Self::Clip(false),
        Self::Clip(true),
        Self::Attention(false),
        Self::Attention(true),
        Self::Gelu(false),
        Self::Gelu(true),
        Self::Unet,
        Self::Mmdit,
    ];

    /// Its name, which `peer.py` knows too.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Conv(false) => "conv",
            Self::Conv(true) => "conv-gradient",
            Self::Vae(128, false) => "vae-128",
            Self::Vae(128, true) => "vae-128-gradient",
            Self::Vae(_, false) => "vae-256",
            Self::Vae(_, true) => "vae-256-gradient",
            Self::Clip(false) => "clip",
            Self::Clip(true) => "clip-gradient",
            Self::Attention(false) => "attention",
            Self::Attention(true) => "attention-gradient",
            Self::Gelu(false) => "gelu",
            Self::Gelu(true) => "gelu-gradient",
            Self::Unet => "unet",
            Self::Mmdit => "mmdit",
        }
    }

    /// The case of this name.
    pub(crate) fn named(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|case| case.name() == name)
    }

    /// Every name, for messages.
    pub(crate) fn names() -> String {
        Self::ALL.map(Self::name).join(", ")
    }

    /// The ratio to torch's time that it should stay under.
    pub(crate) fn goal(self) -> f64 {
        match self {
            Self::Vae(256, true) => 0.6,
            Self::Conv(_) | Self::Vae(..) => 0.7,
            Self::Attention(_) | Self::Gelu(_) => 1.0,
            Self::Unet | Self::Mmdit => 1.2,
            Self::Clip(_) => 1.3,
        }
    }

    /// Loads what it needs from the folder of random models.
    pub(crate) fn build(self, models: &Path) -> Result<Run> {
        match self {
            Self::Conv(gradient) => conv(gradient),
            Self::Vae(side, gradient) => vae(models, side, gradient),
            Self::Clip(gradient) => clip(models, gradient),
            Self::Attention(gradient) => attention(gradient),
            Self::Gelu(gradient) => gelu(gradient),
            Self::Unet => unet(models),
            Self::Mmdit => mmdit(models),
        }
    }

    /// Whether torch has to write its model, which then has both sides load it.
    pub(crate) fn needs_torch(self) -> bool {
        matches!(self, Self::Unet | Self::Mmdit)
    }
}

fn tape(gradient: bool) -> Tape {
    if gradient { Tape::recording() } else { Tape::off() }
}

fn noise(shape: &[usize]) -> Result<Tensor> {
    Ok(Tensor::randn(0f32, 1f32, shape, &Device::Cpu)?)
}

fn conv(gradient: bool) -> Result<Run> {
    let weight = (noise(&[320, 320, 3, 3])? * 0.02)?;
    let layer = Conv2d::new(weight, Some(noise(&[320])?), Conv2dConfig::SAME_3X3)?;
    let (x, dy) = (noise(&[1, 320, 64, 64])?, noise(&[1, 320, 64, 64])?);
    Ok(Box::new(move || {
        let mut tape = tape(gradient);
        layer.forward(&x, &mut tape)?;
        if gradient {
            layer.backward(&dy, &mut tape)?;
        }
        Ok(())
    }))
}

fn vae(models: &Path, side: usize, gradient: bool) -> Result<Run> {
    let vae = AutoencoderKl::load(&models.join(fixture::VAE), &Device::Cpu)?;
    let (latent, dy) = (noise(&[1, 4, side / 8, side / 8])?, noise(&[1, 3, side, side])?);
    Ok(Box::new(move || {
        let mut tape = tape(gradient);
        vae.decode(&latent, &mut tape)?;
        if gradient {
            vae.decode_backward(&dy, &mut tape)?;
        }
        Ok(())
    }))
}

fn clip(models: &Path, gradient: bool) -> Result<Run> {
    let clip = ClipModel::load(&models.join(fixture::CLIP), &Device::Cpu)?;
    let (pixels, dy) = (noise(&[1, 3, 224, 224])?, noise(&[1, 512])?);
    Ok(Box::new(move || {
        let mut tape = tape(gradient);
        clip.image_features(&pixels, &mut tape)?;
        if gradient {
            clip.image_features_backward(&dy, &mut tape)?;
        }
        Ok(())
    }))
}

fn attention(gradient: bool) -> Result<Run> {
    let layer = Attention::new(1.0 / 40f64.sqrt());
    let shape = [1, 8, 4096, 40];
    let [q, k, v, dy] = [noise(&shape)?, noise(&shape)?, noise(&shape)?, noise(&shape)?];
    Ok(Box::new(move || {
        let mut tape = tape(gradient);
        layer.forward(&q, &k, &v, &mut tape)?;
        if gradient {
            layer.backward(&dy, &mut tape)?;
        }
        Ok(())
    }))
}

fn gelu(gradient: bool) -> Result<Run> {
    let (x, dy) = (noise(&[1, 4096, 1280])?, noise(&[1, 4096, 1280])?);
    Ok(Box::new(move || {
        let mut tape = tape(gradient);
        Activation::GeluErf.forward(&x, &mut tape)?;
        if gradient {
            Activation::GeluErf.backward(&dy, &mut tape)?;
        }
        Ok(())
    }))
}

fn unet(models: &Path) -> Result<Run> {
    let unet = UNet2DConditionModel::load(&models.join("unet"), &Device::Cpu)?;
    let (x, text) = (noise(&[1, 4, 32, 32])?, noise(&[1, 77, 768])?);
    Ok(Box::new(move || {
        unet.forward(&x, &[500.0], &text, &mut Tape::off())?;
        Ok(())
    }))
}

fn mmdit(models: &Path) -> Result<Run> {
    let transformer = Sd3Transformer::load(&models.join("mmdit"), 1, &Device::Cpu)?;
    let (x, states) = (noise(&[1, 16, 64, 64])?, noise(&[1, 77 + 256, 4096])?);
    let pooled = noise(&[1, 2048])?;
    Ok(Box::new(move || {
        let text = TextConditions { states: &states, pooled: &pooled };
        transformer.forward(&x, &[500.0], text, &mut Tape::off())?;
        Ok(())
    }))
}
