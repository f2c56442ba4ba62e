"""Makes `classifier/`: a small image classifier with random weights as transformers and an ONNX export save it, and in
`golden.json` what transformers says about two pictures.

    python classifier.py           (torch 2.15, transformers 5.24, onnx 1.23)
"""
import json
import shutil
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessor

OUT = Path(__file__).parent / "classifier"
LABELS = ["normal", "drawing", "forbidden"]
torch.set_num_threads(1)


def picture(side, seed):
    """Smooth, so that a resize changes little."""
    generator = np.random.default_rng(seed)
    coarse = Image.fromarray(generator.integers(0, 256, (4, 4, 3), dtype=np.uint8))
    return coarse.resize((side, side), Image.BICUBIC)


def main():
    shutil.rmtree(OUT, ignore_errors=True)
    torch.manual_seed(5)
    config = ViTConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, image_size=24, patch_size=8,
        id2label=dict(enumerate(LABELS)), label2id={label: i for i, label in enumerate(LABELS)},
    )
    model = ViTForImageClassification(config).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.3)
    processor = ViTImageProcessor(size={"height": 24, "width": 24}, image_mean=[0.4, 0.5, 0.6], image_std=[0.2, 0.25, 0.3])
    config.architectures = ["ViTForImageClassification"]
    config.save_pretrained(OUT)
    processor.save_pretrained(OUT)

    class Logits(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, pixel_values):
            return self.model(pixel_values).logits

    torch.onnx.export(
        Logits(), (torch.zeros(1, 3, 24, 24),), OUT / "model.onnx", input_names=["pixel_values"], output_names=["logits"],
        dynamo=False, opset_version=17, dynamic_axes={"pixel_values": {0: "batch"}, "logits": {0: "batch"}},
    )
    golden = []
    for side, seed in [(24, 1), (31, 2)]:
        image = picture(side, seed)
        with torch.no_grad():
            logits = model(**processor(image, return_tensors="pt")).logits[0]
        golden.append({
            "side": side, "rgb": np.asarray(image).tobytes().hex(), "softmax": logits.softmax(0).tolist(),
            "sigmoid": logits.sigmoid().tolist(),
        })
    (OUT / "golden.json").write_text(json.dumps(golden, indent=0) + "\n")
    for file in OUT.iterdir():
        file.chmod(0o644)
        print(file.name, file.stat().st_size)


main()
