"""Trains the contrastive energy: a CLIPModel whose score against neutral anchors tells whether an object is there.

The loss is on the score that steering uses, so nothing is left to luck: for each object one phrase is drawn, the
score is its cosine less the log-sum-exp of the anchors' cosines (K = 100), and every object of a scene is a positive.
Part of each batch is attacked by the model's own gradient: a robust model's gradient removes objects, not its score.
"""
import math

import numpy as np
import torch
import torch.nn.functional as F
from transformers import CLIPConfig, CLIPModel

import augment
import tokenizer as bpe
from common import Training, arguments, auroc, load_average
from data import as_tensor, label_matrix, scenes
from words import ANCHORS, OBJECTS, SYNONYMS, TARGETS, article, phrases

K = 100.0
LEVEL, PULL, POSITIVE_WEIGHT = 6.0, 0.02, 8.0
MEAN, STD = [0.70, 0.69, 0.68], [0.28, 0.28, 0.29]
TEMPLATES = ["{}", "{}", "a picture of {}", "a photo of {}", "a drawing of {}", "an image with {}"]


def build(vocabulary=bpe.VOCABULARY):
    torch.manual_seed(11)
    marks = dict(bos_token_id=vocabulary - 2, eos_token_id=vocabulary - 1, pad_token_id=vocabulary - 1)
    text = dict(vocab_size=vocabulary, hidden_size=128, intermediate_size=384, num_hidden_layers=2,
                num_attention_heads=4, hidden_act="gelu", max_position_embeddings=bpe.LENGTH, projection_dim=128, **marks)
    vision = dict(hidden_size=128, intermediate_size=384, num_hidden_layers=5, num_attention_heads=4, image_size=32, hidden_act="gelu",
                  patch_size=4, projection_dim=128)
    config = CLIPConfig(text_config=text, vision_config=vision, projection_dim=128)
    model = CLIPModel._from_config(config, attn_implementation="eager")  # the fused backward is slow on CPUs
    model.logit_scale.data.fill_(math.log(15))
    return model


def load(work):
    model = build()
    load_average(work / "clip.pt", clip=model, bias=Bias())
    return model


class Bias(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.value = torch.nn.Parameter(torch.tensor(-4.0))


def embed_images(model, images):
    """Unit embeddings of images in [-1, 1]."""
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (MEAN, STD))
    states = model.vision_model(pixel_values=((images + 1) / 2 - mean) / std).pooler_output
    return F.normalize(model.visual_projection(states).float(), dim=-1)


def embed_texts(model, ids):
    return F.normalize(model.text_projection(model.text_model(input_ids=ids).pooler_output).float(), dim=-1)


def scores(images, texts, anchors):
    """score_k of method.md: images [n, d]; texts a list of [phrases, d] per concept or one [concepts, d]; [n, concepts]."""
    neutral = (K * images @ anchors.T).logsumexp(-1, keepdim=True)
    if torch.is_tensor(texts):
        return images @ texts.T - neutral / K
    cosines = [(K * images @ t.T).logsumexp(-1) for t in texts]
    return (torch.stack(cosines, 1) - neutral) / K


class Phrases:
    """Token ids of every way to name each object; one is drawn per object and step."""

    def __init__(self, tokens):
        self.ids = []
        for obj in OBJECTS:
            nouns = [article(n) for n in [obj, obj, obj, *SYNONYMS.get(obj, [])]]
            self.ids.append(bpe.encode(tokens, [obj, *(t.format(n) for n in nouns for t in TEMPLATES)]))
        self.anchors = bpe.encode(tokens, ANCHORS)

    def draw(self):
        return torch.stack([ids[np.random.randint(len(ids))] for ids in self.ids])


def target_texts(model, tokens):
    """Embeddings as the energy node makes them: a list with all phrases of each target, and the anchors."""
    with torch.no_grad():
        targets = [embed_texts(model, bpe.encode(tokens, phrases(t))) for t in TARGETS]
        return targets, embed_texts(model, bpe.encode(tokens, ANCHORS))


def reframe(images, labels, objects, share=0.5):
    """Random windows of 50-100 % of each side, as the energy node cuts them, on a share of the images.

    An object stays a positive if half of it is seen, is unknown (-1) from a fifth to a half, else it is gone. Scenes
    whose layout is not known (objects -1) keep their frame.
    """
    n = len(images)
    moved = (torch.rand(n) < share) & torch.from_numpy(objects[:, 0] >= 0)
    side = torch.where(moved[:, None], 0.5 + 0.5 * torch.rand(n, 2), 1.0)  # width, height
    middle = (1 - side) * (2 * torch.rand(n, 2) - 1)  # of the window, in [-1, 1]
    zero = torch.zeros(n)
    theta = torch.stack([torch.stack([side[:, 0], zero, middle[:, 0]], 1), torch.stack([zero, side[:, 1], middle[:, 1]], 1)], 1)
    images = F.grid_sample(images, F.affine_grid(theta, images.shape, align_corners=False), align_corners=False, padding_mode="border")
    two, labels = torch.from_numpy(objects[:, 1] >= 0), labels.clone()
    for k in range(2):
        here = moved & (two if k else True)
        centre = torch.stack([torch.where(two, k - 0.5, 0.0), zero], 1)
        half = torch.where(two, 0.46, 0.78)[:, None]
        overlap = torch.minimum(middle + side, centre + half) - torch.maximum(middle - side, centre - half)
        seen = (overlap.clamp(min=0) / (2 * half)).prod(1)
        value = torch.where(seen >= 0.5, 1.0, torch.where(seen < 0.2, 0.0, -1.0))
        rows = torch.nonzero(here).flatten()
        labels[rows, torch.from_numpy(objects[:, k])[rows]] = value[rows]
    return images, labels


