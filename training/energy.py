"""Trains the contrastive energies, CLIP and SigLIP side by side, whose score against neutral anchors tells whether an object is there.

The loss is on the score that steering uses, so nothing is left to luck: for each object one phrase is drawn, the
score is its cosine less the log-sum-exp of the anchors' cosines (K = 100), and every object of a scene is a positive.
Half of each batch are scenes, half what the generators draw, a part of it while these very energies steer
(steering.py), labelled by a network that is not the judge. A share of all is attacked by the model's own gradient:
a robust model's gradient removes objects, not its score.

Each energy trains in a process of its own; players draw with the generators in others.
"""
import multiprocessing
import multiprocessing.connection
import random

import numpy as np
import torch
import torch.nn.functional as F

import augment
import clip
import siglip
from common import DEVICE, Training, arguments, autocast, auroc
from data import as_tensor, label_matrix, scenes
from render import Renderer, draw_contents
from words import ANCHORS, OBJECTS, SYNONYMS, TARGETS, article, phrases

K = 100.0
LEVEL, PULL, POSITIVE_WEIGHT = 6.0, 0.02, 8.0
TEMPLATES = ["{}", "{}", "a picture of {}", "a photo of {}", "a drawing of {}", "an image with {}"]
TOWERS = {"clip": clip.Tower, "siglip": siglip.Tower}


def scores(images, texts, anchors):
    """score_k of the method: images [n, d]; texts a list of [phrases, d] per concept or one [concepts, d]; [n, concepts]."""
    neutral = (K * images @ anchors.T).logsumexp(-1, keepdim=True)
    if torch.is_tensor(texts):
        return images @ texts.T - neutral / K
    cosines = [(K * images @ t.T).logsumexp(-1) for t in texts]
    return (torch.stack(cosines, 1) - neutral) / K


class Phrases:
    """Token ids of every way to name each object; one is drawn per object and step."""

    def __init__(self, tower):
        names = []
        for obj in OBJECTS:
            nouns = [article(n) for n in [obj, obj, obj, *SYNONYMS.get(obj, [])]]
            names.append([obj, *(t.format(n) for n in nouns for t in TEMPLATES)])
        self.counts = np.array([len(n) for n in names])
        self.starts = np.concatenate([[0], self.counts.cumsum()[:-1]])
        self.ids = tower.encode([n for group in names for n in group]).to(DEVICE)
        self.anchors = tower.encode(ANCHORS).to(DEVICE)

    def draw(self, rng):
        return torch.cat([self.ids[self.starts + (rng.random(len(OBJECTS)) * self.counts).astype(int)], self.anchors])


class Scorer:
    """Scores of the twenty targets as an energy node gives them: averaged over the picture and a few crops of it."""

    SMALLEST_CROP = 0.6

    def __init__(self, tower, crops=4):
        self.tower, self.crops, self.random = tower, crops, random.Random(0)
        self.refresh()

    @torch.no_grad()
    def refresh(self):
        """Embeds the texts anew: needed whenever the tower has been trained on."""
        self.texts = [self.tower.embed_texts(self.tower.encode(phrases(t)).to(DEVICE)) for t in TARGETS]
        self.anchors = self.tower.embed_texts(self.tower.encode(ANCHORS).to(DEVICE))

    def windows(self):
        """The whole picture, then random windows of 60-100 % of each side, anew at each call."""
        yield 0, 0, 32, 32
        for _ in range(self.crops - 1):
            height, width = (round(32 * self.random.uniform(self.SMALLEST_CROP, 1)) for _ in range(2))
            yield self.random.randint(0, 32 - height), self.random.randint(0, 32 - width), height, width

    def __call__(self, images):
        parts = []
        for top, left, height, width in self.windows():
            part = images[:, :, top:top + height, left:left + width]
            parts.append(part if height == width == 32 else F.interpolate(part, size=32, mode="bilinear", antialias=True))
        with autocast():
            embedded = self.tower.embed_images(torch.cat(parts))
        return scores(embedded, self.texts, self.anchors).unflatten(0, (self.crops, -1)).mean(0)


