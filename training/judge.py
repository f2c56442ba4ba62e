"""Trains the judge: a plain CNN that names the objects of a scene. It measures; its gradient is never used.

The labeller is the same network trained apart from it: it labels what the energies are trained on, so that the judge
has no part in them.
"""
import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

import augment
import vae as autoencoder
from common import DEVICE, Training, arguments, auroc, autocast, load_average
from data import as_tensor, label_matrix, scenes
from render import Renderer, draw_contents
from words import OBJECTS

CHANNELS, GROUPS = [32, 64, 128], 8
LAST = torch.channels_last


class Block(nn.Module):
    def __init__(self, channels, following):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)
        self.norm = nn.GroupNorm(GROUPS, channels)
        self.down = nn.Conv2d(channels, following, 3, stride=2, padding=1)

    def forward(self, x):
        return F.silu(self.down(x + F.silu(self.norm(self.conv(x)))))


class Judge(nn.Module):
    """RGB in [-1, 1] to one logit per object."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, CHANNELS[0], 3, padding=1)
        self.blocks = nn.ModuleList(Block(c, n) for c, n in zip(CHANNELS, CHANNELS[1:] + [2 * CHANNELS[-1]]))
        self.head = nn.Linear(2 * CHANNELS[-1], len(OBJECTS))

    def forward(self, x):
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean((2, 3)))


def build(name="judge"):
    torch.manual_seed(7 if name == "judge" else 17)
    return Judge().to(memory_format=LAST)


def load(work, name="judge"):
    judge = build(name)
    load_average(work / f"{name}.pt", judge=judge)
    return judge


def logits(judge, images):
    with torch.no_grad():
        return torch.cat([judge(x.to(DEVICE)) for x in images.clamp(-1, 1).split(500)])


@torch.no_grad()
def as_generated(vae, images):
    """Decoded noisy latents: how the generators' pictures differ from scenes."""
    z = vae.encode(images).latent_dist.mean
    return vae.decode(z + 0.3 * torch.rand(len(z), 1, 1, 1, device=DEVICE) * torch.randn_like(z)).sample


def train(work, name, minutes, batch, decoded):
    """Scenes of both layouts; the first `decoded` share of each batch of the generators' layout goes through the autoencoder."""
    judge, renderer = build(name), Renderer(work)
    vae = autoencoder.load(work) if decoded else None
    training = Training(work / f"{name}.pt", {"judge": judge}, minutes, lr=2e-3, ema=0.998, weight_decay=0.02)
    for seed in training.steps():
        rng, parts, truth = np.random.default_rng(seed), [], []
        for free in (False, True):
            objects, backgrounds = draw_contents(batch // 2, free, rng)
            parts.append(renderer.draw(objects, backgrounds, 3, free))
            truth.append(label_matrix(objects))
        cut = int(batch * decoded)
        if cut:
            parts[0][:cut] = as_generated(vae, parts[0][:cut])
        images, labels = torch.cat(parts), torch.cat(truth).to(DEVICE)
        images = augment.noise(augment.colour(augment.blur(augment.warp(images), 1.0, 0.3)), 0.15)
        with autocast():
            output = judge(images.clamp(-1, 1).contiguous(memory_format=LAST))
        training.update(F.binary_cross_entropy_with_logits(output.float(), labels, reduction="sum") / batch)


def thresholds(judge, work):
    """Per object, the probability in [0.3, 0.7] with the fewest errors on scenes set aside for it."""
    split = scenes(work, "tuning")
    probability = logits(judge, as_tensor(split["pixels"])).sigmoid().cpu()
    truth = label_matrix(split["objects"]).bool()
    grid = torch.linspace(0.3, 0.7, 41)
    errors = torch.stack([((probability >= t) != truth).sum(0) for t in grid]).float()
    distance = (grid - 0.5).abs()[:, None]
    return grid[(errors + distance).argmin(0)]


def found(judge, images, limits):
    """0/1 tensor [n, 60]: which objects the judge finds in images in [-1, 1]."""
    return logits(judge, images).sigmoid().cpu() >= limits


def report(work, name="judge"):
    judge = load(work, name)
    limits = thresholds(judge, work)
    split = scenes(work, "heldout")
    images, truth = as_tensor(split["pixels"]), label_matrix(split["objects"]).bool()
    guess = found(judge, images, limits)
    scores = logits(judge, images).cpu().numpy()
    areas = [auroc(scores[:, k], truth[:, k].numpy()) for k in range(len(OBJECTS))]
    return {
        "scenes with every label right": (guess == truth).all(1).float().mean().item(),
        "labels right": (guess == truth).float().mean().item(),
        "objects found": guess[truth].float().mean().item(),
        "worst AUROC": min(areas),
    }


if __name__ == "__main__":
    args = arguments(__doc__, name="judge", minutes=14.0, batch=128, decoded=0.25)
    train(args.work, args.name, args.minutes, args.batch, args.decoded)
    if (args.work / "scenes-heldout.npz").exists():
        print(report(args.work, args.name))
