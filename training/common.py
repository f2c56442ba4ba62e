"""The working folder, the training clock and the checkpoints that every script shares."""
import argparse
import math
import os
import time
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import save_file

DEVICE = torch.device(os.environ.get("EMOJILAND_DEVICE") or ("cuda" if torch.cuda.is_available() else "cpu"))
ATTENTION = "eager" if DEVICE.type == "cpu" else "sdpa"  # the fused backward is slow on CPUs
torch.set_float32_matmul_precision("high")
CHECKPOINT_SECONDS = 110
BLOCK, CODES, SCALES = 64, "|codes", "|scales"  # of packed checkpoints
ASSETS = Path(os.environ.get("EMOJILAND_ASSETS") or Path(__file__).parent.parent / "assets")
PACKED = Path(__file__).parent / "checkpoints"  # compact, committed; the working folder's own checkpoints win over them
AVERAGE_STEPS = 16
LONGEST_STEP = 20.0  # seconds; more than that between two steps is a pause, not training


def arguments(doc, **options):
    """Parses `--work` and the given `--name default` options; one thread per process is the fastest here."""
    parser = argparse.ArgumentParser(description=doc)
    default = os.environ.get("EMOJILAND_WORK", str(Path(__file__).parent / "work"))
    parser.add_argument("--work", type=Path, default=Path(default), help="folder for data, checkpoints and logs")
    for name, value in options.items():
        kind = str if value is None else type(value)
        parser.add_argument("--" + name.replace("_", "-"), type=kind, default=value)
    torch.set_num_threads(1)
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    return args


def autocast():
    """bf16 where it is safe: every network here trains and samples under it."""
    return torch.autocast(DEVICE.type, torch.bfloat16)


def save_atomically(value, path):
    """Writes beside the target and renames, so that a kill leaves the old file or the new one."""
    part = path.with_suffix(".part")
    torch.save(value, part)
    part.replace(path)


def done_mark(path):
    """The empty file that says that a checkpoint's training is over."""
    return path.with_suffix(".done")


class Training:
    """One resumable run: cosine schedule on the minutes trained so far, averaged weights, checkpoints.

    `progress` is the share of the budget that is spent. It counts training time only, survives a kill, and drives
    the learning rate; a longer budget given later stretches the schedule. Under `torchrun` every process trains on
    its own batches and all average their weights every sixteen steps; the first one writes the checkpoints.
    """

    def __init__(self, path, modules, minutes, lr, warmup=200, ema=0.998, weight_decay=0.01, betas=(0.9, 0.99),
                 save_every=CHECKPOINT_SECONDS):
        self.path, self.budget, self.lr, self.warmup, self.ema_decay = path, minutes * 60, lr, warmup, ema
        self.save_every = save_every
        self.rank, self.peers = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        if self.peers > 1:
            dist.init_process_group("gloo")
        self.modules = torch.nn.ModuleDict(modules).to(DEVICE)
        self.parameters = [p for p in self.modules.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.parameters, lr, weight_decay=weight_decay, betas=betas, fused=True)
        self.ema = [p.detach().clone() for p in self.parameters]
        self.names = [name for name, p in self.modules.named_parameters() if p.requires_grad]
        self.step, self.began, self.seconds, self.cpu, self.history = 0, 0, 0.0, 0.0, []
        done_mark(path).unlink(missing_ok=True)
        if path.exists():
            self._resume(torch.load(path, weights_only=True, map_location=DEVICE))
        elif packed(path).exists():
            self._begin_from(packed(path))
        self.saved, self.mark, self.cpu_mark = time.monotonic(), time.monotonic(), time.process_time()

    def _resume(self, state):
        self.modules.load_state_dict(state["modules"])
        self.optimizer.load_state_dict(state["optimizer"])
        for average, value in zip(self.ema, state["ema"]):
            average.copy_(value)
        self.step, self.seconds, self.cpu = state["step"], state["seconds"], state["cpu"]
        print(f"resumed {self.path.name} at step {self.step}, {self.seconds / 60:.1f} minutes", flush=True)

    @torch.no_grad()
    def _begin_from(self, path):
        """Goes on from packed weights; they hold no optimiser state, so the learning rate warms up again."""
        clock = unpack(path, dict(zip(self.names, self.parameters, strict=True)))
        torch._foreach_copy_(self.ema, self.parameters)
        self.step, self.seconds, self.cpu = int(clock["step"]), float(clock["seconds"]), float(clock["cpu"])
        self.began = self.step
        print(f"began from {path.name} at step {self.step}, {self.seconds / 60:.1f} minutes", flush=True)

    @property
    def progress(self):
        return min(1.0, self.seconds / self.budget)

    def save(self):
        if self.rank > 0:
            return
        state = dict(modules=self.modules.state_dict(), names=self.names, optimizer=self.optimizer.state_dict(), ema=self.ema,
                     step=self.step, seconds=self.seconds, cpu=self.cpu)
        save_atomically(state, self.path)
        self.saved = time.monotonic()

    def steps(self):
        """Yields a seed per step until the budget is spent; all random generators start from it."""
        while self.progress < 1 or (self.peers > 1 and self.step % AVERAGE_STEPS):
            seed = self.step * self.peers + self.rank
            torch.manual_seed(seed)
            np.random.seed(seed % 2**31)
            cosine = 0.5 * (1 + math.cos(math.pi * self.progress))
            self.optimizer.param_groups[0]["lr"] = self.lr * min(1, (self.step - self.began + 1) / self.warmup) * (0.01 + 0.99 * cosine)
            yield seed
            now, cpu = time.monotonic(), time.process_time()
            self.seconds, self.mark = self.seconds + min(now - self.mark, LONGEST_STEP), now
            self.cpu, self.cpu_mark = self.cpu + (cpu - self.cpu_mark) * self.peers, cpu
            if self.peers > 1 and self.step % AVERAGE_STEPS == 0:
                self._average()
            if now - self.saved > self.save_every:
                self.save()
        self.finish()

    def finish(self):
        """Saves, and marks the checkpoint as one that others may use."""
        self.save()
        if self.rank == 0:
            done_mark(self.path).touch()

    @torch.no_grad()
    def _average(self):
        """Averages the weights and the clock over all processes."""
        flat = torch.cat([*(p.flatten() for p in self.parameters), torch.tensor([self.seconds], device=DEVICE)])
        dist.all_reduce(flat)
        *values, clock = (flat / self.peers).split([p.numel() for p in self.parameters] + [1])
        for parameter, value in zip(self.parameters, values):
            parameter.copy_(value.view_as(parameter))
        self.seconds = clock.item()

    def update(self, loss, **figures):
        """One optimiser step on `loss`, the average of the weights, and a line of figures every hundred steps."""
        self.optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        if torch.isfinite(norm):
            self.optimizer.step()
        self.step += 1
        with torch.no_grad():
            torch._foreach_lerp_(self.ema, self.parameters, 1 - min(self.ema_decay, self.step / (self.step + 20)))
        self.history.append({"loss": loss.detach(), **{k: v.detach() for k, v in figures.items()}})
        if self.step % 100 == 0 and self.rank == 0:
            mean = {k: torch.stack([h[k] for h in self.history]).mean().item() for k in self.history[-1]}
            text = " ".join(f"{k} {v:.4f}" for k, v in mean.items())
            print(f"{self.step} {self.seconds / 60:.1f} min {text}", flush=True)
            self.history = []


