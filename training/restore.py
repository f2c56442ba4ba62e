"""Makes checkpoints of the published models, where the working folder holds none: training goes on from `assets/`.

The optimiser begins anew. `--energy-minutes` says how much of the energies' budget counts as spent.
The labeller is not published: train it.
"""
import json
import shutil
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file

import clip
import energy
import judge
import sd
import sd3
import siglip
import tokenizer as bpe
import vae as autoencoder
from common import DEVICE, Training, arguments
from data import label_matrix
from render import Renderer, draw_contents


def checkpoint(work, name, minutes, **modules):
    """Saves `modules` as a run of training that has spent `minutes`; leaves one that is there alone."""
    path = work / f"{name}.pt"
    if path.exists():
        print(f"{path.name} is there already")
        return
    training = Training(path, modules, minutes=1.0, lr=0.0)
    training.seconds = 60 * minutes
    training.finish()


def fitted_bias(work, tower):
    """The bias of the sigmoid loss, which a CLIPModel's file does not hold: where its mean is the share of positives."""
    text = tower.embed_texts(tower.encode(energy.OBJECTS + energy.ANCHORS).to(DEVICE))
    objects, backgrounds = draw_contents(1000, False, np.random.default_rng(7))
    images = tower.embed_images(Renderer(work).draw(objects, backgrounds, 3, False))
    logits = tower.model.logit_scale.exp() * energy.scores(images, text[:len(energy.OBJECTS)], text[len(energy.OBJECTS):])
    wanted, low, high = label_matrix(objects).mean(), -50.0, 50.0
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if (logits + middle).sigmoid().mean() < wanted else (low, middle)
    return middle


def published(model, folder, prefix=""):
    """`model` with the weights of a folder, every one of them."""
    file, = folder.glob("*.safetensors")
    model.load_state_dict({k.removeprefix(prefix): v.float() for k, v in load_file(file).items()})
    return model


@torch.no_grad()
def restore(work, assets, energy_minutes):
    generator = assets / "emojiland-sd"
    bpe.restore(work, assets / "emojiland-clip")
    scale = json.loads((generator / "vae" / "config.json").read_text())["scaling_factor"]
    (work / "sd-scale.txt").write_text(f"{scale:.5f}")
    unet, text = sd.build()
    checkpoint(work, "vae", 10.0, vae=published(autoencoder.build(), generator / "vae"))
    checkpoint(work, "sd", 25.0, unet=published(unet, generator / "unet"),
               text=published(text, generator / "text_encoder", "text_model."))
    flow = json.loads((assets / "emojiland-sd3" / "vae" / "config.json").read_text())
    (work / "sd3-latents.json").write_text(json.dumps(dict(shift=flow["shift_factor"], scale=flow["scaling_factor"])))
    transformer, texts = sd3.build()
    for encoder, folder in zip(texts, ("text_encoder", "text_encoder_2")):
        published(encoder, assets / "emojiland-sd3" / folder)
    checkpoint(work, "sd3", 6.0, transformer=published(transformer, assets / "emojiland-sd3" / "transformer"), texts=texts)
    checkpoint(work, "judge", 7.0, judge=published(judge.build(), assets / "emojiland-judge"))
    tower = clip.Tower(work)
    published(tower.model, assets / "emojiland-clip").to(DEVICE)
    tower.modules["bias"].value.fill_(fitted_bias(work, tower))
    checkpoint(work, "clip", energy_minutes, **tower.modules)
    shutil.copytree(assets / "emojiland-siglip", work / "tokenizer-siglip", dirs_exist_ok=True,
                    ignore=lambda _, names: [n for n in names if not n.startswith("tokenizer")])
    tower = siglip.Tower(work)
    published(tower.model, assets / "emojiland-siglip")
    checkpoint(work, "siglip", energy_minutes, **tower.modules)


if __name__ == "__main__":
    args = arguments(__doc__, assets=str(Path(__file__).parent.parent / "assets"), energy_minutes=30.0)
    restore(args.work, Path(args.assets), args.energy_minutes)
