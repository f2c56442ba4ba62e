"""Writes layers.safetensors: inputs, outputs, upstream gradients and input gradients of every layer, from torch in float64.

    python models/tests/goldens/layers.py        # needs torch and safetensors

Keys are CASE.x, CASE.y, CASE.dy, CASE.dx, CASE.weight, CASE.bias; attention has q, k, v, dq, dk, dv in place of x and dx.
The cases and their configurations are read again, by name, in ../layers.rs.
"""

from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file

torch.manual_seed(0)
torch.set_num_threads(1)
torch.set_default_dtype(torch.float64)
out = {}


def f32(*shape, scale=1.0):
    """Normal numbers that are exact in float32, so that both sides read the same input."""
    return (torch.randn(*shape) * scale).float().double()


def record(case, inputs, apply, **weights):
    """Runs `apply` on the inputs and keeps output, upstream gradient and input gradients."""
    for x in inputs.values():
        x.requires_grad_(True)
    y = apply(*inputs.values())
    dy = f32(*y.shape)
    grads = torch.autograd.grad(y, list(inputs.values()), dy)
    tensors = {**weights, **inputs, "y": y, "dy": dy}
    tensors |= {f"d{name}": grad for name, grad in zip(inputs, grads)}
    for name, tensor in tensors.items():
        if tensor is not None:
            out[f"{case}.{name}"] = tensor.detach().float().contiguous()


def conv(case, b, c_in, c_out, k, h, w, stride=1, pad=0, asymmetric=False, bias=True):
    weight, bias = f32(c_out, c_in, k, k, scale=(c_in * k * k) ** -0.5), f32(c_out) if bias else None

    def apply(x):
        x = F.pad(x, (0, 1, 0, 1)) if asymmetric else x
        return F.conv2d(x, weight, bias, stride=stride, padding=pad)

    record(case, {"x": f32(b, c_in, h, w)}, apply, weight=weight, bias=bias)


conv("conv3_small", 2, 3, 5, 3, 7, 9, pad=1)
conv("conv3_even", 2, 64, 32, 3, 8, 8, pad=1)
conv("conv3_odd", 1, 96, 80, 3, 13, 10, pad=1)
conv("conv3_pixel", 2, 4, 6, 3, 1, 1, pad=1)
conv("conv3_column", 1, 9, 3, 3, 6, 1, pad=1)
conv("conv3_plain", 1, 8, 8, 3, 5, 4, pad=1, bias=False)
conv("conv1_small", 2, 6, 10, 1, 5, 7)
conv("conv1_odd", 1, 24, 17, 1, 3, 11, bias=False)
conv("down_even", 1, 5, 7, 3, 8, 8, stride=2, pad=1)
conv("down_odd", 2, 16, 9, 3, 9, 6, stride=2, pad=1)
conv("down_trailing_even", 2, 5, 7, 3, 8, 8, stride=2, asymmetric=True)
conv("down_trailing_odd", 1, 16, 9, 3, 7, 10, stride=2, asymmetric=True)
conv("patch4", 2, 3, 12, 4, 8, 12, stride=4)
conv("patch5_rest", 1, 3, 10, 5, 11, 18, stride=5, bias=False)


def linear(case, shape, outputs, bias=True):
    weight, bias = f32(outputs, shape[-1], scale=shape[-1] ** -0.5), f32(outputs) if bias else None
    record(case, {"x": f32(*shape)}, lambda x: F.linear(x, weight, bias), weight=weight, bias=bias)


linear("linear_tokens", (2, 7, 19), 33)
linear("linear_rows", (3, 64), 128)
linear("linear_one", (1, 1, 5), 1, bias=False)


def group_norm(case, shape, groups, silu=False):
    weight, bias = f32(shape[1]) + 1, f32(shape[1])

    def apply(x):
        y = F.group_norm(x, groups, weight, bias, 1e-6)
        return F.silu(y) if silu else y

    record(case, {"x": f32(*shape, scale=2.0) + 0.5}, apply, weight=weight, bias=bias)


