"""The backgrounds of the world: plain colours, gradients between them, and simple scenes; a bank of each, drawn once."""
import random
from functools import cache

import numpy as np
from PIL import Image, ImageDraw

from words import COLOURS

SIDE, SCALE, VARIANTS = 64, 2, 24
CANVAS = SIDE * SCALE
LIGHT = tuple(name for name in COLOURS if name != "black")


def jittered(colour, rng, most=8):
    return tuple(min(255, max(0, c + rng.randint(-most, most))) for c in colour)


def blended(stops, rng, angle=90.0):
    """A canvas that runs through the colours `stops` in a direction (degrees; 90 is downwards)."""
    y, x = np.mgrid[0:CANVAS, 0:CANVAS] / (CANVAS - 1) - 0.5
    along = x * np.cos(np.radians(angle)) + y * np.sin(np.radians(angle))
    along = (along - along.min()) / np.ptp(along)
    places = np.linspace(0, 1, len(stops))
    pixels = np.stack([np.interp(along, places, channel) for channel in np.array([jittered(s, rng) for s in stops]).T], -1)
    return Image.fromarray(pixels.round().astype(np.uint8))


def spots(canvas, rng, count, colour, radius, highest=0.0, lowest=1.0):
    draw = ImageDraw.Draw(canvas)
    for _ in range(count):
        x, y, r = rng.uniform(0, CANVAS), rng.uniform(highest, lowest) * CANVAS, rng.uniform(*radius)
        draw.ellipse((x - r, y - r, x + r, y + r), jittered(colour, rng))
    return canvas


def clouds(canvas, rng):
    for _ in range(rng.randint(1, 3)):
        x, y, r = rng.uniform(0, CANVAS), rng.uniform(0.05, 0.4) * CANVAS, rng.uniform(6, 10)
        for step in (-1.2, 0, 1.2):
            box = (x + step * r - r, y - r * 0.6, x + step * r + r, y + r * 0.6)
            ImageDraw.Draw(canvas).ellipse(box, (250, 250, 252))
    return canvas


def ground(canvas, rng, colour, height=(0.58, 0.75)):
    top = int(CANVAS * rng.uniform(*height))
    ImageDraw.Draw(canvas).rectangle((0, top, CANVAS, CANVAS), jittered(colour, rng))
    return canvas, top


def sky(rng):
    return clouds(blended([(120, 185, 240), (200, 228, 250)], rng), rng)


def meadow(rng):
    return ground(sky(rng), rng, (130, 195, 100))[0]


def beach(rng):
    canvas, _ = ground(blended([(150, 205, 245), (205, 232, 250)], rng), rng, (70, 150, 205), (0.4, 0.5))
    return ground(canvas, rng, (240, 220, 165), (0.64, 0.75))[0]


def sea(rng):
    canvas, top = ground(sky(rng), rng, (60, 135, 200), (0.4, 0.6))
    for _ in range(5):
        x, y = rng.uniform(0, CANVAS), rng.uniform(top + 6, CANVAS)
        ImageDraw.Draw(canvas).line((x, y, x + rng.uniform(10, 24), y), (120, 180, 225), 2)
    return canvas


def desert(rng):
    return ground(blended([(250, 215, 160), (250, 235, 205)], rng), rng, (225, 180, 110))[0]


def snow(rng):
    canvas, _ = ground(blended([(190, 210, 230), (222, 232, 242)], rng), rng, (246, 249, 252))
    return spots(canvas, rng, 24, (255, 255, 255), (1.2, 2.2))


def night(rng):
    return spots(blended([(18, 22, 58), (48, 52, 105)], rng), rng, 22, (245, 240, 200), (0.8, 1.8))


def sunset(rng):
    return blended([(95, 80, 150), (240, 130, 110), (252, 210, 130)], rng)


