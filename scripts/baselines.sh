#!/bin/sh
# The baselines of EVALUATION.md, on the prompts and the noise of `make evaluate`: a negative prompt that names every target,
# on both generators, and Safe Latent Diffusion at its four strengths on `emojiland-sd`. Continues where it stopped; hours.
# Needs a Python with torch, diffusers and transformers.
#
#     FAIRLEAD_PYTHON=.venv/bin/python scripts/baselines.sh
set -eu
N=${N:-250}
if [ "$N" = 250 ]; then folder=out/evaluation; else folder=out/evaluation-$N; fi
OUT=${OUT:-$folder}
STRENGTHS=${STRENGTHS-weak medium strong max}
PYTHON=${FAIRLEAD_PYTHON:-python3}
FAIRLEAD=${FAIRLEAD:-${CARGO_TARGET_DIR:-target}/release/fairlead}
ASSETS=${FAIRLEAD_ASSETS:-assets}

targets=$("$PYTHON" -c 'import json, sys
print(", ".join(sorted(target["name"] for target in json.load(open(sys.argv[1]))["targets"])))' "$ASSETS/emojiland-objects.json")

number=0
next() { # sets $out to the folder of the next row
    number=$((number + 1))
    out=$OUT/baseline-0$number-$1
}

for generator in emojiland-sd emojiland-sd3; do
    next "negative-prompt-$generator"
    "$FAIRLEAD" evaluate -n "$N" --workers 2 --model "$generator" --policy unsteered --negative "$targets" \
        --unsteered "$OUT/$generator-unsteered" --out "$out"
done
for strength in $STRENGTHS; do
    next "safe-latent-diffusion-$strength"
    pictures=$OUT/pictures-safe-latent-diffusion-$strength
    "$PYTHON" scripts/safe_latent_diffusion.py "$ASSETS/emojiland-sd" \
        "$OUT/baseline-01-negative-prompt-emojiland-sd/evaluation.json" "$strength" "$pictures"
    "$FAIRLEAD" evaluate -n "$N" --workers 2 --model emojiland-sd --images "$pictures" \
        --unsteered "$OUT/emojiland-sd-unsteered" --out "$out"
done
