"""Makes the folders below `networks/`: small models with random weights as diffusers and transformers save them,
each with `golden.safetensors`, what torch computes with them.

    python networks.py            (torch 2.15, diffusers 0.42, transformers 5.24; two runs give the same numbers)

A golden holds inputs, outputs, for every output `y` a random `dy`, and the input gradient of sum(y * dy) by autograd.
Everything is computed in f32 from the weights as stored, those stored as f16 too.
"""
import json
import shutil
from pathlib import Path

import torch
from diffusers import AutoencoderKL, SD3Transformer2DModel, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F
from transformers import (
    CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, SiglipConfig,
    SiglipImageProcessor, SiglipModel, T5Config, T5EncoderModel)

OUT = Path(__file__).parent / "networks"
torch.set_num_threads(1)


def randomise(model, seed):
    """Weights large enough for every nonlinearity to bend: 1/sqrt(inputs), norms around 1, biases around 0."""
    generator = torch.Generator().manual_seed(seed)
    for name, p in model.named_parameters():
        noise = torch.randn(p.shape, generator=generator)
        if p.ndim > 1 and "embedding" not in name:
            p.data = noise / p[0].numel() ** 0.5
        elif name.endswith("weight") and p.ndim == 1:
            p.data = 1 + 0.2 * noise
        elif name != "logit_scale":
            p.data = 0.3 * noise
    return model.eval().requires_grad_(False)


def save(model, name, half=False, rename=None):
    """Saves as the library does; `rename` turns today's keys into those of old checkpoints. Returns the model in f32."""
    folder = OUT / name
    shutil.rmtree(folder, ignore_errors=True)
    (model.half() if half else model).save_pretrained(folder)
    model.float()
    if rename:
        path = next(folder.glob("*.safetensors"))
        save_file({rename(k): v for k, v in load_file(path).items()}, path, {"format": "pt"})
    return folder


def golden(folder, **tensors):
    save_file({k: v.detach().contiguous() for k, v in tensors.items()}, folder / "golden.safetensors")
    for file in folder.iterdir():
        file.chmod(0o644)
    print(folder.name, sum(f.stat().st_size for f in folder.iterdir()), "bytes")


def gradient(y, dy, x):
    return torch.autograd.grad((y * dy).sum(), x)[0]


def clip_text(name, prefix, half, **config):
    """`prefix`: transformers up to 4 saved this class with `text_model.` before every key."""
    model = randomise(CLIPTextModel(CLIPTextConfig(
        vocab_size=64, max_position_embeddings=11, bos_token_id=62, eos_token_id=63, pad_token_id=63, **config)), 1)
    folder = save(model, name, half, (lambda k: "text_model." + k) if prefix else None)
    if prefix:
        path = folder / "model.safetensors"
        save_file(load_file(path) | {"text_model.embeddings.position_ids": torch.arange(11)[None]}, path)
    ids = torch.tensor([[62, 5, 17, 3, 60, 63, 63, 63, 63, 63, 63], [62, 1, 2, 40, 41, 42, 43, 44, 45, 46, 63]])
    embedded = []
    model.embeddings.token_embedding.register_forward_hook(lambda m, a, y: embedded.append(y.requires_grad_()) or y)
    y = model(ids).last_hidden_state
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(2))
    golden(folder, ids=ids.to(torch.int64), y=y, dy=dy, dx=gradient(y, dy, embedded[0]))


def clip(name, half, eos, image, patch, act, **vision):
    text = dict(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
                max_position_embeddings=9, hidden_act=act, bos_token_id=62, eos_token_id=eos, pad_token_id=0)
    vision = dict(intermediate_size=56, num_hidden_layers=2, num_attention_heads=2, image_size=image, patch_size=patch,
                  hidden_act=act) | vision
    model = randomise(CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=20)), 3)
    folder = save(model, name, half)
    mean, std = [0.5, 0.45, 0.4], [0.25, 0.26, 0.27]
    CLIPImageProcessor(image_mean=mean, image_std=std, size={"shortest_edge": image},
                       crop_size={"height": image, "width": image}).save_pretrained(folder)
    ids = torch.tensor([[62, 5, 17, 63, 0, 0, 0, 0, 0], [62, 9, 8, 7, 6, 5, 4, 3, 63], [62, 63, 63, 63, 63, 63, 63, 63, 63]])
    pixels = torch.rand(3, 3, image, image, generator=torch.Generator().manual_seed(4)).requires_grad_()
    normal = (pixels - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]
    out = model(input_ids=ids, pixel_values=normal)
    y = out.image_embeds
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(5))
    golden(folder, ids=ids, text=out.text_embeds, x=pixels, y=y, dy=dy, dx=gradient(y, dy, pixels),
           logit_scale=model.logit_scale.exp())


