#!/usr/bin/env bash
# Compare plain CLIP, random masking and PGS with the same steps and several seeds, then print a
# table of means and 95 % intervals:
#   bash scripts/compare_maskings.sh TRAIN_SHARDS EVAL_LIST EVAL_ROOT
# CONFIG, MASKINGS, SEEDS and JOBS (runs at once, one thread each) come from the environment. A run
# that is finished is kept.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=scripts/environment.sh
source scripts/environment.sh

if (($# != 3)); then
    echo "usage: bash scripts/compare_maskings.sh TRAIN_SHARDS EVAL_LIST EVAL_ROOT" >&2
    exit 2
fi
export PYTHON TRAIN_SHARDS="$1" EVAL_LIST="$2" EVAL_ROOT="$3"
export CONFIG="${CONFIG:-configs/train/vit_xs16_flickr8k.yaml}"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
MASKINGS="${MASKINGS:-none random pgs}"
SEEDS="${SEEDS:-0 1 2}"
JOBS="${JOBS:-1}"

run_one() {
    local masking="$1" seed="$2"
    local name="compare_${masking}_$seed" ratio=()
    if [[ "$masking" != none ]]; then
        ratio=(--mask-ratio 0.5)
    fi
    mkdir -p logs
    if [[ ! -d "logs/$name/export" ]]; then
        "$PYTHON" -m clip_pgs.training --config "$CONFIG" --train-data "$TRAIN_SHARDS" \
            --masking "$masking" "${ratio[@]}" --seed "$seed" --name "$name" --resume latest \
            >"logs/$name.txt" 2>&1
    fi
    if [[ ! -f "logs/$name/eval/results.csv" ]]; then
        "$PYTHON" -m clip_pgs.evaluation "logs/$name" --datasets "$EVAL_LIST" \
            --data-root "$EVAL_ROOT" >>"logs/$name.txt" 2>&1
    fi
    echo "finished $name"
}
export -f run_one

for seed in $SEEDS; do
    for masking in $MASKINGS; do
        echo "$masking $seed"
    done
done | xargs -P "$JOBS" -L 1 bash -c 'set -euo pipefail; run_one "$@"' run_one

# shellcheck disable=SC2086  # a list of names
exec "$PYTHON" scripts/compare_table.py $MASKINGS
