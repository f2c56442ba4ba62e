"""Makes `networks/open_clip` and `networks/open_clip_quick`: small CLIP models with random weights as open_clip pushes them to the
Hugging Face hub, each with `golden.safetensors` as in `networks.py`.

    python openclip.py             (torch 2.15, open_clip_torch 3.3; two runs give the same numbers)
"""
import json
import shutil
from pathlib import Path

import torch
from open_clip.model import CLIP
from open_clip.push_to_hf_hub import save_config_for_hf
from safetensors.torch import save_file

OUT = Path(__file__).parent / "networks"
MEAN, STD = [0.5, 0.45, 0.4], [0.25, 0.26, 0.27]
torch.set_num_threads(1)


def make(name, weights, half, **config):
    generator = torch.Generator().manual_seed(6)
    model = CLIP(**config).eval().requires_grad_(False)
    for key, p in model.named_parameters():
        noise = torch.randn(p.shape, generator=generator)
        if key.endswith("weight") and p.ndim == 1:
            p.data = 1 + 0.2 * noise
        elif "embedding" in key or p.ndim == 1:
            p.data = 0.3 * noise
        elif key != "logit_scale":
            p.data = noise / (p.shape[0] if key in ("text_projection", "visual.proj") else p[0].numel()) ** 0.5
    model.visual.image_mean, model.visual.image_std = MEAN, STD
    folder = OUT / name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    save_config_for_hf(model, folder / "open_clip_config.json", config)
    if half:
        model = model.half().float()
    tensors = {k: v.half() if half else v for k, v in model.state_dict().items()}
    save_file({k: v.contiguous() for k, v in tensors.items()}, folder / weights, {"format": "pt"})

    size = model.visual.image_size[0]
    pixels = torch.rand(3, 3, size, size, generator=torch.Generator().manual_seed(4)).requires_grad_()
    normal = (pixels - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]
    ids = torch.tensor([[62, 5, 17, 63, 0, 0, 0, 0, 0], [62, 9, 8, 7, 6, 5, 4, 3, 63], [62, 63, 0, 0, 0, 0, 0, 0, 0]])
    y = model.encode_image(normal, normalize=True)
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(5))
    golden = dict(ids=ids, text=model.encode_text(ids, normalize=True), x=pixels, y=y, dy=dy,
                  dx=torch.autograd.grad((y * dy).sum(), pixels)[0], logit_scale=model.logit_scale.exp())
    save_file({k: v.detach().contiguous() for k, v in golden.items()}, folder / "golden.safetensors")
    for file in folder.iterdir():
        file.chmod(0o644)
    print(name, {f.name: f.stat().st_size for f in folder.iterdir()})


if __name__ == "__main__":
    text = dict(context_length=9, vocab_size=64, width=32, heads=4, layers=2)
    make("open_clip", "open_clip_model.safetensors", False, embed_dim=20, text_cfg=text,
         vision_cfg=dict(image_size=24, layers=2, width=40, head_width=20, patch_size=8))
    make("open_clip_quick", "open_clip_pytorch_model.safetensors", True, embed_dim=12, quick_gelu=True,
         text_cfg=text | dict(mlp_ratio=1.5),
         vision_cfg=dict(image_size=23, layers=1, width=24, head_width=8, patch_size=5, mlp_ratio=2.5))
