//! Random models of the sizes that people use, in the layouts of diffusers and transformers: speed does not
//! depend on the weights.

use std::path::Path;

use anyhow::{Context, Result};
use half::f16;
use safetensors::tensor::{Dtype, TensorView};
use serde_json::{Value, json};

/// Folder of Stable Diffusion's VAE.
pub(crate) const VAE: &str = "vae";
/// Folder of CLIP ViT-B/32, with a small text tower, which is not measured.
pub(crate) const CLIP: &str = "clip";

/// Sizes of the text tower: those of the embedded tokenizer, so that an energy node can read phrases.
const VOCABULARY: usize = 2048;
const POSITIONS: usize = 24;

/// Names and shapes of a network's weights.
#[derive(Default)]
struct Keys(Vec<(String, Vec<usize>)>);

impl Keys {
    fn add(&mut self, name: impl Into<String>, shape: &[usize]) {
        self.0.push((name.into(), shape.to_vec()));
    }

    /// A weight `[outputs, ..]` and its bias.
    fn layer(&mut self, name: &str, shape: &[usize]) {
        self.add(format!("{name}.weight"), shape);
        self.add(format!("{name}.bias"), &shape[..1]);
    }

    fn conv(&mut self, name: &str, c_in: usize, c_out: usize, k: usize) {
        self.layer(name, &[c_out, c_in, k, k]);
    }

    fn resnet(&mut self, name: &str, c_in: usize, c_out: usize) {
        self.layer(&format!("{name}.norm1"), &[c_in]);
        self.conv(&format!("{name}.conv1"), c_in, c_out, 3);
        self.layer(&format!("{name}.norm2"), &[c_out]);
        self.conv(&format!("{name}.conv2"), c_out, c_out, 3);
        if c_in != c_out {
            self.conv(&format!("{name}.conv_shortcut"), c_in, c_out, 1);
        }
    }

    /// The middle block of one half of the VAE.
    fn middle(&mut self, half: &str) {
        for i in 0..2 {
            self.resnet(&format!("{half}.mid_block.resnets.{i}"), 512, 512);
        }
        let attention = format!("{half}.mid_block.attentions.0");
        self.layer(&format!("{attention}.group_norm"), &[512]);
        for part in ["to_q", "to_k", "to_v", "to_out.0"] {
            self.layer(&format!("{attention}.{part}"), &[512, 512]);
        }
    }

    /// A transformer tower.
    fn tower(&mut self, name: &str, layers: usize, width: usize, mlp: usize) {
        for i in 0..layers {
            let layer = format!("{name}.encoder.layers.{i}");
            for part in ["q_proj", "k_proj", "v_proj", "out_proj"] {
                self.layer(&format!("{layer}.self_attn.{part}"), &[width, width]);
            }
            self.layer(&format!("{layer}.layer_norm1"), &[width]);
            self.layer(&format!("{layer}.layer_norm2"), &[width]);
            self.layer(&format!("{layer}.mlp.fc1"), &[mlp, width]);
            self.layer(&format!("{layer}.mlp.fc2"), &[width, mlp]);
        }
    }
}

/// Writes both models.
pub(crate) fn write(folder: &Path) -> Result<()> {
    write_vae(folder)?;
    write_clip(folder)
}

fn write_vae(folder: &Path) -> Result<()> {
    let channels = [128, 256, 512, 512];
    let config = json!({
        "_class_name": "AutoencoderKL", "act_fn": "silu", "block_out_channels": channels,
        "in_channels": 3, "out_channels": 3, "latent_channels": 4, "layers_per_block": 2, "norm_num_groups": 32,
        "down_block_types": vec!["DownEncoderBlock2D"; 4], "up_block_types": vec!["UpDecoderBlock2D"; 4],
    });
    save(&folder.join(VAE), "diffusion_pytorch_model", &config, &vae(&channels))
}

/// Writes CLIP alone.
pub(crate) fn write_clip(folder: &Path) -> Result<()> {
    let config = json!({
        "model_type": "clip", "projection_dim": 512,
        "text_config": {
            "hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 1, "num_hidden_layers": 1,
            "vocab_size": VOCABULARY, "max_position_embeddings": POSITIONS, "eos_token_id": VOCABULARY - 1,
            "hidden_act": "quick_gelu",
        },
        "vision_config": {
            "hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12, "num_hidden_layers": 12,
            "image_size": 224, "patch_size": 32, "hidden_act": "quick_gelu",
        },
    });
    save(&folder.join(CLIP), "model", &config, &clip())?;
    let preprocess = json!({
        "image_mean": [0.48145466, 0.4578275, 0.40821073], "image_std": [0.26862954, 0.26130258, 0.27577711],
        "size": 224, "crop_size": 224, "do_normalize": true,
    });
    put(&folder.join(CLIP).join("preprocessor_config.json"), preprocess.to_string().as_bytes())
}

