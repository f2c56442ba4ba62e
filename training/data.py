"""Fetches the three emoji sets and rasterises their sprites: all that `render.py` needs."""
import io
import json
import subprocess
import tarfile
from functools import cache

import numpy as np
from PIL import Image

from common import arguments
from words import OBJECTS

PACKAGES = {
    "noto": "@iconify-json/noto@1.2.9",
    "twemoji": "@iconify-json/twemoji@1.2.5",
    "fluent": "@iconify-json/fluent-emoji-flat@1.2.6",
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


if __name__ == "__main__":
    work = arguments(__doc__).work
    fetch(work)
    sprites(work)
