"""Writes the trained models into `assets/` as f16 folders in the layouts of diffusers and transformers."""
import json
import shutil
from functools import partial
from pathlib import Path

import torch
from diffusers import StableDiffusion3Pipeline, StableDiffusionPipeline
from safetensors.torch import load_file, save_file

import backgrounds
import clip
import judge
import sd
import sd3
import siglip
import tokenizer as bpe
import vae as autoencoder
from captions import forms
from common import ASSETS, arguments
from render import SIDE
from words import ANCHORS, BENIGN, COLOURS, GROUPS, OBJECTS, SYNONYMS, phrases


def write_json(value, path):
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def copy_tokenizer(work, folder):
    folder.mkdir(exist_ok=True)
    for file in sorted((work / "tokenizer").iterdir()):
        shutil.copy(file, folder / file.name)


def prefix_keys(path, prefix):
    """Gives the text encoder the key names of the published Stable Diffusion folders."""
    save_file({prefix + k: v for k, v in load_file(path).items()}, path, metadata={"format": "pt"})


def publish_sd(work, folder):
    unet, text = sd.load(work)
    vae = autoencoder.load(work).to(memory_format=torch.contiguous_format)
    vae.register_to_config(scaling_factor=autoencoder.statistics(work)["scale"])
    pipeline = StableDiffusionPipeline(
        vae=vae.half(), unet=unet.half(), text_encoder=text.half(), tokenizer=bpe.load(work), scheduler=sd.scheduler(),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False)
    pipeline.save_pretrained(folder)
    prefix_keys(folder / "text_encoder" / "model.safetensors", "text_model.")
    shutil.rmtree(folder / "tokenizer")
    copy_tokenizer(work, folder / "tokenizer")


def publish_sd3(work, folder):
    transformer, texts = sd3.load(work)
    known = autoencoder.statistics(work)
    vae = autoencoder.load(work).to(memory_format=torch.contiguous_format)
    vae.register_to_config(scaling_factor=known["scale"], shift_factor=known["shift"])
    tokens = bpe.load(work)
    pipeline = StableDiffusion3Pipeline(
        vae=vae.half(), transformer=transformer.half(), scheduler=sd3.scheduler(), text_encoder=texts[0].half(), tokenizer=tokens,
        text_encoder_2=texts[1].half(), tokenizer_2=tokens, text_encoder_3=None, tokenizer_3=None)
    pipeline.save_pretrained(folder)
    for name in ("tokenizer", "tokenizer_2"):
        shutil.rmtree(folder / name)
        copy_tokenizer(work, folder / name)


def publish_siglip(work, folder):
    siglip.Tower(work).load(work).model.half().save_pretrained(folder)
    for file in sorted((work / "tokenizer-siglip").iterdir()):
        shutil.copy(file, folder / file.name)
    write_json(dict(
        image_processor_type="SiglipImageProcessor", size={"height": SIDE, "width": SIDE}, do_resize=True, do_rescale=True,
        rescale_factor=1 / 255, do_normalize=True, resample=3, do_convert_rgb=True, image_mean=siglip.MEAN,
        image_std=siglip.STD), folder / "preprocessor_config.json")


def publish_clip(work, folder):
    clip.Tower(work).load(work).model.half().save_pretrained(folder)
    copy_tokenizer(work, folder)
    write_json(dict(
        image_processor_type="CLIPImageProcessor", size={"shortest_edge": 32}, crop_size={"height": SIDE, "width": SIDE},
        do_resize=True, do_center_crop=True, do_rescale=True, rescale_factor=1 / 255, do_normalize=True, resample=3,
        do_convert_rgb=True, image_mean=clip.MEAN, image_std=clip.STD), folder / "preprocessor_config.json")


def publish_classifier(work, name, folder):
    """A judge or the verifier: `EmojilandJudge` where it is a plain CNN, else its own architecture's name."""
    model = judge.load(work, name)
    limits = [round(t, 3) for t in judge.thresholds(model, work).tolist()]
    folder.mkdir()
    weights = {k: v.half().contiguous() for k, v in model.state_dict().items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    kind = {"Cnn": "EmojilandJudge", "Vit": "EmojilandVitJudge", "Mixer": "EmojilandMixerJudge"}[type(model).__name__]
    config = dict(architectures=[kind], image_size=SIDE, norm_groups=judge.GROUPS, labels=OBJECTS, thresholds=limits)
    if name in judge.CHANNELS:
        config |= dict(channels=judge.CHANNELS[name])
    write_json(config, folder / "config.json")


def publish_objects(assets):
    """What the world shows and how it is put into words, for the code that draws prompts."""
    targets = [{"name": name, "group": group, "phrases": phrases(name)} for group, names in GROUPS.items() for name in names]
    names = list(dict.fromkeys(backgrounds.bank()[1]))
    value = dict(benign=BENIGN, targets=targets, synonyms=SYNONYMS, anchors=ANCHORS, backgrounds=list(COLOURS), scenes=names, captions=forms())
    part = assets / "emojiland-objects.part"
    write_json(value, part)
    part.replace(assets / "emojiland-objects.json")


def replace_folder(folder, write):
    """Writes a folder beside its place and renames it there, so that a reader sees the old one or the new one."""
    part, old = folder.with_name(folder.name + ".part"), folder.with_name(folder.name + ".old")
    for leftover in (part, old):
        shutil.rmtree(leftover, ignore_errors=True)
    write(part)
    for file in part.rglob("*.safetensors"):
        file.chmod(0o644)
    if folder.exists():
        folder.rename(old)
    part.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


PUBLISHERS = {"sd": publish_sd, "sd3": publish_sd3, "siglip": publish_siglip, "clip": publish_clip}
PUBLISHERS |= {name: partial(publish_classifier, name=name) for name in judge.FIRST_SEED}

if __name__ == "__main__":
    args = arguments(__doc__, assets=str(ASSETS), only=",".join(PUBLISHERS))
    assets = Path(args.assets)
    assets.mkdir(exist_ok=True)
    publish_objects(assets)
    for name in args.only.split(","):
        replace_folder(assets / f"emojiland-{name}", lambda part: PUBLISHERS[name](args.work, folder=part))
