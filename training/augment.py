"""Differentiation-free image augmentations on [n, 3, 32, 32] in [-1, 1]; each picks its strength per image."""
import math

import torch
import torch.nn.functional as F


def warp(images, turn=0.2, zoom=0.15, shift=0.1, flip=0.5):
    """Random rotation (radians), zoom, shift (share of the width) and mirror image; edges are repeated."""
    n = len(images)
    def uniform(*shape):
        return torch.rand(*shape, device=images.device)

    angle = (uniform(n) * 2 - 1) * turn
    scale = 1 + (uniform(n) * 2 - 1) * zoom
    mirror = 1 - 2 * (uniform(n) < flip).float()
    cos, sin = angle.cos() * scale, angle.sin() * scale
    move = (uniform(n, 2) * 2 - 1) * 2 * shift
    theta = torch.stack([torch.stack([cos * mirror, -sin, move[:, 0]], 1), torch.stack([sin * mirror, cos, move[:, 1]], 1)], 1)
    grid = F.affine_grid(theta, images.shape, align_corners=False)
    return F.grid_sample(images, grid, padding_mode="border", align_corners=False)


def blur(images, strongest=1.5, share=0.5):
    """Separable Gaussian blur of a random width, the same for the whole batch, on a share of the images."""
    sigma = 0.3 + torch.rand(()).item() * (strongest - 0.3)
    reach = math.ceil(2.5 * sigma)
    kernel = torch.exp(-0.5 * (torch.arange(-reach, reach + 1, device=images.device) / sigma) ** 2)
    kernel = (kernel / kernel.sum()).expand(3, 1, -1)
    padded = F.pad(images, (reach,) * 4, mode="replicate")
    soft = F.conv2d(F.conv2d(padded, kernel[..., None, :], groups=3), kernel[..., :, None], groups=3)
    return torch.where(torch.rand(len(images), 1, 1, 1, device=images.device) < share, soft, images)


def colour(images, contrast=0.25, brightness=0.2, tint=0.1):
    n, device = len(images), images.device
    factor = 1 + (torch.rand(n, 1, 1, 1, device=device) * 2 - 1) * contrast
    offset = (torch.rand(n, 1, 1, 1, device=device) * 2 - 1) * brightness + (torch.rand(n, 3, 1, 1, device=device) * 2 - 1) * tint
    return images * factor + offset


def noise(images, strongest=0.15):
    return images + torch.randn_like(images) * torch.rand(len(images), 1, 1, 1, device=images.device) * strongest
