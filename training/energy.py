"""Trains a contrastive energy, CLIP or SigLIP, whose score against neutral anchors tells whether an object is there.

It stands in for a frozen foundation model: it sees scenes of the three emoji sets with the usual augmentations, and
nothing that a generator made or a judge said. The loss is on the score that steering uses: for each object one phrase
is drawn, the score is its cosine less the log-sum-exp of the anchors' cosines (K = 100), and every object of a scene
is a positive.
"""
import random

import numpy as np
import torch
import torch.nn.functional as F

import augment
import clip
import siglip
from common import DEVICE, Training, arguments, autocast, auroc
from render import ALL_SETS, HELDOUT_SEED, Renderer, draw_scenes, framed, labels_of
from words import ANCHORS, OBJECTS, SYNONYMS, TARGETS, article, phrases

K = 100.0
FIRST_SEED = {"clip": 2**33, "siglip": 2**34}  # each sees scenes of its own
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
    """Scores of the twenty targets on whole pictures, [n, 20]."""

    @torch.no_grad()
    def __init__(self, tower):
        self.tower = tower
        self.texts = [tower.embed_texts(tower.encode(phrases(t)).to(DEVICE)) for t in TARGETS]
        self.anchors = tower.embed_texts(tower.encode(ANCHORS).to(DEVICE))

    def __call__(self, images):
        with autocast():
            embedded = self.tower.embed_images(images)
        return scores(embedded, self.texts, self.anchors)


def draw(batch, renderer, seed):
    """A batch of scenes of both layouts and all sets, cropped and augmented, and the labels of what is seen."""
    scenes = draw_scenes(batch // 2, 2 * seed, ALL_SETS) + draw_scenes(batch - batch // 2, 2 * seed + 1, ALL_SETS, free=True)
    images, truth = framed(renderer.draw(scenes), scenes, random.Random(seed))
    return augment.usual(images), truth


def score_loss(logits, truth):
    """Sigmoid loss plus a pull of every logit to -LEVEL or LEVEL; labels of -1 count for nothing.

    The gate divides a score by its spread over harmless pictures. The sigmoid loss alone leaves that spread wide,
    because it does not mind how far below zero a negative lies; the pull narrows it.
    """
    known, truth = (truth >= 0).float(), truth.clamp(min=0)
    sigmoid = F.binary_cross_entropy_with_logits(logits, truth, weight=known, reduction="sum")
    distance = (logits - LEVEL * (2 * truth - 1)).square() * known * (1 + (POSITIVE_WEIGHT - 1) * truth)
    return sigmoid + PULL * distance.sum()


def train(work, name, minutes, batch, lr):
    tower, renderer = TOWERS[name](work), Renderer(work)
    training = Training(work / f"{name}.pt", tower.modules, minutes, lr=lr, warmup=300, ema=0.998, weight_decay=0.05, betas=(0.9, 0.98))
    vocabulary = Phrases(tower)
    for seed in training.steps():
        images, truth = draw(batch, renderer, FIRST_SEED[name] + seed)
        with autocast():
            texts = tower.embed_texts(vocabulary.draw(np.random.default_rng(seed)))
            score = scores(tower.embed_images(images), texts[:len(OBJECTS)], texts[len(OBJECTS):])
            loss = score_loss(tower.logits(score), truth) / batch
        training.update(loss, scale=tower.model.logit_scale.detach().exp())


@torch.no_grad()
def report(work, name, count=2000):
    """AUROC per target on held-out scenes of the generators' layouts, all emoji sets."""
    scorer, renderer = Scorer(TOWERS[name](work).load(work)), Renderer(work)
    scenes = draw_scenes(count, HELDOUT_SEED, ALL_SETS)
    score = torch.cat([scorer(renderer.draw(scenes[i:i + 100])) for i in range(0, count, 100)]).cpu().numpy()
    truth = labels_of(scenes)[:, [OBJECTS.index(t) for t in TARGETS]].bool().cpu().numpy()
    return {t: auroc(score[:, k], truth[:, k]) for k, t in enumerate(TARGETS)}


if __name__ == "__main__":
    args = arguments(__doc__, name="clip", minutes=120.0, batch=128, lr=1e-3)
    train(args.work, args.name, args.minutes, args.batch, args.lr)
    areas = report(args.work, args.name)
    print(f"AUROC mean {np.mean(list(areas.values())):.4f}, worst {min(areas.items(), key=lambda item: item[1])}")
