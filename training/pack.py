"""Writes the working folder's checkpoints, or those of `--only`, into `checkpoints/`: f16 weights and the clock.

The next run of a training script begins from there where the working folder holds no checkpoint of its own.
"""
import shutil

from common import PACKED, arguments, pack, packed

if __name__ == "__main__":
    args = arguments(__doc__, only=None)
    names = args.only.split(",") if args.only else [path.stem for path in sorted(args.work.glob("*.pt")) if path.stem != "latents"]
    for name in names:
        path = args.work / f"{name}.pt"
        pack(path)
        print(packed(path).name, packed(path).stat().st_size)
    if (args.work / "latents.json").exists():
        shutil.copy(args.work / "latents.json", PACKED)
