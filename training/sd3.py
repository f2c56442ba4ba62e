"""Trains the flow generator: a Stable Diffusion 3 transformer and its two CLIP text encoders, together, on cached latents.

All begin as the published ones of the 32 px world.
"""
import math
import random

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel
from transformers import CLIPTextConfig, CLIPTextModelWithProjection

import start
import tokenizer as bpe
import vae as autoencoder
from common import ASSETS, ATTENTION, DEVICE, Training, arguments, autocast, load_average
from sd import Batched, captions, draw_sheet

T5_TOKENS = 256  # what the pipeline asks of a T5 encoder; without one they are all zeros
WIDTHS, JOINT = (96, 128), 256
SHIFT = 2.0


class JointAttention:
    """Joint attention where the last text token stands for the absent T5 encoder's 256 equal ones.

    Nothing tells those tokens apart, so they stay equal in every layer: one of them with the weight of all gives the same sums.
    """

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None):
        def heads(x):
            return x.unflatten(-1, (attn.heads, -1)).transpose(1, 2)

        q, k, v = (heads(f(hidden_states)) for f in (attn.to_q, attn.to_k, attn.to_v))
        text = [heads(f(encoder_hidden_states)) for f in (attn.add_q_proj, attn.add_k_proj, attn.add_v_proj)]
        q, k = attn.norm_q(q), attn.norm_k(k)
        text[:2] = attn.norm_added_q(text[0]), attn.norm_added_k(text[1])
        q, k, v = (torch.cat([a, b], 2) for a, b in zip((q, k, v), text))
        bias = q.new_zeros(q.shape[2], k.shape[2])
        bias[:, -1] = math.log(T5_TOKENS)
        out = F.scaled_dot_product_attention(q, k, v.to(q.dtype), attn_mask=bias).transpose(1, 2).flatten(2)
        picture, words = out.split([hidden_states.shape[1], encoder_hidden_states.shape[1]], 1)
        return attn.to_out[0](picture), words if attn.context_pre_only else attn.to_add_out(words)


def build():
    """The published transformer and text encoders of the 32 px world, made fit for this one."""
    torch.manual_seed(5)
    marks = dict(bos_token_id=bpe.VOCABULARY - 2, eos_token_id=bpe.VOCABULARY - 1, pad_token_id=bpe.VOCABULARY - 1)
    texts = torch.nn.ModuleList(
        CLIPTextModelWithProjection._from_config(CLIPTextConfig(
            vocab_size=bpe.VOCABULARY, hidden_size=width, intermediate_size=3 * width, num_hidden_layers=4,
            num_attention_heads=width // 32, max_position_embeddings=bpe.LENGTH, projection_dim=width, hidden_act=act, **marks),
            attn_implementation=ATTENTION)
        for width, act in zip(WIDTHS, ("quick_gelu", "gelu")))
    transformer = SD3Transformer2DModel(
        sample_size=8, patch_size=1, in_channels=autoencoder.LATENT, out_channels=autoencoder.LATENT, num_layers=7,
        attention_head_dim=32, num_attention_heads=6, joint_attention_dim=JOINT, caption_projection_dim=192,
        pooled_projection_dim=sum(WIDTHS), pos_embed_max_size=16, qk_norm="rms_norm")
    transformer.set_attn_processor(JointAttention())
    start.fill(transformer, start.published(ASSETS / "emojiland-sd3" / "transformer"))
    for encoder, folder in zip(texts, ("text_encoder", "text_encoder_2")):
        start.text_encoder(encoder, ASSETS / "emojiland-sd3" / folder)
    return transformer, texts


def scheduler():
    return FlowMatchEulerDiscreteScheduler(shift=SHIFT)


def load(work):
    transformer, texts = build()
    load_average(work / "sd3.pt", transformer=transformer, texts=texts)
    return transformer, texts


def encode_text(texts, ids):
    """States [n, 33, 256] (the last token stands for T5's) and pooled [n, 224] of token ids [n, 32]."""
    outputs = [text(input_ids=ids, output_hidden_states=True) for text in texts]
    states = torch.cat([o.hidden_states[-2] for o in outputs], -1)
    return F.pad(states, (0, JOINT - states.shape[-1], 0, 1)), torch.cat([o.text_embeds for o in outputs], -1)


def draw_sigma(n):
    """Noise levels: mostly logit-normal, as the model's authors train, and some uniform, so that the ends are known too."""
    normal = torch.sigmoid(torch.randn(n, device=DEVICE))
    return torch.where(torch.rand(n, device=DEVICE) < 0.75, normal, torch.rand(n, device=DEVICE))


def train(work, minutes, batch, lr, scenes):
    transformer, texts = build()
    tokens, (scenes, latents), known = bpe.load(work), autoencoder.latents(work, scenes), autoencoder.statistics(work)
    modules = {"transformer": transformer, "texts": texts}
    training = Training(work / "sd3.pt", modules, minutes, lr=lr, warmup=300, ema=0.998, weight_decay=0.01)
    for seed in training.steps():
        index = np.random.randint(0, len(latents), batch)
        ids = captions(scenes, index, random.Random(seed), tokens)
        clean = (latents[index].float().to(DEVICE) - known["shift"]) * known["scale"]
        noise, sigma = torch.randn_like(clean), draw_sigma(batch)
        s = sigma.view(-1, 1, 1, 1)
        with autocast():
            states, pooled = encode_text(texts, ids)
            velocity = transformer((1 - s) * clean + s * noise, states, pooled, sigma * 1000).sample
        training.update((velocity.float() - (noise - clean)).square().mean())


class Sampler(Batched):
    """Flow matching by Euler steps with classifier-free guidance; `correct` may change each step (steering.py)."""

    def __init__(self, work):
        self.transformer, self.texts = load(work)
        self.vae, self.tokens = autoencoder.load(work), bpe.load(work)
        self.known = autoencoder.statistics(work)

    def decode(self, latent):
        return autoencoder.decode(self.vae, latent / self.known["scale"] + self.known["shift"])

    @torch.no_grad()
    def sample(self, prompts, seeds, steps=25, guidance=4.5, correct=None, shift=SHIFT):
        """Images in [-1, 1]. `correct(t, clean estimate)`, t = 1000 sigma, returns what is added to the next state, or None."""
        ids = torch.cat([bpe.encode(self.tokens, prompts), bpe.encode(self.tokens, [""]).expand(len(prompts), -1)])
        with autocast():
            states, pooled = encode_text(self.texts, ids.to(DEVICE))
        x = torch.stack([torch.randn(autoencoder.LATENT, 8, 8, generator=torch.Generator().manual_seed(s)) for s in seeds]).to(DEVICE)
        times = torch.linspace(1, 1 / 1000, steps)
        sigmas = [*(shift * times / (1 + (shift - 1) * times)).tolist(), 0.0]
        for s, following in zip(sigmas, sigmas[1:]):
            t = torch.full((len(ids),), s * 1000, device=DEVICE)
            with autocast():
                asked, free = self.transformer(torch.cat([x, x]), states, pooled, t).sample.float().chunk(2)
            velocity = free + guidance * (asked - free)
            change = correct(max(1, round(s * 1000)), x - s * velocity) if correct else None
            x = x + (following - s) * velocity
            if change is not None:
                x = x + change
        return self.decode(x)


if __name__ == "__main__":
    args = arguments(__doc__, minutes=100.0, batch=128, lr=7e-4, scenes=32768)
    train(args.work, args.minutes, args.batch, args.lr, args.scenes)
    draw_sheet(Sampler, args.work, "sd3.png")