def clip_text_projected(name):
    model = randomise(CLIPTextModelWithProjection(CLIPTextConfig(
        vocab_size=64, max_position_embeddings=11, bos_token_id=62, eos_token_id=63, pad_token_id=63, hidden_size=32,
        intermediate_size=40, num_hidden_layers=3, num_attention_heads=4, hidden_act="gelu", projection_dim=24)), 12)
    folder = save(model, name, half=True)
    ids = torch.tensor([[62, 5, 17, 3, 60, 63, 63, 63, 63, 63, 63], [62, 1, 2, 40, 41, 42, 43, 44, 45, 46, 63]])
    out = model(ids, output_hidden_states=True)
    golden(folder, ids=ids, penultimate=out.hidden_states[-2], embeds=out.text_embeds)


def siglip(name, half, image, patch):
    text = dict(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
                max_position_embeddings=7, projection_size=40, bos_token_id=1, eos_token_id=1, pad_token_id=1)
    vision = dict(hidden_size=40, intermediate_size=56, num_hidden_layers=2, num_attention_heads=2, image_size=image,
                  patch_size=patch)
    model = randomise(SiglipModel(SiglipConfig(text_config=text, vision_config=vision)), 13)
    folder = save(model, name, half)
    SiglipImageProcessor(size={"height": image, "width": image}).save_pretrained(folder)
    ids = torch.tensor([[5, 17, 1, 1, 1, 1, 1], [9, 8, 7, 6, 5, 4, 1], [1, 1, 1, 1, 1, 1, 1]])
    pixels = torch.rand(3, 3, image, image, generator=torch.Generator().manual_seed(14)).requires_grad_()
    out = model(input_ids=ids, pixel_values=2 * pixels - 1)
    y = out.image_embeds
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(15))
    golden(folder, ids=ids, text=out.text_embeds, x=pixels, y=y, dy=dy, dx=gradient(y, dy, pixels),
           logit=torch.cat([model.logit_scale.exp(), model.logit_bias]))


OLD_ATTENTION = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}


def old_attention(key):
    for new, old in OLD_ATTENTION.items():
        key = key.replace(f"attentions.0.{new}.", f"attentions.0.{old}.")
    return key


def vae(name, half=False, rename=None, sides=(3, 5), **config):
    n = len(config["block_out_channels"])
    model = randomise(AutoencoderKL(down_block_types=["DownEncoderBlock2D"] * n,
                                    up_block_types=["UpDecoderBlock2D"] * n, **config), 6)
    folder = save(model, name, half, rename)
    scale, shift = model.config.scaling_factor, model.config.shift_factor or 0
    generator = torch.Generator().manual_seed(7)
    x = torch.randn(2, model.config.latent_channels, *sides, generator=generator).requires_grad_()
    y = model.decode(x / scale + shift).sample
    dy = torch.randn(y.shape, generator=generator)
    pixels = 2 * torch.rand(y.shape, generator=generator) - 1
    latent = (model.encode(pixels).latent_dist.mean - shift) * scale
    golden(folder, x=x, y=y, dy=dy, dx=gradient(y, dy, x), pixels=pixels, latent=latent)


def unet(name, half=True, sides=(8, 6), **config):
    model = randomise(UNet2DConditionModel(**config), 8)
    folder = save(model, name, half)
    generator = torch.Generator().manual_seed(9)
    x = torch.randn(2, model.config.in_channels, *sides, generator=generator).requires_grad_()
    context = torch.randn(2, 5, model.config.cross_attention_dim, generator=generator)
    timesteps = torch.tensor([981.0, 37.5])
    y = model(x, timesteps, context).sample
    dy = torch.randn(y.shape, generator=generator)
    golden(folder, x=x, timesteps=timesteps, context=context, y=y, dy=dy, dx=gradient(y, dy, x))


def t5(name, half, length, **config):
    """Windows longer than the distances that have a bias of their own. T5's attention is not scaled: queries start small."""
    model = randomise(T5EncoderModel(T5Config(vocab_size=64, d_model=24, d_ff=40, num_layers=2, **config)), 18)
    for layer in model.encoder.block:
        layer.layer[0].SelfAttention.q.weight.data /= model.config.d_kv ** 0.5
    folder = save(model, name, half)
    ids = torch.randint(64, (2, length), generator=torch.Generator().manual_seed(19))
    golden(folder, ids=ids, y=model(ids).last_hidden_state)


def mmdit(name, half, sides, equal, **config):
    """The last `equal` text tokens are the same, as those of an absent third text encoder are."""
    model = randomise(SD3Transformer2DModel(joint_attention_dim=20, pooled_projection_dim=12, **config), 16)
    folder = save(model, name, half)
    generator = torch.Generator().manual_seed(17)
    x = torch.randn(2, model.config.in_channels, *sides, generator=generator).requires_grad_()
    states = torch.randn(2, 5, 20, generator=generator)
    states = torch.cat([states, states[:, -1:].expand(-1, equal - 1, -1)], 1)
    pooled = torch.randn(2, 12, generator=generator)
    timesteps = torch.tensor([993.4, 37.5])
    y = model(x, states, pooled, timesteps).sample
    dy = torch.randn(y.shape, generator=generator)
    golden(folder, x=x, timesteps=timesteps, context=states, pooled=pooled, y=y, dy=dy, dx=gradient(y, dy, x))


