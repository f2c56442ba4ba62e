//! The autoencoder as the sampler sees it: scaled latents on one side, pixels on the other.

use candle_core::{Device, Tensor};

use super::config::AutoencoderKlConfig;
use super::decoder::Decoder;
use super::encoder::Encoder;
use crate::layers::Conv2d;
use crate::{Error, ModelFolder, Result, Tape, weights};

/// diffusers' `AutoencoderKL`. It computes in f32, so `force_upcast` is always honoured.
#[derive(Debug)]
pub struct AutoencoderKl {
    config: AutoencoderKlConfig,
    encoder: Encoder,
    quant: Option<Conv2d>,
    post_quant: Option<Conv2d>,
    decoder: Decoder,
}

impl AutoencoderKl {
    /// Reads a diffusers folder: `config.json` and `diffusion_pytorch_model.safetensors` (or its shards).
    ///
    /// # Errors
    /// When a file is missing or malformed, a setting is not supported, or the weights do not fit it.
    pub fn load(dir: impl Into<ModelFolder>, device: &Device) -> Result<Self> {
        let folder = dir.into();
        let config = AutoencoderKlConfig::read(&folder.file("config.json"))?;
        let latent = config.latent_channels;
        weights::load(&folder, "diffusion_pytorch_model", device, |root| {
            let quant = || root.conv1x1("quant_conv", 2 * latent, 2 * latent);
            let post_quant = || root.conv1x1("post_quant_conv", latent, latent);
            Ok(Self {
                encoder: Encoder::new(&root.at("encoder"), &config)?,
                quant: config.use_quant_conv.then(quant).transpose()?,
                post_quant: config.use_post_quant_conv.then(post_quant).transpose()?,
                decoder: Decoder::new(&root.at("decoder"), &config)?,
                config,
            })
        })
    }

    /// What `config.json` says.
    pub fn config(&self) -> &AutoencoderKlConfig {
        &self.config
    }

    /// Pixels per latent pixel, along each side: 8 for Stable Diffusion.
    pub fn downsample_factor(&self) -> usize {
        1 << (self.config.block_out_channels.len() - 1)
    }

    /// The most pixels of one image that can be decoded with a gradient where there are no kernels
    /// of this crate: see [`crate::layers::Conv2d::forward`].
    pub fn max_decoded_pixels(&self) -> usize {
        // The widest convolution over all pixels is the first of the last resolution.
        let channels = &self.config.block_out_channels;
        let widest = channels[0].max(channels.get(1).copied().unwrap_or(0));
        crate::layers::MOST_COLUMNS / (9 * widest)
    }

    /// Decodes latents as the sampler holds them, `[b, latent_channels, h, w]`, to pixels
    /// `[b, 3, f h, f w]` of about -1..1, not clamped.
    ///
    /// # Errors
    /// When the latent has another number of channels.
    pub fn decode(&self, latent: &Tensor, tape: &mut Tape) -> Result<Tensor> {
        let channels = self.config.latent_channels;
        if latent.rank() != 4 || latent.dim(1)? != channels {
            let problem = format!("expected [b, {channels}, h, w], got {:?}", latent.dims());
            return Err(Error::invalid("AutoencoderKl::decode", problem));
        }
        let z = latent.affine(1.0 / self.config.scaling_factor, self.config.shift_factor)?;
        let z = match &self.post_quant {
            Some(conv) => conv.forward(&z, tape)?,
            None => z,
        };
        self.decoder.forward(&z, tape)
    }

    /// The gradient with respect to the latent, from the gradient with respect to the pixels. Saved tensors are
    /// freed as it goes.
    ///
    /// # Errors
    /// When the tape is empty or `dpixels` is not of the shape of the output.
    pub fn decode_backward(&self, dpixels: &Tensor, tape: &mut Tape) -> Result<Tensor> {
        let d = self.decoder.backward(dpixels, tape)?;
        let d = match &self.post_quant {
            Some(conv) => conv.backward(&d, tape)?,
            None => d,
        };
        Ok((d / self.config.scaling_factor)?)
    }

    /// The mean of the latent distribution of pixels `[b, 3, f h, f w]` in -1..1, scaled as the sampler holds
    /// latents.
    ///
    /// # Errors
    /// When the sides are not multiples of [`AutoencoderKl::downsample_factor`].
    pub fn encode_mean(&self, pixels: &Tensor) -> Result<Tensor> {
        let factor = self.downsample_factor();
        let fits = |side: usize| side > 0 && side.is_multiple_of(factor);
        match pixels.dims() {
            [_, 3, h, w] if fits(*h) && fits(*w) => {}
            dims => {
                let problem = format!(
                    "expected [b, 3, h, w] with h and w multiples of {factor}, got {dims:?}"
                );
                return Err(Error::invalid("AutoencoderKl::encode_mean", problem));
            }
        }
        let mut moments = self.encoder.forward(pixels)?;
        if let Some(conv) = &self.quant {
            moments = conv.forward(&moments, &mut Tape::off())?;
        }
        let mean = moments.narrow(1, 0, self.config.latent_channels)?.contiguous()?;
        let scale = self.config.scaling_factor;
        Ok(mean.affine(scale, -self.config.shift_factor * scale)?)
    }
}
