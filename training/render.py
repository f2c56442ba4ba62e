"""The scenes of the world: what they show, chosen on the host, and how they look, drawn on the device.

Nothing is stored but the sprites: a seed is a scene, so training never sees the same picture twice and a held-out set
is a seed that no training uses.
"""
import random
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

import backgrounds
from common import DEVICE
from words import OBJECTS

SETS = ("noto", "twemoji", "fluent")  # the generators see the first two
GENERATOR_SETS, ALL_SETS = 2, 3
SIDE, SMALLEST, LARGEST, MOST = 64, 16, 60, 3
HELDOUT_SEED = 2**40  # training seeds are below it
LAYOUTS = {"one": 0.35, "one small": 0.15, "beside": 0.25, "above": 0.08, "large and small": 0.17}


@dataclass(frozen=True)
class Item:
    """One object of a scene: its index, its emoji set, and the square that it fills."""
    object: int
    set: int
    size: int
    x: int
    y: int


@dataclass(frozen=True)
class Scene:
    items: tuple
    background: int
    layout: str


def square(size, x, y, rng, across, along):
    """A square about x, y, moved by at most `across` and `along`, that stays inside the picture."""
    def corner(middle, most):
        return min(max(round(middle - size / 2 + rng.uniform(-most, most)), 0), SIDE - size)
    return size, corner(x, across), corner(y, along)


def squares(layout, rng):
    """The squares of a layout's objects: what the generators learn and the promises are about."""
    if layout == "one":
        return [square(rng.randint(40, 58), 32, 32, rng, 10, 10)]
    if layout == "one small":
        return [square(rng.randint(22, 40), 32, 32, rng, 20, 20)]
    if layout == "beside":
        return [square(rng.randint(26, 32), x, 32, rng, 2, 12) for x in (16, 48)]
    if layout == "above":
        return [square(rng.randint(26, 32), 32, y, rng, 12, 2) for y in (16, 48)]
    small, left, top = rng.randint(18, 24), rng.random() < 0.5, rng.random() < 0.5
    large = rng.randint(38, 44)
    pair = [square(large, 64 - large / 2 if left else large / 2, 32, rng, 0, 8),
            square(small, small / 2 if left else 64 - small / 2, 14 if top else 50, rng, 1, 4)]
    return pair if rng.random() < 0.5 else pair[::-1]


def hidden(lower, upper):
    """The share of a square that a square drawn later covers."""
    (size, x, y), (other, left, top) = lower, upper
    across, along = (max(0, min(p + size, q + other) - max(p, q)) for p, q in ((x, left), (y, top)))
    return across * along / size ** 2


