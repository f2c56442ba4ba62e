"""Writes the working folder's checkpoints, or those of `--only`, into `checkpoints/`: weights and the clock.

Weights are f16; of the denoisers, what they learnt beyond the published ones in 4 bits. The next run of a training script begins from there where the working folder holds no checkpoint of its own.
"""
import shutil

import sd
import sd3
from common import PACKED, arguments, pack, packed

BASES = {"sd": lambda: dict(zip(("unet", "text"), sd.build())), "sd3": lambda: dict(zip(("transformer", "texts"), sd3.build()))}

if __name__ == "__main__":
    args = arguments(__doc__, only=None)
    names = args.only.split(",") if args.only else [path.stem for path in sorted(args.work.glob("*.pt")) if path.stem != "latents"]
    for name in names:
        path = args.work / f"{name}.pt"
        pack(path, BASES[name]() if name in BASES else None)
        print(packed(path).name, packed(path).stat().st_size)
    if (args.work / "latents.json").exists():
        shutil.copy(args.work / "latents.json", PACKED)