def reframe(images, labels, objects, share=0.5):
    """Random windows of 50-100 % of each side, as the energy node cuts them, on a share of the images.

    An object stays a positive if half of it is seen, is unknown (-1) from a fifth to a half, else it is gone. Scenes
    whose layout is not known (objects -1) keep their frame.
    """
    n, device = len(images), images.device
    moved = (torch.rand(n, device=device) < share) & (objects[:, 0] >= 0)
    side = torch.where(moved[:, None], 0.5 + 0.5 * torch.rand(n, 2, device=device), 1.0)  # width, height
    middle = (1 - side) * (2 * torch.rand(n, 2, device=device) - 1)  # of the window, in [-1, 1]
    zero = torch.zeros(n, device=device)
    theta = torch.stack([torch.stack([side[:, 0], zero, middle[:, 0]], 1), torch.stack([zero, side[:, 1], middle[:, 1]], 1)], 1)
    images = F.grid_sample(images, F.affine_grid(theta, images.shape, align_corners=False), align_corners=False, padding_mode="border")
    two, labels = objects[:, 1] >= 0, F.pad(labels, (0, 1))
    for k in range(2):
        here = moved & two if k else moved
        centre = torch.stack([torch.where(two, k - 0.5, 0.0), zero], 1)
        half = torch.where(two, 0.46, 0.78)[:, None]
        overlap = torch.minimum(middle + side, centre + half) - torch.maximum(middle - side, centre - half)
        seen = (overlap.clamp(min=0) / (2 * half)).prod(1)
        value = torch.where(seen >= 0.5, 1.0, torch.where(seen < 0.2, 0.0, -1.0))
        column = torch.where(here, objects[:, k], len(OBJECTS))
        labels.scatter_(1, column[:, None], value[:, None])
    return images, labels[:, :-1]


def attack(loss_of, images, strongest, steps):
    """Projected gradient ascent on the loss within an L2 ball of random size (root mean square per pixel value)."""
    radius = torch.rand(len(images), 1, 1, 1, device=images.device) * strongest
    delta = torch.randn_like(images) * radius * 0.5
    for _ in range(steps):
        delta.requires_grad_(True)
        gradient, = torch.autograd.grad(loss_of(images + delta), delta)
        gradient = gradient / (gradient.square().mean((1, 2, 3), keepdim=True).sqrt() + 1e-12)
        delta = delta.detach() + gradient * radius * 1.5 / steps
        size = delta.square().mean((1, 2, 3), keepdim=True).sqrt()
        delta = delta * (radius / (size + 1e-12)).clamp(max=1)
    return (images + delta).detach()


def labels_of(objects):
    """Objects [n, 2] (numpy or tensor) to float 0/1 [n, 60] on the device."""
    return label_matrix(np.asarray(objects)).to(DEVICE)