def free_squares(count, rng):
    """Any sizes anywhere, a little beyond the edge too; of none is more than a third covered."""
    largest = {1: LARGEST, 2: 40}.get(count, 32)
    while True:
        sizes = [rng.randint(SMALLEST, largest) for _ in range(count)]
        placed = [(size, *(rng.randint(-size // 8, SIDE - size + size // 8) for _ in range(2))) for size in sizes]
        if all(hidden(a, b) < 1 / 3 for k, a in enumerate(placed) for b in placed[k + 1:]):
            return placed


def draw_scene(rng, sets=GENERATOR_SETS, free=False):
    """One scene. Free ones have none to three objects of any size, for models that must know objects, not layouts."""
    if free:
        layout = "free"
        placed = free_squares(rng.choices(range(MOST + 1), (0.06, 0.4, 0.4, 0.14))[0], rng)
    else:
        layout, = rng.choices(list(LAYOUTS), LAYOUTS.values())
        placed = squares(layout, rng)
    objects = rng.sample(range(len(OBJECTS)), len(placed))
    items = tuple(Item(o, rng.randrange(sets), *place) for o, place in zip(objects, placed))
    return Scene(items, backgrounds.pick(rng), layout)


def draw_scenes(count, seed, sets=GENERATOR_SETS, free=False):
    rng = random.Random(seed)
    return [draw_scene(rng, sets, free) for _ in range(count)]


class Renderer:
    """All sprites in all sizes and all backgrounds, on the device."""

    def __init__(self, work):
        sprites = np.load(work / "sprites.npz")["sprites"]  # [sets, objects, 96, 96, 4]
        sheet = np.zeros((LARGEST - SMALLEST + 1, len(SETS) * len(OBJECTS), SIDE, SIDE, 4), np.uint8)
        for k, sprite in enumerate(sprites.reshape(-1, *sprites.shape[2:])):
            image = Image.fromarray(sprite, "RGBA")
            for size in range(SMALLEST, LARGEST + 1):
                sheet[size - SMALLEST, k, :size, :size] = np.asarray(image.resize((size, size), Image.LANCZOS))
        self.sheet = torch.from_numpy(sheet).permute(0, 1, 4, 2, 3).flatten(-2).contiguous().to(DEVICE)
        self.backgrounds = torch.from_numpy(backgrounds.bank()[0]).permute(0, 3, 1, 2).contiguous().to(DEVICE)

    def paste(self, canvas, place):
        """Draws on each canvas the sprite of `place` [n, 4] (sprite, size, x, y; sprite -1: none); also its opacity."""
        sprite, size, x, y = place.unbind(1)
        row = torch.arange(SIDE, device=DEVICE)
        dy, dx = row[None, :, None] - y[:, None, None], row[None, None, :] - x[:, None, None]
        limit = size[:, None, None]
        inside = (dy >= 0) & (dy < limit) & (dx >= 0) & (dx < limit) & (sprite >= 0)[:, None, None]
        pixel = (dy.clamp(0, SIDE - 1) * SIDE + dx.clamp(0, SIDE - 1)).flatten(1)
        tile = self.sheet[size - SMALLEST, sprite.clamp(min=0)].gather(2, pixel[:, None].expand(-1, 4, -1))
        tile = tile.view(len(size), 4, SIDE, SIDE).float()
        opacity = tile[:, 3:] / 255 * inside[:, None]
        return canvas + (tile[:, :3] - canvas) * opacity, opacity

    def draw_with_mask(self, scenes):
        """Pictures [n, 3, 64, 64] in [-1, 1], and how opaque the objects are there [n, 1, 64, 64]."""
        places = np.full((MOST, len(scenes), 4), (-1, SMALLEST, 0, 0))
        for i, scene in enumerate(scenes):
            for k, item in enumerate(scene.items):
                places[k, i] = item.set * len(OBJECTS) + item.object, item.size, item.x, item.y
        places = torch.from_numpy(places).to(DEVICE)
        canvas = self.backgrounds[torch.tensor([s.background for s in scenes], device=DEVICE)].float()
        mask = torch.zeros(len(scenes), 1, SIDE, SIDE, device=DEVICE)
        for place in places[:max([len(s.items) for s in scenes], default=0)]:
            canvas, opacity = self.paste(canvas, place)
            mask = torch.maximum(mask, opacity)
        return canvas.round() / 127.5 - 1, mask

    def draw(self, scenes):
        return self.draw_with_mask(scenes)[0]


def framed(images, scenes, rng, share=0.5):
    """Random windows of 50-100 % of each side on a share of the images, as energies are asked, and the labels after it.

    An object stays a positive if half of its square is seen, is unknown (-1) from a fifth to a half, else it is gone.
    """
    labels, theta = np.zeros((len(scenes), len(OBJECTS)), np.float32), np.zeros((len(scenes), 2, 3), np.float32)
    for i, scene in enumerate(scenes):
        sides = [rng.uniform(0.5, 1) if moved else 1 for moved in 2 * [rng.random() < share]]
        low = [rng.uniform(0, 1 - side) for side in sides]
        for k in range(2):
            theta[i, k, k], theta[i, k, 2] = sides[k], 2 * low[k] + sides[k] - 1
        for item in scene.items:
            seen = 1
            for corner, start, side in zip((item.x, item.y), low, sides):
                end = min(corner + item.size, (start + side) * SIDE)
                seen *= max(0, end - max(corner, start * SIDE)) / item.size
            labels[i, item.object] = 1 if seen >= 0.5 else 0 if seen < 0.2 else -1
    grid = F.affine_grid(torch.from_numpy(theta).to(DEVICE), images.shape, align_corners=False)
    images = F.grid_sample(images, grid, align_corners=False, padding_mode="border")
    return images, torch.from_numpy(labels).to(DEVICE)


def labels_of(scenes):
    """0/1 [n, 60]: the objects that each scene shows."""
    labels = torch.zeros(len(scenes), len(OBJECTS))
    for row, scene in zip(labels, scenes):
        row[[item.object for item in scene.items]] = 1
    return labels.to(DEVICE)