fn vae(channels: &[usize; 4]) -> Keys {
    let mut keys = Keys::default();
    keys.conv("encoder.conv_in", 3, channels[0], 3);
    let mut from = channels[0];
    for (i, &c) in channels.iter().enumerate() {
        for j in 0..2 {
            keys.resnet(
                &format!("encoder.down_blocks.{i}.resnets.{j}"),
                if j == 0 { from } else { c },
                c,
            );
        }
        if i < 3 {
            keys.conv(&format!("encoder.down_blocks.{i}.downsamplers.0.conv"), c, c, 3);
        }
        from = c;
    }
    keys.middle("encoder");
    keys.layer("encoder.conv_norm_out", &[512]);
    keys.conv("encoder.conv_out", 512, 8, 3);
    keys.conv("quant_conv", 8, 8, 1);
    keys.conv("post_quant_conv", 4, 4, 1);
    keys.conv("decoder.conv_in", 4, 512, 3);
    keys.middle("decoder");
    let mut from = 512;
    for (i, &c) in channels.iter().rev().enumerate() {
        for j in 0..3 {
            keys.resnet(
                &format!("decoder.up_blocks.{i}.resnets.{j}"),
                if j == 0 { from } else { c },
                c,
            );
        }
        if i < 3 {
            keys.conv(&format!("decoder.up_blocks.{i}.upsamplers.0.conv"), c, c, 3);
        }
        from = c;
    }
    keys.layer("decoder.conv_norm_out", &[128]);
    keys.conv("decoder.conv_out", 128, 3, 3);
    keys
}

fn clip() -> Keys {
    let mut keys = Keys::default();
    keys.add("logit_scale", &[]);
    keys.add("text_projection.weight", &[512, 64]);
    keys.add("text_model.embeddings.token_embedding.weight", &[VOCABULARY, 64]);
    keys.add("text_model.embeddings.position_embedding.weight", &[POSITIONS, 64]);
    keys.tower("text_model", 1, 64, 64);
    keys.layer("text_model.final_layer_norm", &[64]);
    keys.add("visual_projection.weight", &[512, 768]);
    keys.add("vision_model.embeddings.class_embedding", &[768]);
    keys.add("vision_model.embeddings.patch_embedding.weight", &[768, 3, 32, 32]);
    keys.add("vision_model.embeddings.position_embedding.weight", &[50, 768]);
    keys.layer("vision_model.pre_layrnorm", &[768]);
    keys.tower("vision_model", 12, 768, 3072);
    keys.layer("vision_model.post_layernorm", &[768]);
    keys
}

/// Writes a model: matrices and kernels with a variance that keeps activations of order one, ones for the
/// weights of norms, zeros for biases.
fn save(folder: &Path, stem: &str, config: &Value, keys: &Keys) -> Result<()> {
    std::fs::create_dir_all(folder).with_context(|| format!("cannot make {}", folder.display()))?;
    put(&folder.join("config.json"), config.to_string().as_bytes())?;
    let mut state = 1u32;
    let data: Vec<Vec<u8>> =
        keys.0.iter().map(|(name, shape)| values(name, shape, &mut state)).collect();
    let views = keys.0.iter().zip(&data).map(|((name, shape), data)| {
        Ok((name.as_str(), TensorView::new(Dtype::F16, shape.clone(), data)?))
    });
    let views = views.collect::<Result<Vec<_>, safetensors::SafeTensorError>>()?;
    put(&folder.join(stem).with_extension("safetensors"), &safetensors::serialize(views, None)?)
}

fn values(name: &str, shape: &[usize], state: &mut u32) -> Vec<u8> {
    let count = shape.iter().product();
    let fan_in: usize = shape.iter().skip(1).product();
    let mut next = || {
        *state = state.wrapping_mul(1664525).wrapping_add(1013904223);
        (*state >> 8) as f32 / (1 << 23) as f32 - 1.0
    };
    let value = |_| match shape.len() {
        0 | 1 if name.ends_with("weight") => 1.0,
        0 | 1 => 0.0,
        _ => next() * (3.0 / fan_in as f32).sqrt(),
    };
    (0..count).map(value).flat_map(|x: f32| f16::from_f32(x).to_le_bytes()).collect()
}

fn put(path: &Path, bytes: &[u8]) -> Result<()> {
    std::fs::write(path, bytes).with_context(|| format!("cannot write {}", path.display()))
}
