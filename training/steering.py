"""Steering in torch, as the workers do it in Rust, to collect what the energy sees while it steers.

Writes clean estimates of N trajectories, some steered, labelled with the judge's help: the training set of the
energy's next round (see clip.py). How well steering works is measured by `fairlead evaluate`, not here.
"""
import math
import random
from functools import cached_property

import numpy as np
import torch
import torch.nn.functional as F

import clip
import judge
import tokenizer as bpe
from common import arguments
from data import label_matrix
from sd import Sampler
from words import BACKGROUNDS, BENIGN, OBJECTS, TARGETS, caption

BINS, SHARPNESS, CAP = 10, 50.0, 10.0
LEAST_HYSTERESIS, HYSTERESIS_SHARE, HELD_LEVEL = 0.5, 0.5, 0.4
SMALLEST_CROP = 0.6
STRENGTHS, HELD_SHARE = [0.3, 0.6, 1.0], 0.5
POOL_KINDS = ("target", "pair", "benign", "pair", "benign")


class Energy:
    """Scores of the twenty targets, averaged over the picture and a few crops of it."""

    def __init__(self, work, crops=4):
        self.model = clip.load(work)
        self.texts, self.anchors = clip.target_texts(self.model, bpe.load(work))
        self.crops, self.random = crops, random.Random(0)

    def windows(self):
        """The whole picture, then random windows of 60-100 % of each side, anew at each call."""
        yield 0, 0, 32, 32
        for _ in range(self.crops - 1):
            height, width = (round(32 * self.random.uniform(SMALLEST_CROP, 1)) for _ in range(2))
            yield self.random.randint(0, 32 - height), self.random.randint(0, 32 - width), height, width

    def scores(self, images):
        total = 0
        for top, left, height, width in self.windows():
            part = images[:, :, top:top + height, left:left + width]
            part = part if height == width == 32 else F.interpolate(part, size=32, mode="bilinear", antialias=True)
            total = total + clip.scores(clip.embed_images(self.model, part), self.texts, self.anchors)
        return total / self.crops


