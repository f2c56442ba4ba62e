"""Fetches the three emoji sets, renders the scenes and trains the tokenizer."""
import io
import json
import random
import shutil
import subprocess
import tarfile
from functools import cache

import numpy as np
from PIL import Image

from common import arguments
from words import BACKGROUNDS, OBJECTS

PACKAGES = {
    "noto": "@iconify-json/noto@1.2.9",
    "twemoji": "@iconify-json/twemoji@1.2.5",
    "fluent": "@iconify-json/fluent-emoji-flat@1.2.6",
}
# name: (emoji sets, scenes, seed, free layout). "free" scenes vary size, place and colours; the generators never see them.
SPLITS = {
    "generator": (("noto", "twemoji"), 40000, 0, False),
    "generator-heldout": (("noto", "twemoji"), 2000, 1, False),
    "judge": (("noto", "twemoji", "fluent"), 24000, 2, False),
    "judge-free": (("noto", "twemoji", "fluent"), 24000, 3, True),
    "clip": (("noto", "twemoji", "fluent"), 24000, 4, False),
    "clip-free": (("noto", "twemoji", "fluent"), 24000, 5, True),
    "heldout": (("noto", "twemoji", "fluent"), 4000, 6, False),
    "tuning": (("noto", "twemoji", "fluent"), 4000, 7, False),
}


def fetch(work):
    """Downloads and unpacks the packages that are not there yet."""
    for name, package in PACKAGES.items():
        folder = work / "emoji" / name
        if (folder / "package" / "icons.json").exists():
            continue
        folder.mkdir(parents=True, exist_ok=True)
        archive = subprocess.run(["npm", "pack", package, "--silent"], cwd=folder, check=True, capture_output=True, text=True)
        with tarfile.open(folder / archive.stdout.strip()) as tar:
            tar.extractall(folder, filter="data")


@cache
def icons(work, name):
    return json.loads((work / "emoji" / name / "package" / "icons.json").read_text())


def svg(data, key):
    """The SVG document of an emoji, found by name, with or without `-face`, or through an alias."""
    for name in (key, key.replace("-face", ""), key + "-face"):
        name = name if name in data["icons"] else data.get("aliases", {}).get(name, {}).get("parent")
        if name:
            icon = data["icons"][name]
            w, h = (icon.get(k, data.get(k, 16)) for k in ("width", "height"))
            left, top = icon.get("left", 0), icon.get("top", 0)
            return (f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" width="{w}" '
                    f'height="{h}" viewBox="{left} {top} {w} {h}">{icon["body"]}</svg>')
    raise KeyError(key)


@cache
def sprite(work, name, obj):
    import resvg_py  # which the machines that train on carried sprites need not have

    png = resvg_py.svg_to_bytes(svg_string=svg(icons(work, name), obj.replace(" ", "-")), width=96, height=96)
    return Image.open(io.BytesIO(bytes(png))).convert("RGBA")


def sprites(work):
    """Writes every sprite as an array [sets, objects, 96, 96, 4]: what `render.py` needs on another machine."""
    path = work / "sprites.npz"
    if not path.exists():
        square = (96, 96)
        stacked = np.stack([[np.asarray(sprite(work, name, obj).resize(square)) for obj in OBJECTS] for name in PACKAGES])
        np.savez_compressed(path, sprites=stacked)


def placement(count, index, free, rng):
    """Size and corner of one sprite on the 64 px canvas that is halved at the end."""
    if free:
        size = rng.randint(24, 58 if count == 1 else 34)
        x = rng.randint(-4, 68 - size) if count == 1 else 32 * index + rng.randint(-6, 38 - size)
        return size, x, rng.randint(-4, 68 - size)
    if count == 1:
        size = rng.randint(46, 54)
        return size, 32 - size // 2 + rng.randint(-3, 3), 32 - size // 2 + rng.randint(-3, 3)
    size = rng.randint(28, 31)
    return size, 32 * index + (32 - size) // 2, 32 - size // 2 + rng.randint(-6, 6)


def scene(work, sets, free, rng):
    """One scene: 32 x 32 pixels, the indices of its objects (-1 where none) and of its background."""
    background = rng.randrange(len(BACKGROUNDS))
    colour = list(BACKGROUNDS.values())[background]
    if free:
        colour = tuple(min(255, max(0, c + rng.randint(-25, 25))) for c in colour)
    canvas = Image.new("RGB", (64, 64), colour)
    count = 1 if rng.random() < 0.5 else 2
    if free and rng.random() < 0.04:
        count = 0
    objects = rng.sample(range(len(OBJECTS)), count)
    for i, obj in enumerate(objects):
        size, x, y = placement(count, i, free, rng)
        tile = sprite(work, rng.choice(sets), OBJECTS[obj]).resize((size, size), Image.LANCZOS)
        canvas.paste(tile, (x, y), tile)
    pixels = np.asarray(canvas, np.float32).reshape(32, 2, 32, 2, 3).mean((1, 3)).round().astype(np.uint8)
    return pixels, (objects + [-1, -1])[:2], background


def scenes(work, split):
    """The scenes of a split as a dict of arrays, rendered at the first use."""
    path = work / f"scenes-{split}.npz"
    if not path.exists():
        sets, count, seed, free = SPLITS[split]
        rng = random.Random(seed)
        pixels, objects, backgrounds = zip(*(scene(work, sets, free, rng) for _ in range(count)))
        part = path.with_suffix(".part.npz")
        np.savez(part, pixels=np.stack(pixels), objects=np.array(objects), backgrounds=np.array(backgrounds))
        shutil.move(part, path)
    return dict(np.load(path))


def as_tensor(pixels):
    """uint8 [n, 32, 32, 3] to float [n, 3, 32, 32] in [-1, 1]."""
    import torch
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).float().div_(127.5).sub_(1)


def label_matrix(objects):
    """Object indices [n, 2] to a 0/1 tensor [n, 60]."""
    import torch
    labels = torch.zeros(len(objects), len(OBJECTS) + 1)
    labels.scatter_(1, torch.from_numpy(objects) % (len(OBJECTS) + 1), 1.0)
    return labels[:, :-1]


if __name__ == "__main__":
    work = arguments(__doc__).work
    fetch(work)
    sprites(work)
    for name in SPLITS:
        print(name, scenes(work, name)["pixels"].shape, flush=True)
