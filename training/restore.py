"""Makes checkpoints of the published models, where the working folder holds none: training goes on from `assets/`.

The optimiser begins anew. `--energy-minutes` says how much of the energy's budget counts as spent.
"""
from pathlib import Path

import torch
from safetensors.torch import load_file

import clip
import judge
import sd
import tokenizer as bpe
import vae as autoencoder
from common import Training, arguments
from data import as_tensor, label_matrix, scenes


def checkpoint(work, name, minutes, **modules):
    """Saves `modules` as a run of training that has spent `minutes`; leaves one that is there alone."""
    path = work / f"{name}.pt"
    if path.exists():
        print(f"{path.name} is there already")
        return
    training = Training(path, modules, minutes=1.0, lr=0.0)
    training.seconds = 60 * minutes
    training.save()


def fitted_bias(work, model):
    """The bias of the energy's sigmoid loss, which no published file holds: where its mean is the share of positives."""
    tokens, split = bpe.load(work), scenes(work, "tuning")
    text = clip.embed_texts(model, bpe.encode(tokens, clip.OBJECTS + clip.ANCHORS))
    images = clip.embed_images(model, as_tensor(split["pixels"][:1000]))
    logits = model.logit_scale.exp() * clip.scores(images, text[:len(clip.OBJECTS)], text[len(clip.OBJECTS):])
    wanted, low, high = label_matrix(split["objects"][:1000]).mean(), -50.0, 50.0
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
    generator, energy = assets / "emojiland-sd", assets / "emojiland-clip"
    bpe.restore(work, energy)
    unet, text = sd.build()
    checkpoint(work, "vae", 10.0, vae=published(autoencoder.build(), generator / "vae"))
    checkpoint(work, "sd", 25.0, unet=published(unet, generator / "unet"),
               text=published(text, generator / "text_encoder", "text_model."))
    checkpoint(work, "judge", 7.0, judge=published(judge.build(), assets / "emojiland-judge"))
    model, bias = published(clip.build(), energy), clip.Bias()
    bias.value.fill_(fitted_bias(work, model))
    checkpoint(work, "clip", energy_minutes, clip=model, bias=bias)


if __name__ == "__main__":
    args = arguments(__doc__, assets=str(Path(__file__).parent.parent / "assets"), energy_minutes=125.0)
    restore(args.work, Path(args.assets), args.energy_minutes)
