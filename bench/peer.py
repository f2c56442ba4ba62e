"""The same cases in torch, for `fairlead-bench`: prints `ready`, then the seconds of one run for every line it reads.

    python peer.py CASE THREADS MODELS   # CASE `probe` only imports what is needed
    python peer.py write CASE MODELS     # the random model of a case, for both sides to load
"""

import sys
import time
from pathlib import Path

import torch
from diffusers import AutoencoderKL, SD3Transformer2DModel, UNet2DConditionModel
from torch.nn import functional as F
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection


def gradient(apply, shape, out):
    """Forward and input gradient, as autograd does it when the weights are frozen."""
    x, dy = torch.randn(shape), torch.randn(out)

    def run():
        leaf = x.detach().requires_grad_(True)
        torch.autograd.grad(apply(leaf), leaf, dy)

    return run


def forward(apply, shape):
    x = torch.randn(shape)

    def run():
        with torch.no_grad():
            apply(x)

    return run


def conv():
    layer = torch.nn.Conv2d(320, 320, 3, padding=1).requires_grad_(False)
    return layer, (1, 320, 64, 64), (1, 320, 64, 64)


def vae(side):
    model = AutoencoderKL(
        block_out_channels=(128, 256, 512, 512),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=2,
        latent_channels=4,
    )
    model.requires_grad_(False).eval()
    return lambda z: model.decode(z / model.config.scaling_factor).sample, (1, 4, side // 8, side // 8), (1, 3, side, side)


def clip():
    model = CLIPVisionModelWithProjection(CLIPVisionConfig(hidden_size=768, patch_size=32, image_size=224, projection_dim=512))
    model.requires_grad_(False).eval()

    def features(pixels):
        return torch.nn.functional.normalize(model((pixels - 0.45) / 0.27).image_embeds, dim=-1)

    return features, (1, 3, 224, 224), (1, 512)


def attention():
    k, v = torch.randn(2, 1, 8, 4096, 40)
    shape = (1, 8, 4096, 40)
    return lambda q: F.scaled_dot_product_attention(q, k, v), shape, shape


def attention_gradient():
    """With respect to all three, as the layer has it."""
    shape = (3, 1, 8, 4096, 40)
    return lambda x: F.scaled_dot_product_attention(*x), shape, shape[1:]


def gelu():
    return F.gelu, (1, 4096, 1280), (1, 4096, 1280)


def unet(folder):
    model = UNet2DConditionModel.from_pretrained(folder, torch_dtype=torch.float32)
    text = torch.randn(1, 77, 768)
    return lambda x: model(x, 500.0, text).sample, (1, 4, 32, 32), None


def mmdit(folder):
    model = SD3Transformer2DModel.from_pretrained(folder, torch_dtype=torch.float32)
    states, pooled, time = torch.randn(1, 77 + 256, 4096), torch.randn(1, 2048), torch.tensor([500.0])
    return lambda x: model(x, states, pooled, time).sample, (1, 16, 64, 64), None


def write(case, folder):
    if case == "unet":
        model = UNet2DConditionModel(sample_size=64, cross_attention_dim=768)
    else:
        model = SD3Transformer2DModel(
            sample_size=128, num_layers=6, attention_head_dim=64, num_attention_heads=24, joint_attention_dim=4096,
            caption_projection_dim=1536, pooled_projection_dim=2048, pos_embed_max_size=192,
        )
    model.half().save_pretrained(folder)


def build(case, models):
    name, _, rest = case.partition("-")
    if name == "probe":
        return lambda: None
    if name == "vae":
        apply, shape, out = vae(int(rest.split("-")[0]))
    elif name in ("unet", "mmdit"):
        apply, shape, out = {"unet": unet, "mmdit": mmdit}[name](models / name)
    else:
        cases = {"conv": conv, "clip": clip, "attention": attention, "gelu": gelu, "attention-gradient": attention_gradient}
        apply, shape, out = cases.get(case, cases[name])()
    return gradient(apply, shape, out) if case.endswith("gradient") else forward(apply, shape)


if sys.argv[1] == "write":
    write(sys.argv[2], Path(sys.argv[3]) / sys.argv[2])
    sys.exit()
torch.set_num_threads(int(sys.argv[2]))
torch.manual_seed(0)
run = build(sys.argv[1], Path(sys.argv[3]))
run()
print("ready", flush=True)
for _ in sys.stdin:
    start = time.perf_counter()
    run()
    print(time.perf_counter() - start, flush=True)
