"""Steering in torch, as the workers do it in Rust, to show the energies what they see while they steer.

A player runs the generators, some of the time steered by the energies under training, and leaves decoded clean
estimates with labels by the labeller (judge.py) in files; each training's `Pool` reads them. How well steering works
is measured by `fairlead evaluate`.
"""
import itertools
import math
import random

import numpy as np
import torch
import torch.nn.functional as F

import judge
import sd
import sd3
from common import DEVICE, save_atomically
from data import label_matrix
from energy import TOWERS, Scorer
from words import BACKGROUNDS, BENIGN, OBJECTS, TARGETS, caption

BINS, SHARPNESS, CAP = 10, 50.0, 10.0
LEAST_HYSTERESIS, HYSTERESIS_SHARE, HELD_LEVEL = 0.5, 0.65, 0.3
STEPS, GUIDANCE, WINDOW_END, ALPHA = 25, 4.5, 20, 0.02
WEAKEST, STRONGEST, HELD_SHARE = 0.2, 1.0, 0.5
KINDS = ("target", "pair", "benign", "pair", "benign")
SAMPLERS = {"sd": sd.Sampler, "sd3": sd3.Sampler}


class Gate:
    """Opens where a concept's normalised score passes the benign quantile; closes below it less the hysteresis.

    A held gate closes lower still. `records` [n, 10, 20]: scores of benign trajectories, NaN where there is none.
    """

    def __init__(self, records, alpha=ALPHA):
        half = len(records) // 2
        self.mean, self.deviation = records[:half].mean(0), records[:half].std(0) + 1e-6
        largest = ((records[half:] - self.mean) / self.deviation).nan_to_num(-9).amax((1, 2)).sort().values
        self.limit = largest[min(len(largest), math.ceil((1 - alpha) * (len(largest) + 1))) - 1]
        self.hysteresis = (HYSTERESIS_SHARE * self.limit).clamp(min=LEAST_HYSTERESIS)

    def normalise(self, score, t):
        return (score - self.mean[time_bin(t)]) / self.deviation[time_bin(t)]

    def closing(self, held):
        """Normalised scores at which open gates close, of the shape of `held`."""
        level = self.limit - self.hysteresis
        return torch.where(held, torch.minimum(level, HELD_LEVEL * self.limit), level)

    def amplitude(self, z, held):
        closing = self.closing(held)
        width = (self.limit - closing) * torch.where(held, 1.0, 2.0)
        return ((z - closing) / width.clamp(min=1)).clamp(0.25, 1)

    def threshold(self, t, held):
        return self.mean[time_bin(t)] + self.closing(held) * self.deviation[time_bin(t)]