group_norm("group_norm", (2, 12, 5, 7), 3)
group_norm("group_norm_silu", (2, 64, 3, 3), 32, silu=True)
group_norm("group_norm_pixel", (1, 8, 1, 1), 2)
group_norm("group_norm_silu_tokens", (2, 6, 21), 1, silu=True)


def layer_norm(case, shape):
    weight, bias = f32(shape[-1]) + 1, f32(shape[-1])
    apply = lambda x: F.layer_norm(x, shape[-1:], weight, bias, 1e-5)
    record(case, {"x": f32(*shape, scale=2.0) - 0.5}, apply, weight=weight, bias=bias)


def rms_norm(case, shape):
    weight = f32(shape[-1]) + 1
    record(case, {"x": f32(*shape, scale=2.0) - 0.5}, lambda x: F.rms_norm(x, shape[-1:], weight, 1e-6), weight=weight)


layer_norm("layer_norm_tokens", (2, 5, 48))
layer_norm("layer_norm_odd", (3, 17))



def modulation(case, b, n, d):
    factor, shift = f32(b, d), f32(b, d)
    record(f"scale_shift_{case}", {"x": f32(b, n, d)}, lambda x: x * factor[:, None] + shift[:, None],
           weight=factor, bias=shift)
    record(f"add_scaled_{case}", {"base": f32(b, n, d), "x": f32(b, n, d)}, lambda base, x: base + x * factor[:, None],
           weight=factor)



def attention(case, b, heads, n, m, d, causal=False, repeats=1):
    inputs = {"q": f32(b, heads, n, d), "k": f32(b, heads, m, d), "v": f32(b, heads, m, d)}
    # The last key and value stand `repeats` times.
    index = torch.tensor(list(range(m)) + [m - 1] * (repeats - 1))
    record(case, inputs,
           lambda q, k, v: F.scaled_dot_product_attention(q, k[:, :, index], v[:, :, index], is_causal=causal))


attention("attention_small", 2, 3, 7, 7, 8)
attention("attention_cross", 1, 2, 50, 13, 40)
attention("attention_causal", 2, 2, 19, 19, 5, causal=True)
attention("attention_long", 1, 1, 150, 133, 12)
attention("attention_causal_long", 1, 1, 140, 140, 16, causal=True)
attention("attention_one", 1, 1, 1, 1, 3)

spread = torch.cat([torch.linspace(-15, 15, 301), f32(200)]).float().double()
for name, f in {
    "gelu_erf": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "gelu_quick": lambda x: x * torch.sigmoid(1.702 * x),
    "silu": F.silu,
}.items():
    record(name, {"x": spread.clone()}, f)

record("upsample", {"x": f32(2, 3, 5, 7)}, lambda x: F.interpolate(x, scale_factor=2, mode="nearest"))


def resize(case, mode, shape, h, w):
    record(case, {"x": f32(*shape)}, lambda x: F.interpolate(x, (h, w), mode=mode, antialias=True, align_corners=False))


for mode in ["bicubic", "bilinear"]:
    resize(f"resize_{mode}_down", mode, (1, 3, 32, 32), 24, 10)
    resize(f"resize_{mode}_up", mode, (2, 1, 8, 11), 21, 17)
    resize(f"resize_{mode}_mixed", mode, (1, 2, 13, 9), 7, 20)
    resize(f"resize_{mode}_pixel", mode, (1, 1, 1, 1), 3, 2)
    resize(f"resize_{mode}_same", mode, (1, 1, 6, 5), 6, 5)

rms_norm("rms_norm_heads", (2, 3, 5, 24))
rms_norm("rms_norm_odd", (3, 17))
modulation("tokens", 2, 5, 24)
modulation("odd", 2, 7, 17)
attention("attention_repeating", 2, 2, 70, 41, 8, repeats=6)
attention("attention_repeating_long", 1, 1, 30, 300, 8, repeats=256)

save_file(out, Path(__file__).with_name("layers.safetensors"))
