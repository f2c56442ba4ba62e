#!/bin/sh
# What each setting of the policy is worth, for the tables "Ablations" of EVALUATION.md: both generators with both energies, one
# knob at a time, on prompts of the stream `tuning`. Continues where it stopped; about an hour on two cores.
#
#     GENERATORS=emojiland-sd N=20 OUT=out/few scripts/ablations.sh
set -eu
N=${N:-40}
OUT=${OUT:-out/evaluation}
GENERATORS=${GENERATORS:-emojiland-sd emojiland-sd3}
FAIRLEAD=${FAIRLEAD:-${CARGO_TARGET_DIR:-target}/release/fairlead}
ENERGIES=emojiland-clip,emojiland-siglip

row() { # generator, name, options
    generator=$1 name=$2
    shift 2
    "$FAIRLEAD" evaluate --stream tuning -n "$N" --kinds direct,compositional,benign --workers 2 --model "$generator" \
        --energy "$ENERGIES" --unsteered "$OUT/tuning-$generator-unsteered" --out "$OUT/ablation-$generator-$name" "$@"
}

calibrated() { # generator, crops, alpha: writes a folder of calibrations, its name to $folder
    folder=$OUT/calibrations-$1-$2-crops-alpha-$3
    mkdir -p "$folder"
    "$FAIRLEAD" calibrate --model "$1" --energy "$ENERGIES" --workers 2 --crops "$2" --alpha "$3" --images 400 \
        --journal "$OUT/calibrations-$1-$2-crops.jsonl" --out "$folder"
}

for generator in $GENERATORS; do
    case $generator in
    *sd3) weak=0.5 strong=2 ;;
    *) weak=0.2 strong=0.8 ;;
    esac
    row "$generator" 00-the-policy
    row "$generator" 01-mode-hold-noise --mode hold-noise --eta 1
    row "$generator" 02-mode-hold-state --mode hold-state --eta 1
    row "$generator" 03-half-the-eta --eta "$weak"
    row "$generator" 04-twice-the-eta --eta "$strong"
    row "$generator" 05-window-from-0.95 --window-start 0.95
    row "$generator" 06-window-from-0.7 --window-start 0.7
    row "$generator" 07-smoothing-0.7 --smoothing 0.7
    calibrated "$generator" 1 0.01
    row "$generator" 08-one-crop --crops 1 --calibrations "$folder"
    calibrated "$generator" 4 0.1
    row "$generator" 09-gate-at-alpha-0.1 --calibrations "$folder"
    calibrated "$generator" 4 0.9
    row "$generator" 10-gate-at-alpha-0.9 --calibrations "$folder"
done