class Judge(nn.Module):
    """The classifier of `training/judge.py`, at any width."""

    def __init__(self, channels, groups, labels):
        super().__init__()
        self.stem = nn.Conv2d(3, channels[0], 3, padding=1)
        self.blocks = nn.ModuleList()
        for c, following in zip(channels, channels[1:] + [2 * channels[-1]]):
            self.blocks.append(nn.ModuleDict({
                "conv": nn.Conv2d(c, c, 3, padding=1), "norm": nn.GroupNorm(groups, c),
                "down": nn.Conv2d(c, following, 3, stride=2, padding=1)}))
        self.head = nn.Linear(2 * channels[-1], labels)

    def forward(self, pixels):
        x = self.stem(2 * pixels - 1)
        for block in self.blocks:
            x = F.silu(block["down"](x + F.silu(block["norm"](block["conv"](x)))))
        return self.head(x.mean((2, 3)))


def judge():
    channels, groups, labels = [8, 16], 4, ["cat", "dagger", "pill"]
    model = randomise(Judge(channels, groups, len(labels)), 10)
    folder = OUT / "judge"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    save_file(model.state_dict(), folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(dict(
        architectures=["EmojilandJudge"], image_size=13, channels=channels, norm_groups=groups, labels=labels,
        thresholds=[0.0, -0.5, 1.25]), indent=2) + "\n")
    x = torch.rand(2, 3, 13, 13, generator=torch.Generator().manual_seed(11))
    golden(folder, x=x, y=model(x))


if __name__ == "__main__":
    clip_text("clip_text", prefix=True, half=False, hidden_size=32, intermediate_size=40, num_hidden_layers=2,
              num_attention_heads=4, hidden_act="quick_gelu")
    clip_text("clip_text_gelu", prefix=False, half=True, hidden_size=30, intermediate_size=64, num_hidden_layers=3,
              num_attention_heads=5, hidden_act="gelu", layer_norm_eps=1e-3)
    clip("clip", half=False, eos=63, image=24, patch=8, act="quick_gelu", hidden_size=40)
    clip("clip_legacy", half=True, eos=2, image=23, patch=5, act="gelu", hidden_size=24)
    clip_text_projected("clip_text_projected")
    siglip("siglip", half=False, image=24, patch=8)
    siglip("siglip_rest", half=True, image=23, patch=5)
    vae("vae", rename=old_attention, block_out_channels=[8, 16], layers_per_block=2, norm_num_groups=4,
        latent_channels=4, scaling_factor=0.18215)
    vae("vae_shifted", half=True, block_out_channels=[8, 16, 24], layers_per_block=1, norm_num_groups=8,
        latent_channels=6, scaling_factor=1.5305, shift_factor=0.0609, use_quant_conv=False,
        use_post_quant_conv=False, force_upcast=False)
    vae("vae_plain", half=True, sides=(4, 4), block_out_channels=[16], layers_per_block=1, norm_num_groups=4,
        latent_channels=3, mid_block_add_attention=False)
    unet("unet", block_out_channels=[16, 32], layers_per_block=1, norm_num_groups=8, attention_head_dim=4,
         cross_attention_dim=24, down_block_types=["CrossAttnDownBlock2D", "DownBlock2D"],
         up_block_types=["UpBlock2D", "CrossAttnUpBlock2D"])
    unet("unet_linear", sides=(7, 5), in_channels=5, out_channels=3, block_out_channels=[8, 8, 16],
         layers_per_block=[1, 2, 1], norm_num_groups=4, norm_eps=1e-4, attention_head_dim=[2, 4, 8],
         cross_attention_dim=12, use_linear_projection=True, transformer_layers_per_block=[1, 2, 1],
         flip_sin_to_cos=False, freq_shift=1, upcast_attention=True,
         down_block_types=["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
         up_block_types=["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"])
    t5("t5", half=True, length=256, d_kv=8, num_heads=4, feed_forward_proj="gated-gelu")
    t5("t5_relu", half=False, length=40, d_kv=6, num_heads=3, feed_forward_proj="relu", layer_norm_epsilon=1e-4,
       relative_attention_num_buckets=8, relative_attention_max_distance=20)
    mmdit("mmdit", half=False, sides=(6, 8), equal=1, sample_size=8, patch_size=2, in_channels=4, num_layers=3,
          attention_head_dim=8, num_attention_heads=2, caption_projection_dim=16, out_channels=4, pos_embed_max_size=5)
    mmdit("mmdit_dual", half=True, sides=(4, 3), equal=7, sample_size=4, patch_size=1, in_channels=5, num_layers=3,
          attention_head_dim=6, num_attention_heads=4, caption_projection_dim=24, out_channels=5, pos_embed_max_size=6,
          dual_attention_layers=(0, 2), qk_norm="rms_norm")
    judge()
