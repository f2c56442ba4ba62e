"""The usual augmentations of images [n, 3, h, h] in [-1, 1]; each picks its strength per image."""
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


def _jpeg_parts():
    k, x = torch.meshgrid(torch.arange(8.0), torch.arange(8.0), indexing="ij")
    cosine = torch.cos((2 * x + 1) * k * math.pi / 16) * 0.5
    cosine[0] /= 2 ** 0.5
    table = 8 + 6 * (k + x) + 0.5 * (k + x) ** 2  # close to the standard's table for brightness
    to_luma = torch.tensor([[0.299, 0.587, 0.114], [-0.1687, -0.3313, 0.5], [0.5, -0.4187, -0.0813]])
    return cosine, table, to_luma


def jpeg(images, strongest=2.5, share=0.3):
    """What JPEG does to a picture: colours at half size, and coarse steps of each 8 x 8 block's cosine transform."""
    n, device = len(images), images.device
    chosen = torch.nonzero(torch.rand(n, device=device) < share).flatten()
    if not len(chosen):
        return images
    cosine, table, to_luma = (part.to(device) for part in _jpeg_parts())
    strength = (0.3 + torch.rand(len(chosen), 1, 1, 1, 1, 1, device=device) * (strongest - 0.3)) / 127.5
    planes = torch.einsum("ij,njhw->nihw", to_luma, images[chosen])
    coarse = F.avg_pool2d(planes[:, 1:], 2)
    planes = torch.cat([planes[:, :1], coarse.repeat_interleave(2, 2).repeat_interleave(2, 3)], 1)
    blocks = planes.unfold(2, 8, 8).unfold(3, 8, 8)
    steps = table * strength
    found = (cosine @ blocks @ cosine.T / steps).round() * steps
    planes = (cosine.T @ found @ cosine).permute(0, 1, 2, 4, 3, 5).reshape(planes.shape)
    return images.index_copy(0, chosen, torch.einsum("ij,njhw->nihw", torch.linalg.inv(to_luma), planes))


def usual(images):
    """All of them, at the strengths that the classifiers and the energies train with."""
    images = colour(blur(warp(images, turn=0.15, zoom=0.15, shift=0.05), 2.0, 0.4))
    return jpeg(noise(images, 0.15).clamp(-1, 1)).clamp(-1, 1)
