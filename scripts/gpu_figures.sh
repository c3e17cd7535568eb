#!/usr/bin/env bash
# Measure on one GPU what docs/speed.md has no figures of: bash scripts/gpu_figures.sh OUT [OPTIONS]
# Under eight minutes on an H100 or H200; called again, it goes on with what is missing.
# Nothing is downloaded or installed: PYTHON (default: python) must have the packages of the extra `train`.
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
PYTHONPATH="$root/src${PYTHONPATH:+:$PYTHONPATH}" exec "${PYTHON:-python}" "$root/scripts/gpu_figures.py" "$@"
