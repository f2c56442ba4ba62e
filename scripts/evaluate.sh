#!/bin/sh
# The cells of EVALUATION.md: each embedded generator with CLIP, SigLIP and both, every concept active, on prompts and
# seeds that tuned and calibrated nothing. Continues where it stopped. All of it takes hours; a few cells or fewer images:
#
#     scripts/evaluate.sh                                   everything, 250 prompts of each kind
#     CELLS=emojiland-sd-clip N=20 scripts/evaluate.sh      one cell, a few minutes
set -eu
N=${N:-250}
# A folder holds the prompts of one number.
if [ "$N" = 250 ]; then folder=out/evaluation; else folder=out/evaluation-$N; fi
OUT=${OUT:-$folder}
CELLS=${CELLS:-emojiland-sd-both emojiland-sd3-both emojiland-sd-clip emojiland-sd3-clip emojiland-sd-siglip emojiland-sd3-siglip}
FAIRLEAD=${FAIRLEAD:-${CARGO_TARGET_DIR:-target}/release/fairlead}

for cell in $CELLS; do
    generator=${cell%-*}
    case ${cell##*-} in
    clip | siglip) energy=emojiland-${cell##*-} ;;
    both) energy=emojiland-clip,emojiland-siglip ;;
    *) echo "no cell $cell; a cell is GENERATOR-clip, GENERATOR-siglip or GENERATOR-both" >&2; exit 2 ;;
    esac
    "$FAIRLEAD" evaluate -n "$N" --workers 2 --model "$generator" --energy "$energy" \
        --unsteered "$OUT/$generator-unsteered" --out "$OUT/$cell"
done
