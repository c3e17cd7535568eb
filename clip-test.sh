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

count_processes
case "${1:-}" in
sets | report | -h | --help | "")
    NPROC_PER_NODE=1
    ;;
esac
if ((NPROC_PER_NODE == 1)); then
    exec "$PYTHON" -m clip_pgs.evaluation "$@"
fi

share_cores

# torchrun makes 1 of every exit code but 0, below pages of its own.
exit_code_file="$(mktemp)"
trap 'rm -f "$exit_code_file"' EXIT
"$PYTHON" -m torch.distributed.run --standalone --nproc-per-node "$NPROC_PER_NODE" \
    -m -- clip_pgs.evaluation "$@" --exit-code-file "$exit_code_file"
exit "$(cat "$exit_code_file")"
