"""Trains the autoencoder: 64 x 64 pixels to a 16 x 8 x 8 latent and back.

It begins as the 32 px autoencoder of the first world with one more level of pixels around it, so its first latent
channels mean to a denoiser of that world what they meant before. `--decoder-minutes` then sharpens the decoder alone:
the latents, and with them a trained denoiser, stay valid.
"""
import json
import math
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from safetensors.torch import load_file

from common import ASSETS, DEVICE, PACKED, Training, arguments, autocast, contact_sheet, load_average, save_atomically, trained
from render import HELDOUT_SEED, Renderer, draw_scenes

CHANNELS, GROUPS, LATENT = [16, 24, 48, 96], 4, 16
NOISE = 0.1
GENERATOR_SEED = 2**39
OBJECT_WEIGHT = 3.0  # of a pixel that an object covers beside one of the background
LAST = torch.channels_last


def build():
    levels = len(CHANNELS)
    return AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * levels, up_block_types=["UpDecoderBlock2D"] * levels, layers_per_block=1,
        block_out_channels=CHANNELS, norm_num_groups=GROUPS, latent_channels=LATENT, sample_size=64)


@torch.no_grad()
def begin_from_32(vae, folder):
    """Copies the 32 px autoencoder of `folder` into the inner levels, its latents into the first channels of each half."""
    old, new = {k: v.float() for k, v in load_file(folder / "diffusion_pytorch_model.safetensors").items()}, vae.state_dict()
    for key, value in old.items():
        for side, low, high in (("encoder.down_blocks.", 0, 1), ("decoder.up_blocks.", 0, 0)):
            if key.startswith(side):
                index, rest = key.removeprefix(side).split(".", 1)
                key = f"{side}{int(index) + high}.{rest}"
        if key not in new or key.startswith(("encoder.conv_in", "decoder.conv_out", "decoder.conv_norm_out")):
            continue
        target = new[key]
        if target.shape == value.shape:
            target.copy_(value)
        elif key.startswith(("encoder.conv_out", "quant_conv")):  # [mean, logvar] of 8 channels each
            half = value.shape[0] // 2
            for part in range(2):
                rows = target[part * LATENT:part * LATENT + half]
                old_rows = value[part * half:(part + 1) * half]
                if value.dim() == 1 or rows.shape[1] == old_rows.shape[1]:
                    rows.copy_(old_rows)
                else:
                    rows.zero_()
                    for other in range(2):
                        rows[:, other * LATENT:other * LATENT + half] = old_rows[:, other * half:(other + 1) * half]
        elif key.startswith(("post_quant_conv", "decoder.conv_in")):
            target[:len(value)].mul_(0.1 if value.dim() > 1 else 1.0)
            if value.dim() > 1:
                target[:len(value), :value.shape[1]] = value
            else:
                target[:len(value)] = value
    # the outer blocks begin as the identity on what their shortcut passes
    for block in (*vae.encoder.down_blocks[0].resnets, *vae.decoder.up_blocks[-1].resnets):
        block.conv2.weight.zero_(), block.conv2.bias.zero_()


def load(work):
    """The trained autoencoder, with the sharpened decoder where there is one."""
    torch.manual_seed(0)
    vae = build()
    load_average(work / "vae.pt", vae=vae)
    if trained(work / "vae-decoder.pt"):
        load_average(work / "vae-decoder.pt", decoder=vae.decoder, post=vae.post_quant_conv)
    return vae.to(DEVICE, memory_format=LAST)


def decode(vae, latents, batch=64):
    """Pictures of latents, a batch at a time."""
    with autocast():
        return torch.cat([vae.decode(z.contiguous(memory_format=LAST)).sample.float() for z in latents.split(batch)])


