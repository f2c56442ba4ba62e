"""Prints the figures of the trained models as Markdown tables; the prompts and seeds tuned nothing."""
import random

import numpy as np
import torch

import clip
import judge
import steering
import vae as autoencoder
from common import arguments, auroc, contact_sheet
from data import label_matrix
from words import BACKGROUNDS, OBJECTS, TARGETS, caption


def table(title, rows, columns=("figure", "value")):
    print(f"\n### {title}\n\n| " + " | ".join(columns) + " |\n" + "|---" * len(columns) + "|")
    for row in rows:
        print("| " + " | ".join(f"{v:.4f}" if isinstance(v, float) else str(v) for v in row) + " |", flush=True)


def cost(work):
    rows = []
    for name in ("vae", "vae-decoder", "judge", "clip", "sd"):
        if (work / f"{name}.pt").exists():
            state = torch.load(work / f"{name}.pt", weights_only=True)
            rows.append((name, state["step"], round(state["cpu"] / 60), round(state["seconds"] / 60)))
    table("Training cost (one thread each)", rows, ("model", "steps", "CPU minutes", "minutes"))


def real_scenes(work):
    table("Autoencoder", [("held-out L1, range -1..1", autoencoder.heldout_l1(work))])
    table("Judge on held-out scenes", judge.report(work).items())
    areas = clip.report(work)
    table("Energy: AUROC on held-out scenes", [*areas.items(), ("mean", np.mean(list(areas.values()))), ("worst", min(areas.values()))],
          ("concept", "AUROC"))


def generated(bench, count, seed=5):
    """How often the judge finds what was asked for, per number of objects."""
    rng, rows = random.Random(seed), []
    for asked in (1, 2):
        objects = np.array([([i % len(OBJECTS)] + [rng.choice([o for o in range(len(OBJECTS)) if o != i % len(OBJECTS)])])[:asked]
                            for i in range(count)])
        texts = [caption([OBJECTS[o] for o in row], rng.choice(list(BACKGROUNDS)), rng) for row in objects]
        images = bench.sampler.many(texts, [seed * 1000 + i for i in range(count)], steps=bench.steps, guidance=bench.guidance)
        found = judge.found(bench.judge, images, bench.limits)
        there = torch.stack([found[torch.arange(count), objects[:, k]] for k in range(asked)])
        name = "one object" if asked == 1 else "two objects"
        rows += [(f"{name}: all found", there.all(0).float().mean().item()), (f"{name}: each found", there.float().mean().item())]
        contact_sheet(images[:64], bench.work / f"generated-{asked}.png")
        if asked == 1:
            misses = {OBJECTS[o] for o, ok in zip(objects[:, 0], there[0]) if not ok}
    table(f"Generator, {count} images each, {bench.steps} steps, guidance {bench.guidance}", rows)
    print("\nmissed at least once alone:", ", ".join(sorted(misses)) or "none")


def clean_estimates(bench, count, seed=6):
    """AUROC of the energy on decoded clean estimates, per tenth of the schedule: asked targets against the others."""
    texts, objects = map(list, zip(*(steering.prompts(kind, count // 2, seed) for kind in ("target", "benign"))))
    prompts, asked = texts[0] + texts[1], label_matrix(np.concatenate(objects)).bool()[:, -len(TARGETS):].numpy()
    record = steering.record_scores(bench.sampler, bench.energy, prompts, [seed * 1000 + i for i in range(len(prompts))],
                                    bench.steps, bench.guidance).numpy()
    rows = []
    for b in reversed(range(steering.BINS)):
        areas = [auroc(record[:, b, k], asked[:, k]) for k in range(len(TARGETS))]
        rows.append((f"{(b + 1) * 100}-{b * 100}", np.nanmean(areas), np.nanmin(areas), TARGETS[int(np.nanargmin(areas))]))
    table("Energy: AUROC on decoded clean estimates, per time bin", rows, ("t", "mean", "worst", "worst concept"))


if __name__ == "__main__":
    args = arguments(__doc__, parts="cost,real,generated,estimates", images=240, steps=25, guidance=4.5, crops=4)
    bench = steering.Bench(args.work, args.crops, steps=args.steps, guidance=args.guidance)
    parts = {
        "cost": lambda: cost(args.work),
        "real": lambda: real_scenes(args.work),
        "generated": lambda: generated(bench, args.images),
        "estimates": lambda: clean_estimates(bench, args.images),
    }
    for part in args.parts.split(","):
        parts[part]()
