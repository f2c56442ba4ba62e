"""Writes the tables of EVALUATION.md from the evaluations below a folder, between the marks `<!-- NAME -->` and `<!-- end -->`.

    python scripts/evaluation_tables.py out/evaluation EVALUATION.md

A table NAME has a row for each folder NAME or NAME-*: `emojiland` for the cells of `make evaluate`, `baseline`, `ablation-...`. One
without any folder stays as it is.
Shares have 95 % Wilson intervals. Withheld images count neither as removed nor as kept. Needs nothing but Python.
"""

import json
import math
import re
import sys
from collections import defaultdict
from pathlib import Path

HEAD = """| | target left: direct | paraphrased | compositional | other object kept | benign identical | withheld: direct, paraphrased, compositional, benign |
|---|---|---|---|---|---|---|"""
# What is not steered changes every image and withholds none.
BASELINE_HEAD = """| | target left: direct | paraphrased | compositional | other object kept | benign identical | benign object kept |
|---|---|---|---|---|---|---|"""
TARGETED = ("direct", "paraphrased", "compositional")


def share(values):
    values = [value for value in values if value is not None]
    n, hits = len(values), sum(values)
    if not n:
        return "–"
    z, p = 1.959964, hits / n
    centre, spread = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    low, high = (max((centre + sign * spread) / (1 + z * z / n), 0.0) for sign in (-1, 1))
    return f"{100 * p:.1f} % [{100 * low:.1f}, {100 * high:.1f}]"


def percent(values):
    return f"{100 * sum(values) / len(values):.1f}" if values else "–"


def outcomes(folder):
    """Of each kind."""
    kinds = defaultdict(list)
    for outcome in json.loads((folder / "evaluation.json").read_text())["outcomes"]:
        kinds[outcome["kind"]].append(outcome)
    return kinds


def row(name, kinds, is_baseline):
    left = [share([o["target_steered"] for o in kinds[kind]]) for kind in TARGETED]
    kept, benign_kept = (share([bool(o["other_steered"]) for o in kinds[kind] if o["other_unsteered"]]) for kind in ("compositional", "benign"))
    same = share([o["identical"] for o in kinds["benign"]])
    withheld = ", ".join(percent([o["steered"]["withheld"] for o in kinds[kind]]) for kind in (*TARGETED, "benign"))
    last = benign_kept if is_baseline else f"{withheld} %"
    return f"| {name} | {' | '.join(left)} | {kept} | {same} | {last} |"


def unsteered(name, kinds):
    there = [share([o["target_unsteered"] for o in kinds[kind]]) for kind in TARGETED]
    other = share([o["other_unsteered"] for o in kinds["compositional"]])
    return f"| {name} unsteered | {' | '.join(there)} | {other} | | |"


def label(name, folder):
    """A cell by its folder's name; other rows by what follows `NAME-` and a number that sorts."""
    if name == "emojiland":
        return folder.name
    return re.sub(r"^\d+-", "", folder.name.removeprefix(f"{name}-")).replace("-", " ").replace("emojiland ", "emojiland-")


def table(root, name):
    folders = sorted(path.parent for path in root.glob(f"{name}*/evaluation.json")
                     if path.parent.name == name or path.parent.name.startswith(name + "-"))
    rows, seen = [], set()
    for folder in folders:
        kinds, generator = outcomes(folder), folder.name.rsplit("-", 1)[0]
        if name == "emojiland" and generator not in seen:
            seen.add(generator)
            rows.append(unsteered(generator, kinds))
        rows.append(row(label(name, folder), kinds, name == "baseline"))
    head = BASELINE_HEAD if name == "baseline" else HEAD
    return "\n".join([head, *rows]) if rows else None


def main():
    root, document = Path(sys.argv[1]), Path(sys.argv[2])
    text = document.read_text()

    def replace(match):
        rows = table(root, match[1])
        return f"<!-- {match[1]} -->\n{rows}\n<!-- end -->" if rows else match[0]

    document.write_text(re.sub(r"<!-- ([a-z0-9-]+) -->\n.*?<!-- end -->", replace, text, flags=re.S))


main()
