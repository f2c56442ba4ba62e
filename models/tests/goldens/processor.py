"""Makes `processor.json`: what transformers' image processors, on Pillow, make of small pictures, before they normalise them.

    python processor.py            (transformers 5.24, Pillow 12.0; two runs give the same numbers)

Pillow up to 12 and torchvision resize along the rows first, and so does Fairlead. Pillow 13 chooses the order, which changes
the rounding between the two passes, so that the script refuses it.
"""
import json
from pathlib import Path

import numpy as np
import PIL
from PIL import Image
from transformers.models.bit.image_processing_pil_bit import BitImageProcessorPil
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.deit.image_processing_pil_deit import DeiTImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

OUT = Path(__file__).parent / "processor.json"
SQUARE = {"height": 12, "width": 12}
# Class, settings, height and width of the picture.
CASES = [
    *((ViTImageProcessorPil, dict(size=SQUARE, resample=resample), size)
      for resample in range(6) for size in [(31, 20), (5, 7), (12, 40), (12, 12)]),
    (ViTImageProcessorPil, dict(size=SQUARE), (40, 30)),
    (SiglipImageProcessorPil, dict(size={"height": 9, "width": 14}), (40, 30)),
    (ViTImageProcessorPil, dict(size={"shortest_edge": 10}), (40, 30)),
    (CLIPImageProcessorPil, dict(size={"shortest_edge": 14}, crop_size=SQUARE), (23, 40)),
    (CLIPImageProcessorPil, dict(size={"shortest_edge": 13}, crop_size=SQUARE), (41, 22)),
    (CLIPImageProcessorPil, dict(size={"shortest_edge": 9}, crop_size=SQUARE), (20, 31)),
    (CLIPImageProcessorPil, dict(do_resize=False, crop_size={"height": 8, "width": 13}), (11, 10)),
    (BitImageProcessorPil, dict(size={"shortest_edge": 15}, crop_size=SQUARE, resample=2), (30, 30)),
    (DeiTImageProcessorPil, dict(size={"height": 16, "width": 16}, crop_size=SQUARE), (25, 19)),
    (DeiTImageProcessorPil, dict(size={"height": 16, "width": 16}, crop_size=SQUARE, do_center_crop=False), (25, 19)),
]


def case(kind, settings, size, seed):
    picture = np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)
    processor = kind(**settings)
    out = processor(Image.fromarray(picture), do_rescale=False, do_normalize=False, return_tensors="np").pixel_values[0]
    assert out.dtype == np.uint8, out.dtype
    config = json.loads(processor.to_json_string())
    return dict(config=config, height=size[0], width=size[1], rgb=picture.tobytes().hex(), out_height=out.shape[1],
                out_width=out.shape[2], out=out.transpose(1, 2, 0).tobytes().hex())


if __name__ == "__main__":
    assert int(PIL.__version__.split(".")[0]) <= 12, "take Pillow 12.0"
    cases = [case(kind, settings, size, seed) for seed, (kind, settings, size) in enumerate(CASES)]
    OUT.write_text(json.dumps(cases, indent=0) + "\n")
    print(len(cases), "cases,", OUT.stat().st_size, "bytes")
