#!/usr/bin/env bash
# Evaluate models with clip_benchmark:
#   bash clip-test.sh RUN_OR_CHECKPOINT... [--suite SUITE] [--datasets demo|paper|FILE] [--data-root DIR]
# All options: bash clip-test.sh --help
set -euo pipefail

here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
# Chooses the environment, makes one on first use, and leaves its interpreter in PYTHON.
# shellcheck source=scripts/environment.sh
source "$here/scripts/environment.sh"

exec "$PYTHON" -m clip_pgs.evaluation "$@"
