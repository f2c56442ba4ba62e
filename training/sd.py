"""Trains the diffusion generator: a Stable Diffusion UNet and its CLIP text encoder, together, on cached latents.

Both begin as the published ones of the 32 px world.
"""
import os
import random

import numpy as np
import torch
from diffusers import DDIMScheduler, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from transformers import CLIPTextConfig, CLIPTextModel

import start
import tokenizer as bpe
import vae as autoencoder
from captions import caption
from common import ASSETS, ATTENTION, DEVICE, Training, arguments, autocast, contact_sheet, load_average
from words import COLOURS, OBJECTS, TARGETS, article

DROPPED = 0.1
MOST_SIGNAL = 5.0  # steps with a larger signal-to-noise ratio weigh less: their gradient is mostly noise
SHEET = [*(f"{article(o)} on a {b} background" for o, b in zip(OBJECTS, 8 * list(COLOURS))),
         *(f"{article(a)} and {article(b)}" for a, b in zip(TARGETS, OBJECTS))]


def build():
    """The published pair of the 32 px world, made fit for this one."""
    torch.manual_seed(3)
    marks = dict(bos_token_id=bpe.VOCABULARY - 2, eos_token_id=bpe.VOCABULARY - 1, pad_token_id=bpe.VOCABULARY - 1)
    config = CLIPTextConfig(
        vocab_size=bpe.VOCABULARY, hidden_size=128, intermediate_size=384, num_hidden_layers=3, num_attention_heads=4,
        max_position_embeddings=bpe.LENGTH, projection_dim=128, hidden_act="quick_gelu", **marks)
    text = CLIPTextModel._from_config(config, attn_implementation=ATTENTION)
    unet = UNet2DConditionModel(
        sample_size=8, in_channels=autoencoder.LATENT, out_channels=autoencoder.LATENT, block_out_channels=(96, 192), layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=128, attention_head_dim=4, norm_num_groups=16)
    if ATTENTION == "eager":
        unet.set_attn_processor(AttnProcessor())
    start.fill(unet, start.published(ASSETS / "emojiland-sd" / "unet"))
    start.text_encoder(text, ASSETS / "emojiland-sd" / "text_encoder")
    return unet, text


def scheduler():
    return DDIMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, clip_sample=False,
                         set_alpha_to_one=False, steps_offset=1, prediction_type="epsilon")


def load(work):
    unet, text = build()
    load_average(work / "sd.pt", unet=unet, text=text)
    return unet, text


def captions(scenes, index, rng, tokens):
    """Token ids [n, 32] of fresh captions of the scenes, an empty one now and then."""
    texts = ["" if rng.random() < DROPPED else caption(scenes[i], rng) for i in index]
    return bpe.encode(tokens, texts).to(DEVICE)


def train(work, minutes, batch, lr, scenes):
    unet, text = build()
    tokens, (scenes, latents) = bpe.load(work), autoencoder.latents(work, scenes)
    alphas, scale = scheduler().alphas_cumprod.to(DEVICE), autoencoder.statistics(work)["scale"]
    training = Training(work / "sd.pt", {"unet": unet, "text": text}, minutes, lr=lr, ema=0.997, weight_decay=0.0)
    for seed in training.steps():
        index = np.random.randint(0, len(latents), batch)
        ids = captions(scenes, index, random.Random(seed), tokens)
        clean = latents[index].float().to(DEVICE) * scale
        noise, t = torch.randn_like(clean), torch.randint(0, len(alphas), (batch,), device=DEVICE)
        a = alphas[t].view(-1, 1, 1, 1)
        with autocast():
            states = text(input_ids=ids).last_hidden_state
            output = unet(a.sqrt() * clean + (1 - a).sqrt() * noise, t, encoder_hidden_states=states).sample
        error = (output.float() - noise).square().mean((1, 2, 3))
        ratio = a.flatten() / (1 - a.flatten())
        training.update((error * (MOST_SIGNAL / ratio).clamp(max=1)).mean(), error=error.mean())


class Batched:
    """For samplers: as many prompts as there are, a batch at a time."""

    def many(self, prompts, seeds, batch=64, **options):
        chunks = [slice(i, i + batch) for i in range(0, len(prompts), batch)]
        return torch.cat([self.sample(prompts[c], seeds[c], **options) for c in chunks])


class Sampler(Batched):
    """DDIM with classifier-free guidance over the trained generator; `correct` may change each step (steering.py)."""

    def __init__(self, work):
        self.unet, self.text = load(work)
        self.vae, self.tokens = autoencoder.load(work), bpe.load(work)
        self.scale = autoencoder.statistics(work)["scale"]
        self.alphas = scheduler().alphas_cumprod.tolist()

    def decode(self, latent):
        return autoencoder.decode(self.vae, latent / self.scale)

    @torch.no_grad()
    def sample(self, prompts, seeds, steps=25, guidance=4.5, correct=None):
        """Images in [-1, 1]. `correct(t, clean estimate)` returns what is added to the next state, or None."""
        states, blank = (self.text(input_ids=bpe.encode(self.tokens, p).to(DEVICE)).last_hidden_state for p in (prompts, [""]))
        states = torch.cat([states, blank.expand_as(states)])
        x = torch.stack([torch.randn(autoencoder.LATENT, 8, 8, generator=torch.Generator().manual_seed(s)) for s in seeds]).to(DEVICE)
        stride = 1000 // steps
        for t in range((steps - 1) * stride + 1, 0, -stride):
            a, a_next = self.alphas[t], self.alphas[max(t - stride, 0)]
            with autocast():
                asked, free = self.unet(torch.cat([x, x]), t, encoder_hidden_states=states).sample.float().chunk(2)
            noise = free + guidance * (asked - free)
            clean = (x - (1 - a) ** 0.5 * noise) / a ** 0.5
            x = a_next ** 0.5 * clean + (1 - a_next) ** 0.5 * noise
            change = correct(t, clean) if correct else None
            if change is not None:
                x = x + change
        return self.decode(x)


def draw_sheet(sampler, work, name):
    """Draws every object, and pairs, in one picture; the first process alone does it."""
    if int(os.environ.get("RANK", 0)) == 0:
        contact_sheet(sampler(work).many(SHEET, list(range(len(SHEET)))), work / name)


if __name__ == "__main__":
    args = arguments(__doc__, minutes=60.0, batch=128, lr=1e-3, scenes=32768)
    train(args.work, args.minutes, args.batch, args.lr, args.scenes)
    draw_sheet(Sampler, args.work, "sd.png")