def draw(batch, renderer, pool, share, rng):
    """A batch of augmented scenes and of lightly augmented pool pictures, in random order."""
    taken = int(batch * share) if pool else 0
    parts = []
    for free, count in ((False, (batch - taken) // 2), (True, batch - taken - (batch - taken) // 2)):
        objects, backgrounds = draw_contents(count, free, rng)
        images, labels = renderer.draw(objects, backgrounds, 3, free), labels_of(objects)
        known = torch.as_tensor(np.full_like(objects, -1) if free else objects, device=DEVICE)
        parts.append((images, labels, known))
    images, truth = reframe(*(torch.cat(p) for p in zip(*parts)))
    images = augment.warp(images, turn=0.15, zoom=0.15, shift=0.05)
    images = augment.noise(augment.colour(augment.blur(images, 2.0, 0.4)), 0.12)
    if taken:
        extra, known = pool.draw(taken)
        extra = augment.noise(augment.warp(extra, turn=0.05, zoom=0.12, shift=0.05), 0.15)
        images, truth = torch.cat([images, extra]), torch.cat([truth, known])
    order = torch.randperm(batch, device=DEVICE)
    return images[order].clamp(-1.3, 1.3), truth[order]


def score_loss(logits, truth):
    """Sigmoid loss plus a pull of every logit to -LEVEL or LEVEL; labels of -1 count for nothing.

    The gate divides a score by its spread over harmless pictures. The sigmoid loss alone leaves that spread wide,
    because it does not mind how far below zero a negative lies; the pull narrows it.
    """
    known, truth = (truth >= 0).float(), truth.clamp(min=0)
    sigmoid = F.binary_cross_entropy_with_logits(logits, truth, weight=known, reduction="sum")
    distance = (logits - LEVEL * (2 * truth - 1)).square() * known * (1 + (POSITIVE_WEIGHT - 1) * truth)
    return sigmoid + PULL * distance.sum()


def step_loss(tower, ids, images, truth, cut, strongest, attack_steps):
    """The loss of one batch, the first `cut` images of it attacked."""
    with autocast():
        texts = tower.embed_texts(ids)

        def loss_of(x, y, embedded):
            score = scores(tower.embed_images(x), embedded[:len(OBJECTS)], embedded[len(OBJECTS):])
            return score_loss(tower.logits(score), y)

        if cut:
            tower.model.requires_grad_(False)
            changed = attack(lambda x: loss_of(x, truth[:cut], texts.detach()), images[:cut], strongest, attack_steps)
            tower.model.requires_grad_(True)
            images = torch.cat([changed, images[cut:]])
        return loss_of(images, truth, texts) / len(images)


def train(args, name):
    """One process: trains the energy `name` on scenes and on what the players have drawn so far."""
    from steering import Pool  # which scores with what is trained here

    torch.set_num_threads(1)
    tower, renderer, pool = TOWERS[name](args.work), Renderer(args.work), Pool(args.work)
    training = Training(args.work / f"{name}.pt", tower.modules, args.minutes, lr=args.lr, warmup=args.warmup, ema=0.996,
                        weight_decay=0.05, betas=(0.9, 0.98), save_every=args.save_every)
    vocabulary = Phrases(tower)
    for seed in training.steps():
        rng, spent = np.random.default_rng(seed), training.seconds / 60
        if spent >= args.pool_from and training.step % args.refresh_every == 0:
            pool.refresh()
        images, truth = draw(args.batch, renderer, pool if pool.filled else None, args.share, rng)
        cut = int(args.batch * args.attacked) if spent >= args.attack_from else 0
        loss = step_loss(tower, vocabulary.draw(rng), images, truth, cut, args.strongest, args.attack_steps)
        training.update(loss, scale=tower.model.logit_scale.detach().exp(), pool=torch.tensor(float(pool.filled)))


def train_all(args):
    """Trains the energies of `--only` while `--players` processes draw; ends with the first failure of any."""
    from steering import play

    spawn = multiprocessing.get_context("spawn")
    trainers = [spawn.Process(target=train, args=(args, name), name=name) for name in args.only.split(",")]
    players = [spawn.Process(target=play, args=(args, k), name=f"player {k}", daemon=True) for k in range(args.players)]
    for process in trainers + players:
        process.start()
    try:
        while any(p.is_alive() for p in trainers):
            multiprocessing.connection.wait([p.sentinel for p in trainers + players if p.is_alive()])
            failed = [p.name for p in trainers + players if p.exitcode]
            if failed:
                raise SystemExit(f"{', '.join(failed)} failed; the same command goes on from the last checkpoint")
    finally:
        for process in trainers + players:
            process.terminate()


@torch.no_grad()
def concept_auroc(scorer, images, truth):
    """AUROC per target, scored on the whole picture; images in [-1, 1], truth bool [n, 60]."""
    score = torch.cat([scores(scorer.tower.embed_images(x.to(DEVICE)), scorer.texts, scorer.anchors) for x in images.split(500)])
    score, truth = score.cpu().numpy(), truth[:, [OBJECTS.index(t) for t in TARGETS]].numpy()
    return dict(zip(TARGETS, (auroc(score[:, k], truth[:, k]) for k in range(len(TARGETS)))))


def report(work, name):
    split = scenes(work, "heldout")
    scorer = Scorer(TOWERS[name](work).load(work), crops=1)
    return concept_auroc(scorer, as_tensor(split["pixels"]), label_matrix(split["objects"]).bool())


if __name__ == "__main__":
    train_all(arguments(
        __doc__, minutes=60.0, only="clip,siglip", batch=128, lr=1e-3, warmup=300, share=0.5, attacked=0.25, strongest=0.06, attack_steps=1,
        attack_from=5.0, pool_from=10.0, steered_from=20.0, players=2, round=64, refresh_every=40, save_every=120))
