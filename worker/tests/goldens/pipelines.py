"""Goldens of the worker, made with torch and diffusers.

    python pipelines.py                                   the tiny pipelines, their images, the steps of the samplers
    python pipelines.py ../../../assets/emojiland-sd      the image of that pipeline folder

Needs torch, diffusers, transformers, numpy, and the `openssl` program: `noise.py` makes the initial noise, and the
ChaCha20 key stream is OpenSSL's.
"""

import hashlib
import json
import math
import shutil
import struct
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

from noise import normal

HERE = Path(__file__).parent
torch.set_num_threads(1)
torch.use_deterministic_algorithms(True)

RUN = {
    "prompt": "a cat on a blue background",
    "negative_prompt": "a dog",
    "steps": 20,
    "guidance_scale": 5.0,
    "seed": 20_240,
}


def content_hash(folder):
    """`fairlead_models::ModelFolder::hash`, where all files of the folder are read."""
    files = [
        path.relative_to(folder).as_posix()
        for path in folder.rglob("*")
        if path.is_file() and path.suffix in (".json", ".txt", ".safetensors")
        and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    ]
    digest = hashlib.sha256()
    for name in sorted(files, key=str.encode):
        data = (folder / name).read_bytes()
        digest.update(name.encode() + b"\0" + struct.pack("<Q", len(data)) + data)
    return digest.hexdigest()


def image_of(pipeline, name, extra=None):
    """The 20-step image of `RUN`, as RGB8 rows, and what made it."""
    pipeline.set_progress_bar_config(disable=True)
    denoiser = getattr(pipeline, "unet", None) or pipeline.transformer
    config, factor = denoiser.config, pipeline.vae_scale_factor
    shape = (1, config.in_channels, config.sample_size, config.sample_size)
    latents = torch.from_numpy(normal(RUN["seed"], math.prod(shape))).reshape(shape)
    array = pipeline(
        RUN["prompt"],
        negative_prompt=RUN["negative_prompt"],
        num_inference_steps=RUN["steps"],
        guidance_scale=RUN["guidance_scale"],
        latents=latents,
        output_type="np",
    ).images[0]
    pixels = (array * 255).round().astype("uint8")
    side = config.sample_size * factor
    assert pixels.shape == (side, side, 3)
    print(f"{name}: mean {pixels.mean():.1f}, deviation {pixels.std():.1f}, "
          f"clipped {np.mean((pixels == 0) | (pixels == 255)):.3f}")
    golden = dict(RUN, side=side, pixels=pixels.reshape(-1).tobytes().hex(), **(extra or {}))
    (HERE / f"{name}.json").write_text(json.dumps(golden, indent=0) + "\n")


def tokenizer_files(folder):
    """A byte-level BPE in CLIP's format with a handful of merges."""
    letters = list(dict.fromkeys(
        [chr(i) for i in range(ord("!"), ord("~") + 1)]
        + [chr(i) for i in range(ord("\xa1"), ord("\xac") + 1)]
        + [chr(i) for i in range(ord("\xae"), ord("\xff") + 1)]
        + [chr(256 + i) for i in range(68)]
    ))
    merges = [("c", "a"), ("ca", "t</w>"), ("d", "o"), ("do", "g</w>"), ("b", "l"), ("o", "n</w>")]
    tokens = letters + [letter + "</w>" for letter in letters]
    tokens += [left + right for left, right in merges] + ["<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True)
    vocabulary = {token: i for i, token in enumerate(tokens)}
    (folder / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False))
    lines = ["#version: 0.2"] + [" ".join(merge) for merge in merges]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n")
    tokenizer = CLIPTokenizer.from_pretrained(folder, model_max_length=77, pad_token="<|endoftext|>")
    tokenizer.save_pretrained(folder)
    return tokenizer, len(tokens)