def packed(path):
    """Where the compact form of a checkpoint is kept in the repository."""
    return PACKED / f"{path.stem}.safetensors"


def pack(path, base=None):
    """Writes the averaged weights of a checkpoint and its clock: as f16, or what was learnt beyond `base` in 4 bits."""
    state = torch.load(path, weights_only=True, map_location="cpu")
    weights = dict(zip(state["names"], state["ema"], strict=True))
    if base:
        start = dict(torch.nn.ModuleDict(base).cpu().named_parameters())
        tensors = {}
        for name, value in weights.items():
            tensors[name + CODES], tensors[name + SCALES] = quantise(value - start[name].detach())
    else:
        tensors = {name: value.half().contiguous() for name, value in weights.items()}
    PACKED.mkdir(exist_ok=True)
    save_file(tensors, packed(path), metadata={k: str(state[k]) for k in ("step", "seconds", "cpu")})


def quantise(values):
    """Two 4-bit codes a byte, and an f16 scale per 64 values; a tenth of the values' deviation is lost."""
    flat = torch.nn.functional.pad(values.flatten(), (0, -values.numel() % BLOCK)).view(-1, BLOCK)
    scales = (flat.abs().amax(1, keepdim=True) / 7).clamp(min=1e-7).half()
    codes = (flat / scales.float()).round().clamp(-7, 7).to(torch.int16) + 8
    return (codes[:, ::2] * 16 + codes[:, 1::2]).to(torch.uint8), scales


def restore(codes, scales, shape):
    pairs = torch.stack([codes.to(torch.int16) // 16, codes.to(torch.int16) % 16], -1).flatten(1)
    return ((pairs - 8).float() * scales.float()).flatten()[:shape.numel()].view(shape)


@torch.no_grad()
def unpack(path, parameters):
    """Puts packed weights into named parameters, which hold what the packed ones began from; returns the clock."""
    with safe_open(path, "pt", device=str(DEVICE)) as file:
        held = set(file.keys())
        for name, parameter in parameters.items():
            if name in held:
                parameter.copy_(file.get_tensor(name))
            else:
                parameter += restore(file.get_tensor(name + CODES), file.get_tensor(name + SCALES), parameter.shape)
        return file.metadata()


def trained(path):
    """Whether a checkpoint is there, in the working folder or packed."""
    return path.exists() or packed(path).exists()


@torch.no_grad()
def load_average(path, **modules):
    """Loads the averaged weights of a checkpoint into `modules`, frozen and in evaluation mode."""
    everything = torch.nn.ModuleDict(modules).to(DEVICE)
    parameters = dict(everything.named_parameters())
    if path.exists():
        state = torch.load(path, weights_only=True, map_location=DEVICE)
        for name, value in zip(state["names"], state["ema"], strict=True):
            parameters[name].copy_(value)
    else:
        unpack(packed(path), parameters)
    everything.requires_grad_(False).eval()


def auroc(scores, positive):
    """Area under the ROC curve of `scores` (1-d arrays; ties are broken by order)."""
    ranks = np.argsort(np.argsort(scores))
    n1 = positive.sum()
    n0 = len(positive) - n1
    return float("nan") if n1 == 0 or n0 == 0 else (ranks[positive].sum() - n1 * (n1 - 1) / 2) / (n1 * n0)


def contact_sheet(images, path, columns=16, scale=2):
    """Writes images [n, 3, h, h] in [-1, 1] as one PNG, enlarged by nearest neighbour."""
    from PIL import Image
    pixels = ((images.float().clamp(-1, 1) + 1) * 127.5).byte().permute(0, 2, 3, 1).contiguous().cpu().numpy()
    side, rows = images.shape[-1] * scale + 2, -(-len(pixels) // columns)
    sheet = Image.new("RGB", (columns * side, rows * side))
    for i, image in enumerate(pixels):
        tile = Image.fromarray(image).resize((side - 2, side - 2), Image.NEAREST)
        sheet.paste(tile, ((i % columns) * side, (i // columns) * side))
    sheet.save(path)
