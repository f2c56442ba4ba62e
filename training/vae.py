"""Trains the autoencoder: 32 x 32 pixels to an 8 x 8 x 8 latent and back.

`--decoder-minutes` then sharpens the decoder alone: the latents, and with them a trained UNet, stay valid.
"""
import math

import numpy as np
import torch
from diffusers import AutoencoderKL

from common import DEVICE, Training, arguments, autocast, contact_sheet, load_average
from data import as_tensor, scenes

NOISE = 0.1
LAST = torch.channels_last


def build():
    return AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * 3, up_block_types=["UpDecoderBlock2D"] * 3, layers_per_block=1,
        block_out_channels=[24, 48, 96], norm_num_groups=6, latent_channels=8, sample_size=32)


def load(work):
    """The trained autoencoder, with the sharpened decoder where there is one."""
    torch.manual_seed(0)
    vae = build()
    load_average(work / "vae.pt", vae=vae)
    if (work / "vae-decoder.pt").exists():
        load_average(work / "vae-decoder.pt", decoder=vae.decoder, post=vae.post_quant_conv)
    return vae.to(DEVICE, memory_format=LAST)


def gradient_loss(a, b):
    d = a - b
    return (d[..., 1:] - d[..., :-1]).abs().mean() + (d[..., 1:, :] - d[..., :-1, :]).abs().mean()


def reconstruction_loss(reconstruction, images):
    l1 = (reconstruction - images).abs().mean()
    return l1 + (reconstruction - images).square().mean() + 0.5 * gradient_loss(reconstruction, images), l1


def train(work, minutes, batch=32):
    torch.manual_seed(0)
    vae = build().to(memory_format=LAST)
    pixels = scenes(work, "generator")["pixels"]
    training = Training(work / "vae.pt", {"vae": vae}, minutes, lr=1.2e-3, ema=0.995)
    for _ in training.steps():
        images = as_tensor(pixels[np.random.randint(0, len(pixels), batch)]).to(DEVICE, memory_format=LAST)
        with autocast():
            posterior = vae.encode(images).latent_dist
            noisy = posterior.mean + NOISE * torch.randn_like(posterior.mean)
            reconstruction = vae.decode(noisy).sample
        loss, l1 = reconstruction_loss(reconstruction.float(), images)
        size = posterior.mean.float().square().mean()
        spread = (posterior.logvar.float() - 2 * math.log(NOISE)).square().mean()
        training.update(loss + 0.01 * (size - 1).clamp(min=0) + 1e-3 * spread, l1=l1, size=size)


def sharpen(work, minutes, batch=32):
    """Trains the decoder alone on the cached latents, half of the time exact, half of the time noisy."""
    vae, cached = load(work), latents(work)
    decoder = {"decoder": vae.decoder.requires_grad_(True), "post": vae.post_quant_conv.requires_grad_(True)}
    pixels = scenes(work, "generator")["pixels"]
    training = Training(work / "vae-decoder.pt", decoder, minutes, lr=8e-4, ema=0.995)
    for _ in training.steps():
        index = np.random.randint(0, len(pixels), batch)
        images, exact = as_tensor(pixels[index]).to(DEVICE), cached[index].float().to(DEVICE)
        noisy = exact + NOISE * torch.randint(0, 2, (batch, 1, 1, 1), device=DEVICE) * torch.randn_like(exact)
        with autocast():
            reconstruction = vae.decode(noisy.contiguous(memory_format=LAST)).sample
        loss, l1 = reconstruction_loss(reconstruction.float(), images)
        training.update(loss, l1=l1)


@torch.no_grad()
def latents(work, split="generator", vae=None):
    """Latent means of a split as f16 [n, 8, 8, 8], computed once; delete the file after training the encoder again."""
    path = work / f"latents-{split}.pt"
    if not path.exists():
        vae = vae or load(work)
        images = as_tensor(scenes(work, split)["pixels"])
        torch.save(torch.cat([vae.encode(x.to(DEVICE)).latent_dist.mean.half().cpu() for x in images.split(500)]), path)
    return torch.load(path, weights_only=True)


@torch.no_grad()
def heldout_l1(work, sheet=None):
    vae = load(work)
    images = as_tensor(scenes(work, "generator-heldout")["pixels"][:500]).to(DEVICE)
    reconstruction = vae.decode(vae.encode(images).latent_dist.mean).sample
    if sheet:
        contact_sheet(torch.stack([images[:32], reconstruction[:32]], 1).flatten(0, 1), sheet)
    return (reconstruction - images).abs().mean().item()


if __name__ == "__main__":
    args = arguments(__doc__, minutes=22.0, decoder_minutes=0.0)
    if args.decoder_minutes:
        sharpen(args.work, args.decoder_minutes)
    else:
        train(args.work, args.minutes)
    print("held-out l1", heldout_l1(args.work, args.work / "vae.png"))
