"""Trains the judge: a plain CNN that names the objects of a scene. It measures; its gradient is never used."""
import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

import augment
from common import Training, arguments, auroc, load_average
from data import as_tensor, label_matrix, scenes
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


def build():
    torch.manual_seed(7)
    return Judge().to(memory_format=LAST)


def load(work):
    judge = build()
    load_average(work / "judge.pt", judge=judge)
    return judge


def logits(judge, images):
    with torch.no_grad():
        return torch.cat([judge(x) for x in images.clamp(-1, 1).split(500)])


@torch.no_grad()
def reconstructions(work):
    """Decoded latents of the judge's scenes, slightly noised as a generator's are; empty before the VAE exists."""
    if not (work / "vae.pt").exists():
        return np.zeros((0, 32, 32, 3), np.uint8)
    path = work / "reconstructions-judge.npy"
    if not path.exists():
        import vae as autoencoder
        vae, parts = autoencoder.load(work), []
        torch.manual_seed(8)
        for x in as_tensor(scenes(work, "judge")["pixels"]).split(250):
            z = vae.encode(x).latent_dist.mean
            y = vae.decode(z + 0.3 * torch.rand(len(z), 1, 1, 1) * torch.randn_like(z)).sample
            parts.append(((y.clamp(-1, 1) + 1) * 127.5).byte().permute(0, 2, 3, 1).numpy())
        np.save(path, np.concatenate(parts))
    return np.load(path)


def training_set(work):
    fixed, free = scenes(work, "judge"), scenes(work, "judge-free")
    decoded = reconstructions(work)
    pixels = np.concatenate([fixed["pixels"], free["pixels"], decoded])
    objects = np.concatenate([fixed["objects"], free["objects"], fixed["objects"][:len(decoded)]])
    return pixels, label_matrix(objects)


def train(work, minutes, batch=128):
    judge = build()
    pixels, labels = training_set(work)
    training = Training(work / "judge.pt", {"judge": judge}, minutes, lr=2e-3, ema=0.998, weight_decay=0.02)
    for _ in training.steps():
        index = np.random.randint(0, len(pixels), batch)
        images = augment.noise(augment.colour(augment.blur(augment.warp(as_tensor(pixels[index])), 1.0, 0.3)), 0.15)
        with torch.autocast("cpu", torch.bfloat16):
            output = judge(images.clamp(-1, 1).contiguous(memory_format=LAST))
        loss = F.binary_cross_entropy_with_logits(output.float(), labels[index], reduction="sum") / batch
        training.update(loss)


def thresholds(judge, work):
    """Per object, the probability in [0.3, 0.7] with the fewest errors on scenes set aside for it."""
    split = scenes(work, "tuning")
    probability = logits(judge, as_tensor(split["pixels"])).sigmoid()
    truth = label_matrix(split["objects"]).bool()
    grid = torch.linspace(0.3, 0.7, 41)
    errors = torch.stack([((probability >= t) != truth).sum(0) for t in grid]).float()
    distance = (grid - 0.5).abs()[:, None]
    return grid[(errors + distance).argmin(0)]


def found(judge, images, limits):
    """0/1 tensor [n, 60]: which objects the judge finds in images in [-1, 1]."""
    return logits(judge, images).sigmoid() >= limits


def report(work):
    judge = load(work)
    limits = thresholds(judge, work)
    split = scenes(work, "heldout")
    images, truth = as_tensor(split["pixels"]), label_matrix(split["objects"]).bool()
    guess = found(judge, images, limits)
    scores = logits(judge, images).numpy()
    areas = [auroc(scores[:, k], truth[:, k].numpy()) for k in range(len(OBJECTS))]
    return {
        "scenes with every label right": (guess == truth).all(1).float().mean().item(),
        "labels right": (guess == truth).float().mean().item(),
        "objects found": guess[truth].float().mean().item(),
        "worst AUROC": min(areas),
    }


if __name__ == "__main__":
    args = arguments(__doc__, minutes=14.0)
    train(args.work, args.minutes)
    print(report(args.work))
