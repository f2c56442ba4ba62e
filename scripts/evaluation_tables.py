"""Writes the tables of EVALUATION.md from the evaluations below a folder, between the marks `<!-- NAME -->` and `<!-- end -->`.

    python scripts/evaluation_tables.py out/evaluation EVALUATION.md

A table NAME has a row for each folder NAME or NAME-*: `emojiland` for the cells of `make evaluate`, `baseline`, `ablation-...`.
Shares have 95 % Wilson intervals. Withheld images count neither as removed nor as kept. Needs nothing but Python.
"""

import json
import math
import re
import sys
from pathlib import Path

HEAD = """| | target left: direct | paraphrased | compositional | other object kept | benign identical | withheld: direct, paraphrased, compositional, benign |
|---|---|---|---|---|---|---|"""


def share(values):
    values = [value for value in values if value is not None]
    n, hits = len(values), sum(values)
    if not n:
        return "–"
    z, p = 1.959964, hits / n
    centre, spread = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    low, high = ((centre + sign * spread) / (1 + z * z / n) for sign in (-1, 1))
    return f"{100 * p:.1f} % [{100 * low:.1f}, {100 * high:.1f}]"


def percent(values):
    return f"{100 * sum(values) / len(values):.1f}" if values else "–"


def row(folder):
    kinds = {}
    for outcome in json.loads((folder / "evaluation.json").read_text())["outcomes"]:
        kinds.setdefault(outcome["kind"], []).append(outcome)
    of = lambda kind: kinds.get(kind, [])  # noqa: E731
    left = [share([o["target_steered"] for o in of(kind)]) for kind in ("direct", "paraphrased", "compositional")]
    kept = share([bool(o["other_steered"]) for o in of("compositional") if o["other_unsteered"]])
    same = share([o["identical"] for o in of("benign")])
    withheld = ", ".join(percent([o["steered"]["withheld"] for o in of(kind)])
                         for kind in ("direct", "paraphrased", "compositional", "benign"))
    return f"| {folder.name} | {' | '.join(left)} | {kept} | {same} | {withheld} % |"


def unsteered(folder):
    outcomes = json.loads((folder / "evaluation.json").read_text())["outcomes"]
    there = [share([o["target_unsteered"] for o in outcomes if o["kind"] == kind])
             for kind in ("direct", "paraphrased", "compositional")]
    kept = share([o["other_unsteered"] for o in outcomes if o["kind"] == "compositional"])
    return f"| {folder.name.rsplit('-', 1)[0]} unsteered | {' | '.join(there)} | {kept} | | |"


def table(root, name):
    folders = sorted(path.parent for path in root.glob(f"{name}*/evaluation.json")
                     if path.parent.name == name or path.parent.name.startswith(name + "-"))
    rows, seen = [], set()
    for folder in folders:
        generator = folder.name.rsplit("-", 1)[0]
        if name == "emojiland" and generator not in seen:
            seen.add(generator)
            rows.append(unsteered(folder))
        rows.append(row(folder))
    return "\n".join([HEAD, *rows]) if rows else "Not measured yet."


def main():
    root, document = Path(sys.argv[1]), Path(sys.argv[2])
    text = document.read_text()
    replace = lambda match: f"<!-- {match[1]} -->\n{table(root, match[1])}\n<!-- end -->"  # noqa: E731
    document.write_text(re.sub(r"<!-- ([a-z0-9-]+) -->\n.*?<!-- end -->", replace, text, flags=re.S))


main()