def training_set(work):
    fixed, free = scenes(work, "clip"), scenes(work, "clip-free")
    pixels = np.concatenate([fixed["pixels"], free["pixels"]])
    objects = np.concatenate([fixed["objects"], np.full_like(free["objects"], -1)])
    labels = label_matrix(np.concatenate([fixed["objects"], free["objects"]]))
    return pixels, objects, labels


def attack(loss_of, images, strongest, steps):
    """Projected gradient ascent on the loss within an L2 ball of random size (root mean square per pixel value)."""
    radius = torch.rand(len(images), 1, 1, 1) * strongest
    delta = torch.randn_like(images) * radius * 0.5
    for _ in range(steps):
        delta.requires_grad_(True)
        gradient, = torch.autograd.grad(loss_of(images + delta), delta)
        gradient = gradient / (gradient.square().mean((1, 2, 3), keepdim=True).sqrt() + 1e-12)
        delta = delta.detach() + gradient * radius * 1.5 / steps
        size = delta.square().mean((1, 2, 3), keepdim=True).sqrt()
        delta = delta * (radius / (size + 1e-12)).clamp(max=1)
    return (images + delta).detach()


def pools(work):
    """What steering.py collected: pixels and labels (1, 0, or -1 for unknown); None before it ran."""
    parts = [torch.load(path, weights_only=True) for path in sorted(work.glob("pool-*.pt"))]
    if not parts:
        return None
    return torch.cat([p["pixels"] for p in parts]).numpy(), torch.cat([p["labels"] for p in parts]).float()


def draw(batch, scene_set, pool, share):
    """A batch of augmented scenes and of lightly augmented pool pictures, in random order."""
    pixels, objects, labels = scene_set
    taken = int(batch * share) if pool else 0
    index = np.random.randint(0, len(pixels), batch - taken)
    images, truth = reframe(as_tensor(pixels[index]), labels[index], objects[index])
    images = augment.warp(images, turn=0.15, zoom=0.15, shift=0.05)
    images = augment.noise(augment.colour(augment.blur(images, 2.0, 0.4)), 0.12)
    if taken:
        index = np.random.randint(0, len(pool[0]), taken)
        extra = augment.warp(as_tensor(pool[0][index]), turn=0.05, zoom=0.12, shift=0.05)
        images, truth = torch.cat([images, augment.noise(extra, 0.15)]), torch.cat([truth, pool[1][index]])
    order = torch.randperm(batch)
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


def train(work, minutes, batch, attacked, strongest, share, attack_steps, attack_from):
    model, bias, vocabulary = build(), Bias(), Phrases(bpe.load(work))
    scene_set, pool = training_set(work), pools(work)
    training = Training(work / "clip.pt", {"clip": model, "bias": bias}, minutes, lr=1e-3, ema=0.996,
                        weight_decay=0.05, betas=(0.9, 0.98))
    cut = int(batch * attacked)
    for _ in training.steps():
        images, truth = draw(batch, scene_set, pool, share)
        with torch.autocast("cpu", torch.bfloat16):
            text = embed_texts(model, torch.cat([vocabulary.draw(), vocabulary.anchors]))

            def loss_of(x, y, texts):
                score = scores(embed_images(model, x), texts[:len(OBJECTS)], texts[len(OBJECTS):])
                return score_loss(model.logit_scale.exp() * score + bias.value, y)

            if cut and training.step >= attack_from:
                model.requires_grad_(False)
                images[:cut] = attack(lambda x: loss_of(x, truth[:cut], text.detach()), images[:cut], strongest, attack_steps)
                model.requires_grad_(True)
            loss = loss_of(images, truth, text) / batch
        training.update(loss, scale=model.logit_scale.exp())


def concept_auroc(work, images, truth):
    """AUROC per target, scored as the energy node scores; images in [-1, 1], truth bool [n, 60]."""
    model, tokens = load(work), bpe.load(work)
    targets, anchors = target_texts(model, tokens)
    with torch.no_grad():
        score = torch.cat([scores(embed_images(model, x), targets, anchors) for x in images.split(500)]).numpy()
    truth = truth[:, [OBJECTS.index(t) for t in TARGETS]].numpy()
    return [auroc(score[:, k], truth[:, k]) for k in range(len(TARGETS))]


def report(work):
    split = scenes(work, "heldout")
    areas = concept_auroc(work, as_tensor(split["pixels"]), label_matrix(split["objects"]).bool())
    return dict(zip(TARGETS, areas))


if __name__ == "__main__":
    args = arguments(__doc__, minutes=30.0, batch=128, attacked=0.34, strongest=0.06, share=0.4, attack_steps=1, attack_from=2500)
    train(args.work, args.minutes, args.batch, args.attacked, args.strongest, args.share,
          args.attack_steps, args.attack_from)
    areas = report(args.work)
    print("AUROC mean %.4f worst %.4f (%s)" % (np.mean(list(areas.values())), min(areas.values()), min(areas, key=areas.get)))