def table(rng):
    wall = blended([(232, 222, 208), (240, 232, 220)], rng)
    canvas, top = ground(wall, rng, (165, 115, 75))
    for y in range(top + 8, CANVAS, 12):
        ImageDraw.Draw(canvas).line((0, y, CANVAS, y), (145, 98, 62), 2)
    return canvas


def bricks(rng):
    canvas = Image.new("RGB", (CANVAS, CANVAS), (200, 150, 130))
    draw, colour = ImageDraw.Draw(canvas), jittered((185, 110, 90), rng, 12)
    for row, y in enumerate(range(0, CANVAS, 16)):
        for x in range(-32 + 16 * (row % 2), CANVAS, 32):
            draw.rectangle((x, y, x + 29, y + 13), colour)
    return canvas


def two_colours(rng, names=tuple(COLOURS)):
    first, second = rng.sample(names, 2)
    return (first, second), (jittered(COLOURS[first], rng), jittered(COLOURS[second], rng))


def stripes(rng):
    _, (first, second) = two_colours(rng, LIGHT)
    canvas, width = Image.new("RGB", (CANVAS, CANVAS), first), rng.choice((12, 16, 24))
    upright = rng.random() < 0.5
    for start in range(0, CANVAS, 2 * width):
        box = (start, 0, start + width - 1, CANVAS) if upright else (0, start, CANVAS, start + width - 1)
        ImageDraw.Draw(canvas).rectangle(box, second)
    return canvas


def checks(rng):
    _, (first, second) = two_colours(rng, LIGHT)
    canvas, width = Image.new("RGB", (CANVAS, CANVAS), first), rng.choice((16, 32))
    for x in range(0, CANVAS, width):
        for y in range(x // width % 2 * width, CANVAS, 2 * width):
            ImageDraw.Draw(canvas).rectangle((x, y, x + width - 1, y + width - 1), second)
    return canvas


def dots(rng):
    _, (first, second) = two_colours(rng, LIGHT)
    canvas, pitch = Image.new("RGB", (CANVAS, CANVAS), first), rng.choice((16, 22, 32))
    for x in range(pitch // 2, CANVAS, pitch):
        for y in range(pitch // 2, CANVAS, pitch):
            r = pitch * 0.22
            ImageDraw.Draw(canvas).ellipse((x - r, y - r, x + r, y + r), second)
    return canvas


SCENES = {
    "a blue sky": sky, "a meadow": meadow, "a beach": beach, "the sea": sea, "a desert": desert, "snow": snow,
    "a night sky": night, "a sunset": sunset, "a wooden table": table, "a brick wall": bricks, "stripes": stripes,
    "a checkerboard": checks, "polka dots": dots,
}
SHARES = {"plain": 0.5, "gradient": 0.2, "scene": 0.3}


@cache
def bank():
    """Pixels [n, 64, 64, 3], the name of each as a noun phrase, and the kind of each."""
    rng, pictures, names, kinds = random.Random(41), [], [], []

    def add(canvas, name, kind):
        pictures.append(np.asarray(canvas.resize((SIDE, SIDE), Image.BOX)))
        names.append(name)
        kinds.append(kind)

    for name, colour in COLOURS.items():
        for most in [0] + [6] * (VARIANTS - 1):
            add(Image.new("RGB", (CANVAS, CANVAS), jittered(colour, rng, most)), f"a {name} background", "plain")
    for _ in range(12 * VARIANTS):
        (first, second), pair = two_colours(rng)
        add(blended(pair, rng, rng.uniform(0, 360)), f"a {first} and {second} gradient", "gradient")
    for name, draw in SCENES.items():
        for _ in range(VARIANTS):
            add(draw(rng), name, "scene")
    return np.stack(pictures), names, kinds


@cache
def by_kind():
    kinds = bank()[2]
    return {kind: [i for i, k in enumerate(kinds) if k == kind] for kind in SHARES}


def pick(rng):
    """A background's index in the bank."""
    kind, = rng.choices(list(SHARES), SHARES.values())
    return rng.choice(by_kind()[kind])
