"""Puts scenes into words with the forms of `captions.json`, which keeps those of training, calibration and evaluation apart."""
import json
from functools import cache
from pathlib import Path

import backgrounds
from words import OBJECTS, article, spoken

FORMS = Path(__file__).parent / "captions.json"
SAID = 0.3  # how often a caption says what is large or small, or where things are
SMALL, LARGE = 30, 48


@cache
def forms():
    return json.loads(FORMS.read_text())


def group(scene, rng):
    """Which group of forms tells of a scene; the plain ones fit every scene."""
    if len(scene.items) == 1:
        size = scene.items[0].size
        special = "one small" if size <= SMALL else "one large" if size >= LARGE else "one"
        return special if rng.random() < SAID else "one"
    return scene.layout if rng.random() < SAID else "two"


def nouns_of(scene, rng, said):
    """The nouns of a scene in the order in which the forms of the group `said` name them."""
    items = sorted(scene.items, key=lambda item: -item.size) if said == "large and small" else scene.items
    return [spoken(OBJECTS[item.object], rng) for item in items]


def words_of(nouns, background):
    a, b = nouns[0], nouns[-1]
    bare = background.removeprefix("a ").removeprefix("the ")
    return dict(a=article(a), bare_a=a, b=article(b), bare_b=b, bg=background, bare_bg=bare)


def caption(scene, rng, part="training"):
    """A caption of a scene with one object or two, in a form of `part`."""
    chosen = group(scene, rng)
    text = rng.choice(forms()[part][chosen]) + rng.choice(forms()[part]["places"])
    return text.format(**words_of(nouns_of(scene, rng, chosen), backgrounds.bank()[1][scene.background]))
