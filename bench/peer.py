"""The same cases in torch, for `fairlead-bench`: prints `ready`, then the seconds of one run for every line it reads.

    python peer.py CASE THREADS        # CASE `probe` only imports what is needed
"""

import sys
import time

import torch
from diffusers import AutoencoderKL
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


def build(case):
    name, _, rest = case.partition("-")
    if name == "probe":
        return lambda: None
    apply, shape, out = vae(int(rest.split("-")[0])) if name == "vae" else {"conv": conv, "clip": clip}[name]()
    return gradient(apply, shape, out) if case.endswith("gradient") else forward(apply, shape)


torch.set_num_threads(int(sys.argv[2]))
torch.manual_seed(0)
run = build(sys.argv[1])
run()
print("ready", flush=True)
for _ in sys.stdin:
    start = time.perf_counter()
    run()
    print(time.perf_counter() - start, flush=True)
