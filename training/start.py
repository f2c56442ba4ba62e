"""Begins the 64 px models from the published 32 px ones: whatever does not see pixels, latents or positions is kept.

The autoencoder grew from the 32 px one, so its first latent channels still mean what they meant; a denoiser's first
and last layers keep those and learn the others.
"""
import torch
from safetensors.torch import load_file


def published(folder, prefix=""):
    """The weights of a published folder by name."""
    file, = folder.glob("*.safetensors")
    return {name.removeprefix(prefix): value.float() for name, value in load_file(file).items()}


@torch.no_grad()
def fill(model, weights):
    """Copies `weights` into `model`; where the model's tensor is larger, into the corner that both have.

    What is new of a last layer begins at zero, and what is new of a first layer at a tenth of its own start.
    """
    own = model.state_dict()
    if unknown := weights.keys() - own.keys():
        raise ValueError(f"the model has no {sorted(unknown)[:3]}")
    for name, tensor in own.items():
        value = weights[name]
        if tensor.shape != value.shape:
            if tensor.dim() == 2 and "position_embedding" in name:
                tensor.copy_(value[-1] + 0.02 * torch.randn_like(tensor))
            else:
                tensor.mul_(0.0 if "out" in name else 0.1)
        tensor[tuple(slice(size) for size in value.shape)] = value


def text_encoder(model, folder):
    fill(model, published(folder, "text_model." if type(model).__name__ == "CLIPTextModel" else ""))
