//! The judge: a plain convolutional classifier that names the objects of a small picture. It measures what the
//! samplers make and never steers, so it has no gradient.

use candle_core::{Device, Tensor};
use serde_json::Value;

use crate::config::ConfigFile;
use crate::layers::{Activation, Conv2d, Conv2dConfig, GroupNorm, Linear, Padding, add};
use crate::weights::{self, Scope};
use crate::{Error, ModelFolder, Result, Tape};

const HALVE: Conv2dConfig = Conv2dConfig { stride: 2, padding: Padding::Symmetric(1) };
/// torch's default for `GroupNorm`.
const EPS: f64 = 1e-5;

/// A multi-label classifier of RGB pictures: `config.json` and `model.safetensors`.
///
/// `stem`, then per entry of `channels` the block `silu(down(x + silu(norm(conv(x)))))`, which halves the
/// size and has the next entry's channels (twice the last after the last), then the mean over pixels and
/// the linear `head`.
#[derive(Debug)]
pub struct Judge {
    hash: String,
    labels: Vec<String>,
    thresholds: Vec<f32>,
    image_size: usize,
    stem: Conv2d,
    blocks: Vec<Block>,
    head: Linear,
}

#[derive(Debug)]
struct Block {
    conv: Conv2d,
    norm: GroupNorm,
    down: Conv2d,
}

impl Judge {
    /// Reads the folder of a judge.
    ///
    /// # Errors
    /// When a file is missing or malformed, a setting is not supported, or the weights do not fit it.
    pub fn load(dir: impl Into<ModelFolder>, device: &Device) -> Result<Self> {
        let folder = dir.into();
        let fields = folder.config("config.json")?;
        fields.choice_list("architectures", &["EmojilandJudge"], &["EmojilandJudge"])?;
        let image_size = fields.size("image_size", 32)?;
        let channels = fields.size_list("channels", &[32, 64, 128])?;
        let groups = fields.size("norm_groups", 8)?;
        if channels.iter().any(|c| c % groups != 0) {
            return Err(
                fields.unsupported("channels", format!("multiples of norm_groups {groups}"))
            );
        }
        let labels = labels(&fields)?;
        let thresholds = fields.numbers("thresholds", labels.len())?;
        let thresholds = thresholds.ok_or_else(|| {
            fields.unsupported("thresholds", format!("{} numbers, one per label", labels.len()))
        })?;
        fields.finish(&["model_type", "dtype", "torch_dtype"])?;
        let last = 2 * channels[channels.len() - 1];
        let following = channels[1..].iter().copied().chain([last]);
        let mut judge = weights::load(&folder, "model", device, |root| {
            let blocks = channels
                .iter()
                .zip(following)
                .enumerate()
                .map(|(i, (&c, next))| Block::new(&root.at("blocks").at(i), c, next, groups));
            Ok(Self {
                hash: String::new(),
                stem: root.conv3x3("stem", 3, channels[0])?,
                blocks: blocks.collect::<Result<_>>()?,
                head: root.linear("head", last, labels.len())?,
                labels,
                thresholds,
                image_size,
            })
        })?;
        judge.hash = folder.hash()?;
        Ok(judge)
    }

    /// [`ModelFolder::hash`].
    pub fn hash(&self) -> &str {
        &self.hash
    }

    /// Reads the folder of a judge onto the CPU.
    ///
    /// # Errors
    /// As [`Judge::load`].
    pub fn load_cpu(dir: impl Into<ModelFolder>) -> Result<Self> {
        Self::load(dir, &Device::Cpu)
    }

    /// The objects found on a picture of `width` x `height` pixels, RGB8 row by row.
    ///
    /// # Errors
    /// When the picture does not have the judge's size.
    pub fn found(&self, rgb: &[u8], width: usize, height: usize) -> Result<Vec<String>> {
        let values: Vec<f32> = rgb.iter().map(|&value| f32::from(value) / 255.0).collect();
        let pixels = Tensor::from_vec(values, (1, height, width, 3), &Device::Cpu)?;
        let pixels = pixels.permute((0, 3, 1, 2))?.contiguous()?;
        let logits = self.logits(&pixels)?.flatten_all()?.to_vec1::<f32>()?;
        let objects = self.labels.iter().zip(&self.thresholds).zip(logits);
        Ok(objects
            .filter(|((_, threshold), logit)| 1.0 / (1.0 + (-logit).exp()) >= **threshold)
            .map(|((label, _), _)| label.clone())
            .collect())
    }

    /// The objects it knows, in the order of the logits.
    pub fn labels(&self) -> &[String] {
        &self.labels
    }

    /// The probability from which on each object counts as found.
    pub fn thresholds(&self) -> &[f32] {
        &self.thresholds
    }

    /// Side of the square pictures it takes, in pixels.
    pub fn image_size(&self) -> usize {
        self.image_size
    }

    /// One logit per object, `[b, labels]`, of pictures `[b, 3, image_size, image_size]`, RGB in 0..1.
    ///
    /// # Errors
    /// When the pictures have another shape.
    pub fn logits(&self, pixels: &Tensor) -> Result<Tensor> {
        let side = self.image_size;
        if !matches!(pixels.dims(), [_, 3, h, w] if [*h, *w] == [side; 2]) {
            let problem = format!("expected [b, 3, {side}, {side}], got {:?}", pixels.dims());
            return Err(Error::invalid("Judge::logits", problem));
        }
        let tape = &mut Tape::off();
        let x = self.stem.forward(&pixels.affine(2.0, -1.0)?, tape)?;
        let x = self.blocks.iter().try_fold(x, |x, block| block.forward(&x))?;
        self.head.forward(&x.flatten_from(2)?.mean(2)?, tape)
    }
}

impl Block {
    fn new(scope: &Scope<'_>, channels: usize, next: usize, groups: usize) -> Result<Self> {
        Ok(Self {
            conv: scope.conv3x3("conv", channels, channels)?,
            norm: scope.group_norm("norm", channels, groups, EPS)?.with_silu(),
            down: scope.conv("down", [channels, next, 3], HALVE)?,
        })
    }

    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let tape = &mut Tape::off();
        let y = self.norm.forward(&self.conv.forward(x, tape)?, tape)?;
        let y = self.down.forward(&add(x, &y)?, tape)?;
        Activation::Silu.forward(&y, tape)
    }
}

fn labels(fields: &ConfigFile) -> Result<Vec<String>> {
    fields
        .get("labels")
        .and_then(Value::as_array)
        .and_then(|labels| labels.iter().map(|l| l.as_str().map(str::to_owned)).collect())
        .filter(|labels: &Vec<String>| !labels.is_empty())
        .ok_or_else(|| fields.unsupported("labels", "a list of names"))
}