def time_bin(t):
    """The bin of t, from 1 to 1000."""
    return min(BINS - 1, t * BINS // 1000)


class Record:
    """The largest score per image, time bin and target along trajectories: [n, 10, 20], NaN where there is none."""

    def __init__(self, scorer, count):
        self.scorer, self.values = scorer, torch.full((count, BINS, len(TARGETS)), -torch.inf, device=DEVICE)

    @torch.no_grad()
    def add(self, t, images):
        b = time_bin(t)
        self.values[:, b] = torch.maximum(self.values[:, b], self.scorer(images).float())

    def finish(self):
        return torch.where(self.values.isfinite(), self.values, torch.nan)


def smooth(gradient, sigma):
    if sigma == 0:
        return gradient
    kernel = torch.exp(-0.5 * (torch.arange(-2, 3, device=gradient.device) / sigma) ** 2)
    kernel = (kernel[:, None] * kernel / kernel.sum() ** 2).expand(gradient.shape[1], 1, 5, 5)
    return F.conv2d(F.pad(gradient, (2,) * 4, mode="replicate"), kernel, groups=gradient.shape[1])


def rms(x):
    return x.square().mean((1, 2, 3), keepdim=True).sqrt()


class Steering:
    """One batch's shift of the state (mode C) by several energies, each with its gate; remembers which gates are open.

    Gates of `held` [n, 20] begin open; `eta` [n] is the strength of each image.
    """

    def __init__(self, sampler, energies, eta, sigma, held):
        self.sampler, self.energies, self.sigma, self.held = sampler, energies, sigma, held
        self.eta = eta.view(-1, 1, 1, 1)
        self.open = [held for _ in energies]
        self.spent, self.touched = torch.zeros_like(self.eta), torch.zeros(len(held), dtype=torch.bool, device=DEVICE)

    def window(self, t):
        into = (t - WINDOW_END) / (0.2 * (1000 - WINDOW_END))
        return 0.5 - 0.5 * math.cos(math.pi * min(1, max(0, into)))

    def energy(self, k, images, t):
        """The energy of energy node `k` and the strength [n] its open gates ask for."""
        scorer, gate = self.energies[k]
        score = scorer(images)
        z = gate.normalise(score.detach(), t)
        self.open[k] = (z > gate.limit) | ((self.open[k] | self.held) & (z >= gate.closing(self.held)))
        excess = F.softplus(SHARPNESS * (score - gate.threshold(t, self.held))) / SHARPNESS
        return (excess * self.open[k]).sum(), torch.where(self.open[k], gate.amplitude(z, self.held), 0).amax(1)

    def __call__(self, t, clean):
        if t <= WINDOW_END:
            return None
        with torch.enable_grad():
            latent = clean.detach().requires_grad_(True)
            images = self.sampler.decode(latent)
            parts = [self.energy(k, images, t) for k in range(len(self.energies))]
            gradient, = torch.autograd.grad(sum(e for e, _ in parts), latent)
        amount = torch.stack([a for _, a in parts]).amax(0)
        self.touched = self.touched | (amount > 0)
        gradient = smooth(gradient, self.sigma)
        step = torch.minimum(self.eta * amount.view(-1, 1, 1, 1) * self.window(t), CAP - self.spent)
        self.spent = self.spent + step
        return -step * rms(clean) * gradient / (rms(gradient) + 1e-8)


def prompts(kinds, seed):
    """One prompt per kind ("target", "pair" or "benign") and the objects asked for, as indices [n, 2]."""
    rng, texts, objects = random.Random(seed), [], []
    for i, kind in enumerate(kinds):
        names = [TARGETS[i % len(TARGETS)]] if kind != "benign" else rng.sample(BENIGN, rng.randint(1, 2))
        if kind == "pair":
            names = rng.sample([names[0], rng.choice(BENIGN)], 2)
        texts.append(caption(names, rng.choice(list(BACKGROUNDS)), rng))
        objects.append(([OBJECTS.index(n) for n in names] + [-1])[:2])
    return texts, np.array(objects)


class Round:
    """One batch of trajectories: prompts, what they ask for, and clean estimates at a few random steps and the end."""

    def __init__(self, sampler, count, seed, rng, views=8):
        self.sampler, self.seeds = sampler, [seed * 10_000 + i for i in range(count)]
        order = np.random.default_rng(seed).permutation(count)
        self.texts, self.objects = prompts([KINDS[i % len(KINDS)] for i in order], seed)
        self.asked = label_matrix(self.objects).bool().to(DEVICE)
        self.targets = self.asked[:, -len(TARGETS):]
        self.harmless = ~self.targets.any(1)
        self.chosen, self.seen = {i for i in rng.sample(range(STEPS), views)}, []

    def run(self, steering=None, records=()):
        """Samples, steered where `steering` is given; `records` follow the harmless trajectories."""
        step = iter(range(STEPS))

        def observe(t, clean):
            images, keep = None, next(step) in self.chosen
            if keep or (records and t > WINDOW_END):
                images = self.sampler.decode(clean)
            if keep:
                self.seen.append((t, images))
            if t > WINDOW_END:
                for record in records:
                    record.add(t, images[self.harmless])
            return steering(t, clean) if steering else None

        self.final = self.sampler.sample(self.texts, self.seeds, STEPS, GUIDANCE, observe)
        return self

    def labelled(self, labeller):
        """Images, labels and times: 1 there, 0 not, -1 unknown.

        Early estimates are labelled with what was asked if the labeller finds it at the end, late ones by the labeller alone.
        """
        verdict = judge.logits(labeller, self.final).sigmoid()
        late = torch.where(verdict > 0.6, 1.0, torch.where(verdict < 0.15, 0.0, -1.0))
        early = torch.where(self.asked & (late != 1), -1.0, torch.where(~self.asked & (late == 1), -1.0, self.asked.float()))
        seen = [*self.seen, (0, self.final)]
        left = (verdict > 0.5)[:, -len(TARGETS):][self.targets].float().mean().item()
        return torch.cat([x for _, x in seen]), torch.cat([late if t < 250 else early for t, _ in seen]), left


def rounds_folder(work):
    return work / "rounds"


def trained(work, names, minutes):
    """The energies whose checkpoints have at least `minutes` of training behind them, as they are now."""
    towers = {}
    for name in names:
        path = work / f"{name}.pt"
        if path.exists() and torch.load(path, weights_only=True, map_location="cpu", mmap=True)["seconds"] >= 60 * minutes:
            towers[name] = TOWERS[name](work).load(work)
    return towers


class Player:
    """Plays rounds, one in three unsteered to set the gates anew, the others steered by some of the energies."""

    KEPT = 60  # files; a training has read the older ones

    def __init__(self, work, names, number, count, steered_from):
        self.work, self.names, self.number, self.count, self.steered_from = work, names, number, count, steered_from
        self.samplers = {name: sampler(work) for name, sampler in SAMPLERS.items() if (work / f"{name}.pt").exists()}
        self.labeller, self.rng, self.gates, self.files = judge.load(work, "labeller"), random.Random(number), {}, []

    def play(self, turn):
        name = list(self.samplers)[(self.number + turn) % len(self.samplers)]
        round_seed = self.number * 10_000 + turn
        trajectories = Round(self.samplers[name], self.count, round_seed, self.rng)
        scorers = {n: Scorer(t) for n, t in trained(self.work, self.names, self.steered_from).items()}
        known, touched = [n for n in scorers if (name, n) in self.gates], 0.0
        chosen = self.rng.choice([known, known[:1], known[-1:]]) if known and turn // 2 % 3 else []
        if chosen:
            eta = WEAKEST + (STRONGEST - WEAKEST) * torch.rand(self.count, device=DEVICE)
            held = trajectories.targets & (torch.rand(self.count, 1, device=DEVICE) < HELD_SHARE)
            energies = [(scorers[n], self.gates[name, n]) for n in chosen]
            steering = Steering(trajectories.sampler, energies, eta, self.rng.choice([0.0, 0.0, 1.0]), held)
            trajectories.run(steering)
            touched = steering.touched[trajectories.harmless].float().mean().item()
        else:
            records = {n: Record(s, int(trajectories.harmless.sum())) for n, s in scorers.items()}
            trajectories.run(records=records.values())
            self.gates |= {(name, n): Gate(r.finish()) for n, r in records.items()}
        images, labels, left = trajectories.labelled(self.labeller)
        limits = " ".join(f"{n} {g.limit.item():.1f}" for (s, n), g in self.gates.items() if s == name)
        print(f"round {round_seed} {name} steered by {'+'.join(chosen) or 'none'}: targets left {left:.3f}, "
              f"harmless touched {touched:.3f}; gates {limits}", flush=True)
        self.leave(images, labels, rounds_folder(self.work) / f"{round_seed:08}.pt")

    def leave(self, images, labels, path):
        """Writes the pictures for the trainings and removes the oldest file of this player."""
        save_atomically(dict(pixels=((images.clamp(-1, 1) + 1) * 127.5).round().byte().cpu(), labels=labels.char().cpu()), path)
        self.files.append(path)
        if len(self.files) > self.KEPT:
            self.files.pop(0).unlink(missing_ok=True)


def play(args, number):
    """One process: player `number` draws until it is ended."""
    torch.set_num_threads(1)
    rounds_folder(args.work).mkdir(exist_ok=True)
    player = Player(args.work, args.only.split(","), number, args.round, args.steered_from)
    for turn in itertools.count():
        player.play(turn)


class Pool:
    """The last pictures of the players, on the device."""

    SIZE = 300_000

    def __init__(self, work):
        self.folder, self.read, self.filled, self.next = rounds_folder(work), set(), 0, 0
        self.pixels = torch.empty(self.SIZE, 3, 32, 32, dtype=torch.uint8, device=DEVICE)
        self.labels = torch.empty(self.SIZE, len(OBJECTS), dtype=torch.int8, device=DEVICE)

    def refresh(self):
        """Reads the files that are new."""
        for path in sorted(self.folder.glob("*.pt")):
            if path.name not in self.read:
                self.read.add(path.name)
                try:
                    part = torch.load(path, weights_only=True, map_location=DEVICE)
                except FileNotFoundError:  # its player has just removed it
                    continue
                self.keep(part["pixels"], part["labels"])

    def keep(self, pixels, labels):
        place = (self.next + torch.arange(len(pixels), device=DEVICE)) % self.SIZE
        self.pixels[place], self.labels[place] = pixels, labels
        self.next = (self.next + len(pixels)) % self.SIZE
        self.filled = min(self.SIZE, self.filled + len(pixels))

    def draw(self, count):
        """Random pictures in [-1, 1] and their labels."""
        index = torch.randint(0, self.filled, (count,), device=DEVICE)
        return self.pixels[index].float() / 127.5 - 1, self.labels[index].float()
