"""Renders scenes on the device, as `data.py` draws them, so that training never sees the same picture twice."""
import numpy as np
import torch
from PIL import Image

from common import DEVICE
from words import BACKGROUNDS, OBJECTS

SETS = ("noto", "twemoji", "fluent")
CANVAS, SMALLEST, LARGEST = 64, 24, 58


def whole(low, high):
    """Random whole numbers from `low` to `high` inclusive; tensors or numbers, of one shape [n]."""
    return (low + torch.rand(len(low), device=low.device) * (high - low + 1)).floor().long()


class Renderer:
    """All sprites in all sizes on the device; places them on 64 px canvases and halves those."""

    def __init__(self, work):
        sprites = np.load(work / "sprites.npz")["sprites"]  # [sets, objects, 96, 96, 4]
        sheet = np.zeros((LARGEST - SMALLEST + 1, len(SETS) * len(OBJECTS), CANVAS, CANVAS, 4), np.uint8)
        for k, sprite in enumerate(sprites.reshape(-1, *sprites.shape[2:])):
            image = Image.fromarray(sprite, "RGBA")
            for size in range(SMALLEST, LARGEST + 1):
                sheet[size - SMALLEST, k, :size, :size] = np.asarray(image.resize((size, size), Image.LANCZOS))
        self.sheet = torch.from_numpy(sheet).permute(0, 1, 4, 2, 3).flatten(-2).contiguous().to(DEVICE)
        self.colours = torch.tensor(list(BACKGROUNDS.values()), dtype=torch.float32, device=DEVICE)

    def paste(self, canvas, size, x, y, sprite, there):
        """Draws sprite [n] of a size [n] with its corner at x, y [n] where `there` [n]."""
        row = torch.arange(CANVAS, device=DEVICE)
        dy, dx = row[None, :, None] - y[:, None, None], row[None, None, :] - x[:, None, None]
        limit = size[:, None, None]
        inside = (dy >= 0) & (dy < limit) & (dx >= 0) & (dx < limit) & there[:, None, None]
        place = (dy.clamp(0, CANVAS - 1) * CANVAS + dx.clamp(0, CANVAS - 1)).flatten(1)
        tile = self.sheet[size - SMALLEST, sprite].gather(2, place[:, None].expand(-1, 4, -1))
        tile = tile.view(len(size), 4, CANVAS, CANVAS).float()
        opacity = tile[:, 3:] / 255 * inside[:, None]
        return canvas + (tile[:, :3] - canvas) * opacity

    def draw(self, objects, backgrounds, sets, free):
        """Scenes [n, 3, 32, 32] in [-1, 1] of objects [n, 2] (-1: none) on backgrounds [n]."""
        objects, backgrounds = (torch.as_tensor(v, device=DEVICE) for v in (objects, backgrounds))
        n, colour = len(objects), self.colours[backgrounds]
        if free:
            colour = (colour + whole(torch.full_like(colour.flatten(), -25), 25).view_as(colour)).clamp(0, 255)
        canvas = colour[:, :, None, None].expand(n, 3, CANVAS, CANVAS)
        two, zero = objects[:, 1] >= 0, torch.zeros(n, dtype=torch.long, device=DEVICE)
        for k in range(2):
            if free:
                size = whole(zero + SMALLEST, torch.where(two, 34, LARGEST))
                x = torch.where(two, 32 * k + whole(zero - 6, 38 - size), whole(zero - 4, 68 - size))
                y = whole(zero - 4, 68 - size)
            else:
                size = torch.where(two, whole(zero + 28, 31), whole(zero + 46, 54))
                x = torch.where(two, 32 * k + (32 - size) // 2, 32 - size // 2 + whole(zero - 3, 3))
                y = 32 - size // 2 + torch.where(two, whole(zero - 6, 6), whole(zero - 3, 3))
            chosen = (torch.rand(n, device=DEVICE) * sets).long() * len(OBJECTS) + objects[:, k].clamp(min=0)
            canvas = self.paste(canvas, size, x, y, chosen, objects[:, k] >= 0)
        halved = canvas.view(n, 3, 32, 2, 32, 2).mean((3, 5)).round()
        return halved / 127.5 - 1


def draw_contents(n, free, rng):
    """What n scenes show: objects [n, 2] and backgrounds [n], as `data.scene` chooses them; `rng` is numpy's."""
    first = rng.integers(0, len(OBJECTS), n)
    second = (first + rng.integers(1, len(OBJECTS), n)) % len(OBJECTS)
    objects = np.stack([first, np.where(rng.random(n) < 0.5, -1, second)], 1)
    if free:
        objects[rng.random(n) < 0.04] = -1
    return objects, rng.integers(0, len(BACKGROUNDS), n)
