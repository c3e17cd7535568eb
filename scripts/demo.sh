#!/usr/bin/env bash
# The demo in this folder: `bash clip-train.sh` runs it, as `clip-pgs demo` does elsewhere.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=scripts/environment.sh
source scripts/environment.sh
exec "$PYTHON" -m clip_pgs.cli demo "$@"
