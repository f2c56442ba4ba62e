"""Prints the figures of the trained models as Markdown tables; scenes, wordings and seeds tuned nothing."""
import random

import numpy as np
import torch

import energy
import judge
import sd
import sd3
import vae as autoencoder
from captions import caption
from common import arguments, auroc, contact_sheet, trained
from render import HELDOUT_SEED, draw_scenes, labels_of
from words import OBJECTS, TARGETS

SAMPLERS = {"sd": sd.Sampler, "sd3": sd3.Sampler}
STEPS, GUIDANCE, BINS = 25, 4.5, 5
JUDGES = ("judge-cnn", "judge-vit", "judge-mixer")
MODELS = ("vae", "vae-decoder", "sd", "sd3", "clip", "siglip", *JUDGES, "verifier")


def table(title, rows, columns=("figure", "value")):
    print(f"\n### {title}\n\n| " + " | ".join(columns) + " |\n" + "|---" * len(columns) + "|")
    for row in rows:
        print("| " + " | ".join(f"{v:.4f}" if isinstance(v, float) else str(v) for v in row) + " |", flush=True)


def there(work, names):
    return [name for name in names if trained(work / f"{name}.pt")]


def cost(work):
    rows = []
    for name in MODELS:
        if (work / f"{name}.pt").exists():
            state = torch.load(work / f"{name}.pt", weights_only=True, map_location="cpu")
            rows.append((name, state["step"], round(state["cpu"] / 60), round(state["seconds"] / 60)))
    table("Training cost (one thread each)", rows, ("model", "steps", "CPU minutes", "minutes"))


def real(work):
    table("Autoencoder on held-out scenes, range -1..1", autoencoder.heldout(work).items())
    for name in there(work, (*JUDGES, "verifier")):
        table(f"{name} on held-out scenes", judge.report(work, name).items())
    for name in there(work, energy.TOWERS):
        areas = energy.report(work, name)
        table(f"Energy {name}: AUROC on held-out scenes",
              [*areas.items(), ("mean", np.mean(list(areas.values()))), ("worst", min(areas.values()))], ("concept", "AUROC"))


def asked(count, part, seed):
    """Scenes to ask for, captions of them in the forms of `part`, and seeds for the sampler."""
    rng, scenes = random.Random(seed), draw_scenes(count, HELDOUT_SEED + seed)
    return scenes, [caption(scene, rng, part) for scene in scenes], [seed * 10000 + i for i in range(count)]


def generated(work, name, count, part, seed=5):
    """How often each judge, and two of three, find what was asked for."""
    sampler, (scenes, texts, seeds) = SAMPLERS[name](work), asked(count, part, seed)
    images, truth = sampler.many(texts, seeds, steps=STEPS, guidance=GUIDANCE), labels_of(scenes).bool()
    contact_sheet(images[:96], work / f"generated-{name}-{part}.png", 12)
    (work / f"generated-{name}-{part}.txt").write_text("\n".join(texts) + "\n")
    votes = {}
    for one in there(work, JUDGES):
        model = judge.load(work, one)
        votes[one] = judge.found(model, images, judge.thresholds(model, work))
    if not votes:
        return
    votes["most"] = torch.stack(list(votes.values())).float().mean(0) > 0.5
    rows, single = [], truth.sum(1) == 1
    for one, guess in votes.items():
        complete = (guess | ~truth).all(1).float()
        rows.append((one, complete[single].mean().item(), complete[~single].mean().item(), guess[~single][truth[~single]].float().mean().item()))
    table(f"Generator {name}, {count} pictures, forms of {part}", rows, ("judge", "single found", "both found", "each of two found"))


def estimates(work, name, count, seed=6):
    """AUROC of the energies on decoded clean estimates per fifth of the schedule: asked targets against the rest."""
    sampler, (scenes, texts, seeds) = SAMPLERS[name](work), asked(count, "training", seed)
    truth = labels_of(scenes)[:, [OBJECTS.index(t) for t in TARGETS]].bool().cpu().numpy()
    scorers = {n: energy.Scorer(energy.TOWERS[n](work).load(work)) for n in there(work, energy.TOWERS)}
    best = {n: torch.full((count, BINS, len(TARGETS)), -torch.inf) for n in scorers}
    done = 0

    def observe(t, clean):
        rows, b = slice(done, done + len(clean)), min(BINS - 1, t * BINS // 1000)
        for n, scorer in scorers.items():
            best[n][rows, b] = torch.maximum(best[n][rows, b], scorer(sampler.decode(clean)).float().cpu())

    while done < count:
        chunk = slice(done, done + 32)
        sampler.sample(texts[chunk], seeds[chunk], STEPS, GUIDANCE, observe)
        done += len(texts[chunk])
    for n, scores in best.items():
        rows = []
        for b in reversed(range(BINS)):
            areas = [auroc(scores[:, b, k].numpy(), truth[:, k]) for k in range(len(TARGETS)) if truth[:, k].any()]
            rows.append((f"{(b + 1) * 1000 // BINS}-{b * 1000 // BINS}", np.nanmean(areas), np.nanmin(areas)))
        table(f"Energy {n}: AUROC on decoded clean estimates of {name}, per time bin", rows, ("t", "mean", "worst"))


if __name__ == "__main__":
    args = arguments(__doc__, parts="cost,real,generated,estimates", generators="sd,sd3", images=240)
    names = there(args.work, args.generators.split(","))
    parts = {
        "cost": lambda: cost(args.work),
        "real": lambda: real(args.work),
        "generated": lambda: [generated(args.work, name, args.images, part) for name in names for part in ("training", "evaluation")],
        "estimates": lambda: [estimates(args.work, name, args.images) for name in names],
    }
    for part in args.parts.split(","):
        parts[part]()