def tiny(folder):
    """A pipeline with random weights, stored in f16."""
    shutil.rmtree(folder, ignore_errors=True)
    torch.manual_seed(11)
    tokenizer, vocabulary = tokenizer_files(folder / "tokenizer")
    text = CLIPTextModel(CLIPTextConfig(
        vocab_size=vocabulary, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, max_position_embeddings=77, projection_dim=32,
        bos_token_id=vocabulary - 2, eos_token_id=vocabulary - 1, pad_token_id=vocabulary - 1,
    ))
    unet = UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, block_out_channels=(16, 32),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"), layers_per_block=1,
        attention_head_dim=4, cross_attention_dim=32, norm_num_groups=4,
    )
    vae = AutoencoderKL(
        block_out_channels=(16, 32, 32), latent_channels=4, layers_per_block=1, norm_num_groups=4,
        down_block_types=("DownEncoderBlock2D",) * 3, up_block_types=("UpDecoderBlock2D",) * 3,
        sample_size=32,
    )
    with torch.no_grad():
        # Fresh weights give a grey picture whatever the prompt says: make the prompt and the
        # picture count.
        text.get_input_embeddings().weight.mul_(30.0)
        unet.conv_out.weight.mul_(2.0)
        vae.decoder.conv_out.weight.mul_(1.5)
    scheduler = DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False,
        set_alpha_to_one=False, steps_offset=1,
    )
    pipeline = StableDiffusionPipeline(
        vae=vae.half(), text_encoder=text.half(), tokenizer=tokenizer, unet=unet.half(),
        scheduler=scheduler, safety_checker=None, feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.save_pretrained(folder)


def tiny_3(folder):
    """A Stable Diffusion 3 with random weights, stored in f16, without a third text encoder."""
    shutil.rmtree(folder, ignore_errors=True)
    torch.manual_seed(12)
    tokenizer, vocabulary = tokenizer_files(folder / "tokenizer")

    def text(width, projection, activation):
        return CLIPTextModelWithProjection(CLIPTextConfig(
            vocab_size=vocabulary, hidden_size=width, intermediate_size=2 * width, num_hidden_layers=2,
            num_attention_heads=4, max_position_embeddings=77, projection_dim=projection, hidden_act=activation,
            bos_token_id=vocabulary - 2, eos_token_id=vocabulary - 1, pad_token_id=vocabulary - 1,
        ))

    first, second = text(32, 16, "quick_gelu"), text(24, 20, "gelu")
    transformer = SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, out_channels=4, num_layers=2, attention_head_dim=16,
        num_attention_heads=2, joint_attention_dim=64, caption_projection_dim=32, pooled_projection_dim=36,
        pos_embed_max_size=6, qk_norm="rms_norm", dual_attention_layers=(0,),
    )
    vae = AutoencoderKL(
        block_out_channels=(16, 32, 32), latent_channels=4, layers_per_block=1, norm_num_groups=4,
        down_block_types=("DownEncoderBlock2D",) * 3, up_block_types=("UpDecoderBlock2D",) * 3,
        sample_size=32, scaling_factor=1.5305, shift_factor=0.0609, use_quant_conv=False,
        use_post_quant_conv=False,
    )
    with torch.no_grad():
        # Make the prompt and the picture count, as above; without gates a block does next to nothing.
        for encoder in (first, second):
            encoder.get_input_embeddings().weight.mul_(30.0)
        for name, weight in transformer.named_parameters():
            if "norm1" in name or "norm_out" in name:
                weight.copy_(torch.randn(weight.shape) * 0.3)
        transformer.proj_out.weight.mul_(3.0)
        vae.decoder.conv_out.weight.mul_(1.5)
    pipeline = StableDiffusion3Pipeline(
        transformer=transformer.half(), scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0), vae=vae.half(),
        text_encoder=first.half(), tokenizer=tokenizer, text_encoder_2=second.half(), tokenizer_2=tokenizer,
        text_encoder_3=None, tokenizer_3=None,
    )
    pipeline.save_pretrained(folder)


