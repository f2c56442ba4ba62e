"""Safe Latent Diffusion (Schramowski et al. 2023) on what `fairlead evaluate` evaluated: diffusers'
StableDiffusionPipelineSafe with the same model, prompts and noise. Then have its pictures judged:

    python scripts/safe_latent_diffusion.py assets/emojiland-sd out/evaluation/emojiland-sd-both/evaluation.json max out/safe-max
    fairlead evaluate ... --unsteered out/evaluation/emojiland-sd-unsteered --images out/safe-max --out out/evaluation/safe-max

Strengths are the paper's: weak, medium, strong, max. The concept is the list of the evaluation's targets; one longer than the
text encoder's window is encoded in several, as Fairlead does with prompts, where diffusers would cut it. Continues where it
stopped. Needs torch, diffusers, transformers, numpy and the `openssl` program.
"""

import argparse
import json
import math
import sys
from pathlib import Path

import torch
from diffusers import StableDiffusionPipelineSafe
from diffusers.pipelines.deprecated.stable_diffusion_safe import SafetyConfig

sys.path.insert(0, str(Path(__file__).parent.parent / "worker/tests/goldens"))
from noise import normal  # noqa: E402

STRENGTHS = {"weak": SafetyConfig.WEAK, "medium": SafetyConfig.MEDIUM, "strong": SafetyConfig.STRONG, "max": SafetyConfig.MAX}


class Safe(StableDiffusionPipelineSafe):
    def _encode_prompt(self, prompt, device, count, guided, negative, safe):
        prompts = super()._encode_prompt(prompt, device, count, guided, negative, False)
        if not safe:
            return prompts
        concept = self.windows(self.safety_concept)
        # Keys that stand several times leave an attention as it is: so the prompts get the concept's length.
        return torch.cat([prompts.repeat(1, concept.shape[1] // prompts.shape[1], 1), concept])

    def windows(self, text):
        """The encoder's states of a text of any length, `[1, windows * tokens, width]`."""
        tokenizer, length = self.tokenizer, self.tokenizer.model_max_length
        ids = tokenizer(text, add_special_tokens=False).input_ids
        rows = [[tokenizer.bos_token_id, *ids[i:i + length - 2], tokenizer.eos_token_id] for i in range(0, len(ids), length - 2)]
        rows = [row + [tokenizer.pad_token_id] * (length - len(row)) for row in rows]
        return self.text_encoder(torch.tensor(rows))[0].flatten(0, 1)[None]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("evaluation", type=Path)
    parser.add_argument("strength", choices=STRENGTHS)
    parser.add_argument("out", type=Path)
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--guidance", type=float, default=5.0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    pipeline = Safe.from_pretrained(
        options.model, safety_checker=None, feature_extractor=None, image_encoder=None, requires_safety_checker=False,
        torch_dtype=torch.float32, local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    outcomes = json.loads(options.evaluation.read_text())["outcomes"]
    concept = ", ".join(sorted({outcome["target"] for outcome in outcomes if outcome["target"]}))
    longest = max((outcome["prompt"] for outcome in outcomes), key=lambda prompt: len(pipeline.tokenizer(prompt).input_ids))
    assert len(pipeline.tokenizer(longest).input_ids) <= pipeline.tokenizer.model_max_length, f"diffusers would cut the prompt: {longest}"
    pipeline.safety_concept = concept
    print("concept:", concept, flush=True)
    options.out.mkdir(parents=True, exist_ok=True)
    config = pipeline.unet.config
    shape = (1, config.in_channels, config.sample_size, config.sample_size)
    for i, outcome in enumerate(outcomes):
        path = options.out / f"{outcome['kind']}-{outcome['index']:05}.png"
        if path.exists():
            continue
        latents = torch.from_numpy(normal(outcome["seed"], math.prod(shape))).reshape(shape)
        image = pipeline(
            outcome["prompt"], num_inference_steps=options.steps, guidance_scale=outcome["guidance"] or options.guidance,
            latents=latents, **STRENGTHS[options.strength]).images[0]
        image.save(path.with_suffix(".part"), format="PNG")
        path.with_suffix(".part").rename(path)
        if (i + 1) % 50 == 0:
            print(f"{i + 1} of {len(outcomes)}", flush=True)


main()
