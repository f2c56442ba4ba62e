"""Trains what looks at finished pictures: three judges of different kinds, which measure, and a verifier, which checks.

All name the objects of a picture. None ever steers, none shares a seed, a scene or a weight with another: `judge-cnn`
is a plain CNN, `judge-vit` a vision transformer, `judge-mixer` a ConvMixer; the `verifier` is a wider CNN, because the
energies that it doubles are transformers. The judges see decoded latents too, the verifier scenes alone.
"""
import torch
import torch.nn.functional as F
from torch import nn
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

import augment
import vae as autoencoder
from common import ATTENTION, DEVICE, Training, arguments, auroc, autocast, load_average
from render import ALL_SETS, GENERATOR_SETS, HELDOUT_SEED, SIDE, Renderer, draw_scenes, labels_of
from words import OBJECTS

GROUPS = 8
CHANNELS = {"judge-cnn": [16, 32, 64, 128], "verifier": [24, 48, 96, 192]}
FIRST_SEED = {"judge-cnn": 2**35, "judge-vit": 2**36, "judge-mixer": 2**37, "verifier": 2**38}
DECODED = 0.25  # share of what the judges train on that goes through the autoencoder
TUNING_SEED = HELDOUT_SEED + 1
LAST = torch.channels_last


class Block(nn.Module):
    def __init__(self, channels, following):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)
        self.norm = nn.GroupNorm(GROUPS, channels)
        self.down = nn.Conv2d(channels, following, 3, stride=2, padding=1)

    def forward(self, x):
        return F.silu(self.down(x + F.silu(self.norm(self.conv(x)))))


class Cnn(nn.Module):
    """RGB in [-1, 1] to one logit per object."""

    def __init__(self, channels):
        super().__init__()
        self.stem = nn.Conv2d(3, channels[0], 3, padding=1)
        self.blocks = nn.ModuleList(Block(c, n) for c, n in zip(channels, channels[1:] + [2 * channels[-1]]))
        self.head = nn.Linear(2 * channels[-1], len(OBJECTS))

    def forward(self, x):
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean((2, 3)))


class Vit(nn.Module):
    """CLIP's vision tower, whose projection gives the logits."""

    def __init__(self):
        super().__init__()
        config = CLIPVisionConfig(hidden_size=144, intermediate_size=432, num_hidden_layers=5, num_attention_heads=6, image_size=SIDE,
                                  patch_size=8, hidden_act="gelu", projection_dim=len(OBJECTS))
        self.tower = CLIPVisionModelWithProjection._from_config(config, attn_implementation=ATTENTION)

    def forward(self, x):
        return self.tower(pixel_values=x.contiguous()).image_embeds


class MixerBlock(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.depthwise, self.pointwise = nn.Conv2d(width, width, 7, padding=3, groups=width), nn.Conv2d(width, width, 1)
        self.norms = nn.ModuleList(nn.GroupNorm(GROUPS, width) for _ in range(2))

    def forward(self, x):
        x = x + self.norms[0](F.gelu(self.depthwise(x)))
        return self.norms[1](F.gelu(self.pointwise(x)))


class Mixer(nn.Module):
    """ConvMixer: patches of 4 x 4, then depthwise and pointwise convolutions in turn."""

    def __init__(self, width=128, depth=6):
        super().__init__()
        self.stem = nn.Conv2d(3, width, 4, stride=4)
        self.blocks = nn.Sequential(*(MixerBlock(width) for _ in range(depth)))
        self.head = nn.Linear(width, len(OBJECTS))

    def forward(self, x):
        return self.head(self.blocks(F.gelu(self.stem(x))).mean((2, 3)))


def build(name):
    torch.manual_seed(FIRST_SEED[name])
    if name in CHANNELS:
        return Cnn(CHANNELS[name]).to(memory_format=LAST)
    return Vit() if name == "judge-vit" else Mixer().to(memory_format=LAST)


def load(work, name):
    judge = build(name)
    load_average(work / f"{name}.pt", judge=judge)
    return judge


@torch.no_grad()
def logits(judge, images):
    with autocast():
        return torch.cat([judge(x.to(DEVICE).contiguous(memory_format=LAST)).float() for x in images.clamp(-1, 1).split(100)])


@torch.no_grad()
def as_generated(vae, images):
    """Decoded noisy latents: how the generators' pictures differ from scenes."""
    with autocast():
        z = vae.encode(images.contiguous(memory_format=LAST)).latent_dist.mean
        return vae.decode(z + 0.3 * torch.rand(len(z), 1, 1, 1, device=DEVICE) * torch.randn_like(z)).sample.float()


def train(work, name, minutes, batch, lr):
    judge, renderer = build(name), Renderer(work)
    vae = autoencoder.load(work) if name != "verifier" else None
    training = Training(work / f"{name}.pt", {"judge": judge}, minutes, lr=lr, ema=0.998, weight_decay=0.02)
    for seed in training.steps():
        start = FIRST_SEED[name] + 2 * seed
        scenes = draw_scenes(batch // 2, start, ALL_SETS) + draw_scenes(batch - batch // 2, start + 1, ALL_SETS, free=True)
        images, labels = renderer.draw(scenes), labels_of(scenes)
        cut = int(batch * DECODED)
        if vae:
            images[:cut] = as_generated(vae, images[:cut])
        images = augment.usual(images)
        with autocast():
            output = judge(images.contiguous(memory_format=LAST))
        training.update(F.binary_cross_entropy_with_logits(output.float(), labels, reduction="sum") / batch)


def heldout(work, seed, sets, count=2000):
    """Pictures and bool labels of scenes that no training saw."""
    scenes, renderer = draw_scenes(count, seed, sets), Renderer(work)
    return torch.cat([renderer.draw(scenes[i:i + 200]) for i in range(0, count, 200)]), labels_of(scenes).bool()


def thresholds(judge, work):
    """Per object, the probability in [0.3, 0.7] with the fewest errors on scenes set aside for it."""
    images, truth = heldout(work, TUNING_SEED, ALL_SETS)
    probability = logits(judge, images).sigmoid()
    grid = torch.linspace(0.3, 0.7, 41, device=DEVICE)
    errors = torch.stack([((probability >= t) != truth).sum(0) for t in grid]).float()
    distance = (grid - 0.5).abs()[:, None]
    return grid[(errors + distance).argmin(0)]


def found(judge, images, limits):
    """Bool [n, 60]: which objects the judge finds in images in [-1, 1]."""
    return logits(judge, images).sigmoid() >= limits


def report(work, name):
    judge = load(work, name)
    limits = thresholds(judge, work)
    images, truth = heldout(work, HELDOUT_SEED, GENERATOR_SETS)
    guess, scores = found(judge, images, limits), logits(judge, images).cpu().numpy()
    single = truth.sum(1) == 1
    return {
        "scenes with every label right": (guess == truth).all(1).float().mean().item(),
        "single objects found": guess[single][truth[single]].float().mean().item(),
        "objects of pairs found": guess[~single][truth[~single]].float().mean().item(),
        "found but not there, per scene": (guess & ~truth).sum(1).float().mean().item(),
        "worst AUROC": min(auroc(scores[:, k], truth[:, k].cpu().numpy()) for k in range(len(OBJECTS))),
    }


if __name__ == "__main__":
    args = arguments(__doc__, name="judge-cnn", minutes=40.0, batch=96, lr=2e-3)
    train(args.work, args.name, args.minutes, args.batch, args.lr if args.name != "judge-vit" else args.lr / 2)
    print(report(args.work, args.name))