class Gate:
    """Opens where a concept's normalised score passes the benign quantile; closes below it less the hysteresis.

    A held gate closes lower still.
    """

    def __init__(self, records, alpha=0.01):
        half = len(records) // 2
        self.mean, self.deviation = records[:half].mean(0), records[:half].std(0) + 1e-6
        largest = ((records[half:] - self.mean) / self.deviation).nan_to_num(-9).amax((1, 2)).sort().values
        self.limit = largest[min(len(largest), math.ceil((1 - alpha) * (len(largest) + 1))) - 1]
        self.hysteresis = max(LEAST_HYSTERESIS, HYSTERESIS_SHARE * self.limit.item())

    def normalise(self, score, t):
        return (score - self.mean[t * BINS // 1000]) / self.deviation[t * BINS // 1000]

    def closing(self, held):
        """Normalised scores at which open gates close, of the shape of `held`."""
        level = self.limit - self.hysteresis
        return torch.where(held, torch.minimum(level, HELD_LEVEL * self.limit), level)

    def amplitude(self, z, held):
        closing = self.closing(held)
        width = (self.limit - closing) * torch.where(held, 1.0, 2.0)
        return ((z - closing) / width.clamp(min=1)).clamp(0.25, 1)

    def threshold(self, t, held):
        return self.mean[t * BINS // 1000] + self.closing(held) * self.deviation[t * BINS // 1000]


def record_scores(sampler, energy, prompts, seeds, steps, guidance, end=0):
    """Largest score per image, time bin and target along unsteered trajectories: [n, 10, 20], NaN where none."""
    parts = []
    for i in range(0, len(prompts), 64):
        chunk = prompts[i:i + 64]
        record = torch.full((len(chunk), BINS, len(TARGETS)), -torch.inf)

        def observe(t, clean):
            if t > end:
                with torch.autocast("cpu", torch.bfloat16):
                    score = energy.scores(sampler.decode(clean)).float()
                record[:, t * BINS // 1000] = torch.maximum(record[:, t * BINS // 1000], score)

        sampler.sample(chunk, seeds[i:i + 64], steps, guidance, observe)
        parts.append(record)
    record = torch.cat(parts)
    return torch.where(record.isfinite(), record, torch.nan)


def smooth(gradient, sigma):
    if sigma == 0:
        return gradient
    kernel = torch.exp(-0.5 * (torch.arange(-2, 3) / sigma) ** 2)
    kernel = (kernel[:, None] * kernel / kernel.sum() ** 2).expand(gradient.shape[1], 1, 5, 5)
    return F.conv2d(F.pad(gradient, (2,) * 4, mode="replicate"), kernel, groups=gradient.shape[1])


def rms(x):
    return x.square().mean((1, 2, 3), keepdim=True).sqrt()


class Steering:
    """One batch's shift of the state (mode C); remembers which gates are open. Those of `held` [n, 20] begin open."""

    def __init__(self, sampler, energy, gate, end, eta, sigma, held):
        self.sampler, self.energy, self.gate = sampler, energy, gate
        self.eta, self.end, self.sigma, self.held = eta, end, sigma, held
        self.open, self.spent, self.touched = held, torch.zeros(len(held), 1, 1, 1), torch.zeros(len(held), dtype=torch.bool)

    def window(self, t):
        into = (t - self.end) / (0.2 * (1000 - self.end))
        return 0.5 - 0.5 * math.cos(math.pi * min(1, max(0, into)))

    def __call__(self, t, clean):
        if t <= self.end:
            return None
        with torch.enable_grad():
            latent = clean.detach().requires_grad_(True)
            images = self.sampler.decode(latent)
            score = self.energy.scores(images)
            z = self.gate.normalise(score.detach(), t)
            known = self.open | self.held
            self.open = (z > self.gate.limit) | (known & (z >= self.gate.closing(self.held)))
            self.touched = self.touched | self.open.any(1)
            if not self.open.any():
                return None
            excess = F.softplus(SHARPNESS * (score - self.gate.threshold(t, self.held))) / SHARPNESS
            gradient, = torch.autograd.grad((excess * self.open).sum(), latent)
        gradient = smooth(gradient, self.sigma)
        amount = torch.where(self.open, self.gate.amplitude(z, self.held), 0).amax(1).view(-1, 1, 1, 1)
        step = torch.minimum(self.eta * amount * self.window(t), CAP - self.spent)
        self.spent = self.spent + step
        return -step * rms(clean) * gradient / (rms(gradient) + 1e-8)


def prompts(kind, count, seed):
    """Prompts of a kind ("target", "pair", "benign") and the objects asked for, as indices [n, 2]."""
    rng, texts, objects = random.Random(seed), [], []
    for i in range(count):
        names = [TARGETS[i % len(TARGETS)]] if kind != "benign" else rng.sample(BENIGN, rng.randint(1, 2))
        if kind == "pair":
            names = rng.sample([names[0], rng.choice(BENIGN)], 2)
        texts.append(caption(names, rng.choice(list(BACKGROUNDS)), rng))
        objects.append(([OBJECTS.index(n) for n in names] + [-1])[:2])
    return texts, np.array(objects)


def calibrate(sampler, energy, count, steps, guidance, end):
    """The gate of method.md, from benign prompts and the steps of the window (t > end)."""
    texts, _ = prompts("benign", count, seed=100)
    return Gate(record_scores(sampler, energy, texts, list(range(10**6, 10**6 + count)), steps, guidance, end))


class Bench:
    """The trained models together, and the gate when it is needed."""

    def __init__(self, work, crops=4, calibration=400, steps=25, guidance=4.5, end=600):
        self.sampler, self.energy, self.judge = Sampler(work), Energy(work, crops), judge.load(work)
        self.limits = judge.thresholds(self.judge, work)
        self.work, self.steps, self.guidance, self.end, self.calibration = work, steps, guidance, end, calibration

    @cached_property
    def gate(self):
        return calibrate(self.sampler, self.energy, self.calibration, self.steps, self.guidance, self.end)


def collect_block(bench, kind, steer, rng, block, views):
    """One batch's clean estimates at `views` random steps and its final pictures; with labels and times."""
    texts, objects = prompts(kind, 64, seed=block)
    stride = 1000 // bench.steps
    chosen, seen = {stride * i + 1 for i in rng.sample(range(bench.steps), views)}, []
    asked = label_matrix(objects).bool()
    targets = asked[:, -len(TARGETS):]
    knobs = dict(eta=rng.choice(STRENGTHS), sigma=rng.choice([0.0, 1.0]), held=targets & (rng.random() < HELD_SHARE))
    steering = Steering(bench.sampler, bench.energy, bench.gate, bench.end, **knobs) if steer else None

    def observe(t, clean):
        if t in chosen:
            seen.append((t, bench.sampler.decode(clean)))
        return steering(t, clean) if steer else None

    seeds = [block * 1000 + i for i in range(64)]
    final = bench.sampler.sample(texts, seeds, bench.steps, bench.guidance, observe)
    verdict = judge.logits(bench.judge, final).sigmoid()
    if steer:
        left = (verdict > 0.5)[:, -len(TARGETS):][targets].float().mean().item()
        print(f"{kind} eta {knobs['eta']} held {knobs['held'].any().item()} touched {steering.touched.float().mean().item():.2f} "
              f"targets left {left:.2f}", flush=True)
    late = torch.where(verdict > 0.6, 1.0, torch.where(verdict < 0.15, 0.0, -1.0))
    early = torch.where(asked & (late != 1), -1.0, torch.where(~asked & (late == 1), -1.0, asked.float()))
    seen.append((0, final))
    return (torch.cat([images for _, images in seen]), torch.cat([late if t < 250 else early for t, _ in seen]),
            torch.cat([torch.full((64,), t) for t, _ in seen]))


def collect(bench, count, seed, steered, views):
    """Clean estimates along trajectories, a share of them steered, with labels: 1 there, 0 not, -1 unknown.

    Early estimates are labelled with what was asked if the judge finds it at the end, late ones by the judge alone.
    """
    rng = random.Random(seed)
    blocks = []
    for i in range(count // 64):
        kind = POOL_KINDS[i % len(POOL_KINDS)]
        blocks.append(collect_block(bench, kind, rng.random() < steered and kind != "benign", rng, seed * 1000 + i, views))
    images, labels, times = (torch.cat(parts) for parts in zip(*blocks))
    pixels = ((images.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).contiguous()
    return dict(pixels=pixels, labels=labels.char(), times=times)


if __name__ == "__main__":
    args = arguments(__doc__, pool=2240, views=8, steered=0.0, seed=10, crops=4, calibration=400, end=20, guidance=4.5)
    bench = Bench(args.work, args.crops, args.calibration, guidance=args.guidance, end=args.end)
    torch.save(collect(bench, args.pool, args.seed, args.steered, args.views), args.work / f"pool-{args.seed}.pt")
