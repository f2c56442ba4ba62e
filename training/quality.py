"""Prints the figures of the trained models as Markdown tables; the prompts and seeds tuned nothing."""
import random

import numpy as np
import torch

import energy
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
    for name in ("vae", "vae-decoder", "judge", "labeller", "clip", "siglip", "sd", "sd3"):
        if (work / f"{name}.pt").exists():
            state = torch.load(work / f"{name}.pt", weights_only=True, map_location="cpu")
            rows.append((name, state["step"], round(state["cpu"] / 60), round(state["seconds"] / 60)))
    table("Training cost (one thread each)", rows, ("model", "steps", "CPU minutes", "minutes"))


def real_scenes(work):
    table("Autoencoder", [("held-out L1, range -1..1", autoencoder.heldout_l1(work))])
    table("Judge on held-out scenes", judge.report(work).items())
    for name in energy.TOWERS:
        areas = energy.report(work, name)
        table(f"Energy {name}: AUROC on held-out scenes",
              [*areas.items(), ("mean", np.mean(list(areas.values()))), ("worst", min(areas.values()))], ("concept", "AUROC"))


def generated(work, name, count, seed=5):
    """How often the judge finds what was asked for, per number of objects."""
    sampler, model, rng, rows = steering.SAMPLERS[name](work), judge.load(work), random.Random(seed), []
    limits = judge.thresholds(model, work)
    for asked in (1, 2):
        objects = np.array([([i % len(OBJECTS)] + [rng.choice([o for o in range(len(OBJECTS)) if o != i % len(OBJECTS)])])[:asked]
                            for i in range(count)])
        texts = [caption([OBJECTS[o] for o in row], rng.choice(list(BACKGROUNDS)), rng) for row in objects]
        images = sampler.many(texts, [seed * 1000 + i for i in range(count)], steps=steering.STEPS, guidance=steering.GUIDANCE)
        found = judge.found(model, images, limits)
        there = torch.stack([found[torch.arange(count), objects[:, k]] for k in range(asked)])
        label = "one object" if asked == 1 else "two objects"
        rows += [(f"{label}: all found", there.all(0).float().mean().item()), (f"{label}: each found", there.float().mean().item())]
        contact_sheet(images[:64], work / f"generated-{name}-{asked}.png")
        if asked == 1:
            misses = {OBJECTS[o] for o, ok in zip(objects[:, 0], there[0]) if not ok}
    table(f"Generator {name}, {count} images each, {steering.STEPS} steps, guidance {steering.GUIDANCE}", rows)
    print("\nmissed at least once alone:", ", ".join(sorted(misses)) or "none")


def clean_estimates(work, name, count, seed=6):
    """AUROC of the energies on decoded clean estimates, per tenth of the schedule: asked targets against the others."""
    texts, objects = steering.prompts(["target"] * (count // 2) + ["benign"] * (count - count // 2), seed)
    asked = label_matrix(objects).bool()[:, -len(TARGETS):].numpy()
    sampler = steering.SAMPLERS[name](work)
    records = {n: steering.Record(energy.Scorer(t(work).load(work)), count) for n, t in energy.TOWERS.items()}

    def observe(t, clean):
        for record in records.values():
            record.add(t, sampler.decode(clean))

    sampler.sample(texts, [seed * 1000 + i for i in range(count)], steering.STEPS, steering.GUIDANCE, observe)
    for tower, record in records.items():
        scores, rows = record.finish().cpu().numpy(), []
        for b in reversed(range(steering.BINS)):
            areas = [auroc(scores[:, b, k], asked[:, k]) for k in range(len(TARGETS)) if asked[:, k].any()]
            rows.append((f"{(b + 1) * 100}-{b * 100}", np.nanmean(areas), np.nanmin(areas)))
        table(f"Energy {tower}: AUROC on decoded clean estimates of {name}, per time bin", rows, ("t", "mean", "worst"))


if __name__ == "__main__":
    args = arguments(__doc__, parts="cost,real,generated,estimates", generators="sd,sd3", images=240)
    names = args.generators.split(",")
    parts = {
        "cost": lambda: cost(args.work),
        "real": lambda: real_scenes(args.work),
        "generated": lambda: [generated(args.work, name, args.images) for name in names],
        "estimates": lambda: [clean_estimates(args.work, name, args.images) for name in names],
    }
    for part in args.parts.split(","):
        parts[part]()