def scene_batch(renderer, batch, seed):
    """Pictures and the weight of each pixel: half of them of the generators' layouts, half free."""
    scenes = draw_scenes(batch - batch // 4, 2 * seed) + draw_scenes(batch // 4, 2 * seed + 1, free=True)
    images, mask = renderer.draw_with_mask(scenes)
    weight = 1 + (OBJECT_WEIGHT - 1) * mask
    return images.contiguous(memory_format=LAST), weight / weight.mean()


def differences(x):
    return x[..., 1:] - x[..., :-1], x[..., 1:, :] - x[..., :-1, :]


def reconstruction_loss(reconstruction, images, weight):
    """L1, squares, and the L1 of neighbours' differences, which keeps edges sharp."""
    error = reconstruction - images
    l1 = (error.abs() * weight).mean()
    across, along = differences(error)
    edges = (across.abs() * weight[..., 1:]).mean() + (along.abs() * weight[..., 1:, :]).mean()
    return l1 + (error.square() * weight).mean() + 0.5 * edges, error.abs().mean()


def latent_loss(posterior):
    """Keeps the means near unit size and the deviation near the noise that training adds."""
    size = posterior.mean.float().square().mean()
    spread = (posterior.logvar.float() - 2 * math.log(NOISE)).square().mean()
    return 0.01 * (size - 1).clamp(min=0) + 1e-3 * spread, size


def train(work, minutes, batch, lr, begin):
    torch.manual_seed(0)
    vae = build()
    if not trained(work / "vae.pt"):
        begin_from_32(vae, Path(begin) / "emojiland-sd" / "vae")
    vae, renderer = vae.to(memory_format=LAST), Renderer(work)
    training = Training(work / "vae.pt", {"vae": vae}, minutes, lr=lr, ema=0.998)
    for seed in training.steps():
        images, weight = scene_batch(renderer, batch, seed)
        with autocast():
            posterior = vae.encode(images).latent_dist
            noisy = posterior.mean + NOISE * torch.randn_like(posterior.mean)
            reconstruction = vae.decode(noisy).sample
        loss, l1 = reconstruction_loss(reconstruction.float(), images, weight)
        regular, size = latent_loss(posterior)
        training.update(loss + regular, l1=l1, size=size)


def sharpen(work, minutes, batch, lr):
    """Trains the decoder alone, half of the time on exact latents, half of the time on noisy ones."""
    vae, renderer = load(work), Renderer(work)
    decoder = {"decoder": vae.decoder.requires_grad_(True), "post": vae.post_quant_conv.requires_grad_(True)}
    training = Training(work / "vae-decoder.pt", decoder, minutes, lr=lr, ema=0.998)
    for seed in training.steps():
        images, weight = scene_batch(renderer, batch, 2**30 + seed)
        with torch.no_grad(), autocast():
            exact = vae.encode(images).latent_dist.mean
        noisy = exact + NOISE * torch.randint(0, 2, (batch, 1, 1, 1), device=DEVICE) * torch.randn_like(exact)
        with autocast():
            reconstruction = vae.decode(noisy.contiguous(memory_format=LAST)).sample
        loss, l1 = reconstruction_loss(reconstruction.float(), images, weight)
        training.update(loss, l1=l1)


@torch.no_grad()
def latents(work, count=32768, batch=64):
    """The generators' scenes and their latent means as f16 [n, 16, 8, 8].

    They are computed once; delete the file after training the encoder again.
    """
    path, scenes = work / "latents.pt", draw_scenes(count, GENERATOR_SEED)
    if not path.exists():
        vae, renderer, parts = load(work), Renderer(work), []
        for i in range(0, count, batch):
            with autocast():
                images = renderer.draw(scenes[i:i + batch]).contiguous(memory_format=LAST)
                parts.append(vae.encode(images).latent_dist.mean.half().cpu())
        save_atomically(torch.cat(parts), path)
    means = torch.load(path, weights_only=True)
    return scenes[:len(means)], means[:count]


def statistics(work):
    """Mean and deviation of the latents, kept in a file: trained denoisers depend on them."""
    path = work / "latents.json"
    if not path.exists() and (PACKED / path.name).exists():
        path = PACKED / path.name
    if not path.exists():
        means = latents(work)[1].float()
        path.write_text(json.dumps(dict(shift=round(means.mean().item(), 5), scale=round(1 / means.std().item(), 5))))
    return json.loads(path.read_text())


@torch.no_grad()
def heldout(work, count=256, sheet=None):
    """L1 over all pixels and over the objects' pixels, of scenes that no training saw."""
    vae, (images, mask) = load(work), Renderer(work).draw_with_mask(draw_scenes(count, HELDOUT_SEED))
    with autocast():
        means = torch.cat([vae.encode(x.contiguous(memory_format=LAST)).latent_dist.mean for x in images.split(32)])
    reconstruction = decode(vae, means)
    if sheet:
        contact_sheet(torch.stack([images[:40], reconstruction[:40]], 1).flatten(0, 1), sheet)
    error = (reconstruction - images).abs()
    return {"l1": error.mean().item(), "l1 on objects": (error * mask).sum().item() / (3 * mask.sum().item()),
            "latent deviation": means.float().std().item()}


if __name__ == "__main__":
    args = arguments(__doc__, minutes=120.0, decoder_minutes=0.0, batch=24, lr=1e-3, report=0,
                     begin=str(ASSETS))
    if args.report:
        pass
    elif args.decoder_minutes:
        sharpen(args.work, args.decoder_minutes, args.batch, args.lr)
    else:
        train(args.work, args.minutes, args.batch, args.lr, args.begin)
    print(heldout(args.work, sheet=args.work / "vae.png"))