def tiny_3_long(folder, without):
    """What `without` lacks: a third text encoder and its tokenizer. The other components are to be linked."""
    shutil.rmtree(folder, ignore_errors=True)
    torch.manual_seed(13)
    words = ["\u2581" + word for word in ("a", "cat", "dog", "on", "blue", "background")]
    pieces = ["\u2581"] + list("abcdefghijklmnopqrstuvwxyz")
    vocabulary = [(mark, 0.0) for mark in ("<pad>", "</s>", "<unk>")]
    vocabulary += [(word, -3.0 - 0.01 * i) for i, word in enumerate(words)]
    vocabulary += [(piece, -6.0 - 0.01 * i) for i, piece in enumerate(pieces)]
    T5Tokenizer(vocab=vocabulary, extra_ids=0, model_max_length=512).save_pretrained(folder / "tokenizer_3")
    encoder = T5EncoderModel(T5Config(
        vocab_size=len(vocabulary), d_model=64, d_kv=16, d_ff=96, num_layers=2, num_heads=4,
        feed_forward_proj="gated-gelu",
    ))
    with torch.no_grad():
        encoder.encoder.final_layer_norm.weight.mul_(4.0)
    encoder.half().save_pretrained(folder / "text_encoder_3")
    index = json.loads((without / "model_index.json").read_text())
    index |= {"text_encoder_3": ["transformers", "T5EncoderModel"], "tokenizer_3": ["transformers", "T5Tokenizer"]}
    (folder / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")
    for part in folder.rglob("*"):
        part.chmod(0o755 if part.is_dir() else 0o644)


def load(folder):
    """The pipeline that the folder's model_index.json names; diffusers wants to be told what is absent."""
    index = json.loads((folder / "model_index.json").read_text())
    absent = {name: None for name, part in index.items() if part == [None, None]}
    return DiffusionPipeline.from_pretrained(folder, torch_dtype=torch.float32, local_files_only=True, **absent)


def flow_steps():
    """`FlowMatchEulerDiscreteScheduler.step` over whole schedules."""
    cases, generator = [], torch.Generator().manual_seed(4)
    for config in [{}, {"shift": 3.0}, {"shift": 0.7, "num_train_timesteps": 200}]:
        for steps in (1, 2, 7, 28):
            scheduler = FlowMatchEulerDiscreteScheduler(**config)
            scheduler.set_timesteps(steps)
            chain = []
            for i, t in enumerate(scheduler.timesteps):
                x, p = torch.randn(2, 6, generator=generator)
                sigma = scheduler.sigmas[i]
                chain.append({
                    "t": float(t), "x": x.tolist(), "prediction": p.tolist(),
                    "next": scheduler.step(p, t, x).prev_sample.tolist(), "clean": (x - sigma * p).tolist(),
                })
            cases.append({"config": dict(scheduler.config), "steps": steps, "chain": chain})
    (HERE / "flow-euler.json").write_text(json.dumps(cases, separators=(",", ":"), default=str) + "\n")


def ddim_steps():
    """`DDIMScheduler.step` over whole schedules, for configurations found in real folders."""
    shared = {"num_train_timesteps": 1000, "beta_start": 0.00085, "beta_end": 0.012}
    configs = [
        {**shared, "beta_schedule": "scaled_linear", "clip_sample": False, "steps_offset": 1,
         "set_alpha_to_one": False},
        {**shared, "beta_schedule": "scaled_linear", "clip_sample": False,
         "prediction_type": "v_prediction", "timestep_spacing": "trailing",
         "rescale_betas_zero_snr": True},
        {**shared, "beta_schedule": "linear", "timestep_spacing": "linspace"},
        {"num_train_timesteps": 1000, "beta_schedule": "squaredcos_cap_v2",
         "timestep_spacing": "trailing", "clip_sample_range": 2.0},
        {"num_train_timesteps": 200, "beta_schedule": "linear", "prediction_type": "v_prediction",
         "clip_sample": False},
    ]
    cases, generator = [], torch.Generator().manual_seed(3)
    for config in configs:
        for steps in (1, 7, 20, 30):
            scheduler = DDIMScheduler(**config)
            scheduler.set_timesteps(steps)
            chain = []
            for t in scheduler.timesteps:
                x, p = torch.randn(2, 6, generator=generator)
                out = scheduler.step(p, t, x)
                chain.append({
                    "t": int(t), "x": x.tolist(), "prediction": p.tolist(),
                    "next": out.prev_sample.tolist(), "clean": out.pred_original_sample.tolist(),
                })
            cases.append({"config": dict(scheduler.config), "steps": steps, "chain": chain})
    text = json.dumps(cases, separators=(",", ":"), default=str)
    (HERE / "ddim.json").write_text(text + "\n")


def main():
    if len(sys.argv) > 1:
        folder = Path(sys.argv[1])
        image_of(load(folder), folder.name, {"hash": content_hash(folder)})
        return
    ddim_steps()
    flow_steps()
    (HERE / "noise.json").write_text(json.dumps({"7": normal(7, 9).tolist()}) + "\n")
    folder = HERE / "tiny-sd"
    tiny(folder)
    pipeline = load(folder)
    image_of(pipeline, "tiny-sd-epsilon")
    changes = {"prediction_type": "v_prediction", "timestep_spacing": "trailing",
               "rescale_betas_zero_snr": True}
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config, **changes)
    image_of(pipeline, "tiny-sd-v", {"scheduler": dict(pipeline.scheduler.config)})
    folder = HERE / "tiny-sd3"
    tiny_3(folder)
    image_of(load(folder), "tiny-sd3")
    long = HERE / "tiny-sd3-t5"
    tiny_3_long(long, folder)
    with tempfile.TemporaryDirectory() as whole:
        shutil.copytree(folder, whole, dirs_exist_ok=True)
        shutil.copytree(long, whole, dirs_exist_ok=True)
        image_of(load(Path(whole)), "tiny-sd3-t5")


main()
