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

for generator in emojiland-sd emojiland-sd3; do
    "$FAIRLEAD" evaluate -n "$N" --workers 2 --model "$generator" --policy unsteered --negative "$targets" \
        --unsteered "$OUT/$generator-unsteered" --out "$OUT/baseline-negative-prompt-$generator"
done
for strength in $STRENGTHS; do
    pictures=$OUT/pictures-safe-latent-diffusion-$strength
    "$PYTHON" scripts/safe_latent_diffusion.py "$ASSETS/emojiland-sd" \
        "$OUT/baseline-negative-prompt-emojiland-sd/evaluation.json" "$strength" "$pictures"
    "$FAIRLEAD" evaluate -n "$N" --workers 2 --model emojiland-sd --images "$pictures" \
        --unsteered "$OUT/emojiland-sd-unsteered" --out "$OUT/baseline-safe-latent-diffusion-$strength"
done
