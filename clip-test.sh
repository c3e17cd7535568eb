#!/usr/bin/env bash
# Evaluate models; this sets up .venv on first use, then runs `clip-pgs test`:
#   bash clip-test.sh RUN_OR_CHECKPOINT... [--suite SUITE|all] [--datasets demo|paper|FILE] [--data-root DIR]
#   bash clip-test.sh sets [--datasets demo|paper|FILE] [--data-root DIR]
#   bash clip-test.sh report RESULTS... -o DIR
# With several GPUs, or NPROC_PER_NODE processes, the data sets are spread over them.
# All options: clip-pgs test --help
set -euo pipefail
if [[ "${1:-}" == -h || "${1:-}" == --help ]]; then
    sed -n '2,/^set/{/^set/!s/^# //p;}' "$0"
    exit 0
fi

# Chooses the environment, makes one on first use, and leaves its interpreter in PYTHON.
# shellcheck source=scripts/environment.sh
source "$(dirname "${BASH_SOURCE[0]}")/scripts/environment.sh"
exec "$PYTHON" -m clip_pgs.cli test "$@"
