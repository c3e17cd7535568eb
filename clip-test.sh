#!/usr/bin/env bash
# Evaluate models:
#   bash clip-test.sh RUN_OR_CHECKPOINT... [--suite SUITE|all] [--datasets demo|paper|FILE] [--data-root DIR]
#   bash clip-test.sh sets [--datasets demo|paper|FILE] [--data-root DIR]
#   bash clip-test.sh report RESULTS... -o DIR
# With several GPUs, or NPROC_PER_NODE processes, the data sets are spread over them.
# All options: bash clip-test.sh --help
set -euo pipefail

here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
# Chooses the environment, makes one on first use, and leaves its interpreter in PYTHON.
# shellcheck source=scripts/environment.sh
source "$here/scripts/environment.sh"

if [[ -z "${NPROC_PER_NODE:-}" ]]; then
    NPROC_PER_NODE=1
    # Starting torch takes seconds, so that it is asked only where there is a GPU at all.
    if command -v nvidia-smi >/dev/null || command -v rocm-smi >/dev/null; then
        count_gpus='import torch; print(max(1, torch.cuda.device_count()))'
        NPROC_PER_NODE="$("$PYTHON" -c "$count_gpus")"
    fi
fi
if [[ ! "$NPROC_PER_NODE" =~ ^[1-9][0-9]*$ ]]; then
    printf "error: NPROC_PER_NODE must be a whole number above 0, got '%s'\n" "$NPROC_PER_NODE" >&2
    exit 2
fi

case "${1:-}" in
sets | report | -h | --help | "")
    NPROC_PER_NODE=1
    ;;
esac
if ((NPROC_PER_NODE == 1)); then
    exec "$PYTHON" -m clip_pgs.evaluation "$@"
fi

cores="$(nproc 2>/dev/null || getconf _NPROCESSORS_ONLN)"
threads=$((cores / NPROC_PER_NODE))
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$((threads > 0 ? threads : 1))}"

# torchrun makes 1 of every exit code but 0, below pages of its own.
exit_code_file="$(mktemp)"
trap 'rm -f "$exit_code_file"' EXIT
"$PYTHON" -m torch.distributed.run --standalone --nproc-per-node "$NPROC_PER_NODE" \
    -m -- clip_pgs.evaluation "$@" --exit-code-file "$exit_code_file"
exit "$(cat "$exit_code_file")"
