# shellcheck shell=bash
# Sourced by the launchers and scripts. Leaves PYTHON: that of the active environment where it has
# this package and the extras for training and evaluation, else that of .venv, set up or brought up
# to date.

# End with a sentence and the exit code of bad input.
refuse() {
    printf 'error: %s\n' "$1" >&2
    exit 2
}

# Refuse the variables that are no whole number of at least 1.
require_counts() {
    local name
    for name in "$@"; do
        if [[ ! "${!name}" =~ ^[1-9][0-9]*$ ]]; then
            refuse "$name must be a whole number above 0, got '${!name}'"
        fi
    done
}

# Set NPROC_PER_NODE, where it is not set, to the number of GPUs of this machine, or 1.
count_processes() {
    if [[ -z "${NPROC_PER_NODE:-}" ]]; then
        NPROC_PER_NODE=1
        # Starting torch takes seconds, so that it is asked only where there may be a GPU at all.
        if command -v nvidia-smi >/dev/null || command -v rocm-smi >/dev/null ||
            [[ -e /dev/nvidiactl || -e /dev/kfd ]]; then
            NPROC_PER_NODE="$("$PYTHON" -c \
                'import torch; print(max(1, torch.cuda.device_count()))')"
        fi
    fi
    require_counts NPROC_PER_NODE
}

# Share the cores out among the processes: torchrun gives each of several one thread unless told.
share_cores() {
    local cores threads
    cores="$(nproc 2>/dev/null || getconf _NPROCESSORS_ONLN)"
    threads=$((cores / NPROC_PER_NODE))
    export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$((threads > 0 ? threads : 1))}"
}

has_the_package() {
    "$1" -c '
import re
import sys
from importlib.metadata import PackageNotFoundError, requires, version

try:
    for requirement in requires("clip-pgs"):
        if re.search("extra == .(training|eval)", requirement):
            version(re.match(r"[\w.-]+", requirement)[0])
except PackageNotFoundError:
    sys.exit(1)
' 2>/dev/null
}

pick_python() {
    local root name candidate
    root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
    for name in python python3; do
        candidate="$(command -v "$name" || true)"
        # An active .venv of our own may be out of date, so it takes the way past setup.sh.
        if [[ -n "$candidate" && ! "$(dirname "$candidate")" -ef "$root/.venv/bin" ]] &&
            has_the_package "$candidate"; then
            PYTHON="$candidate"
            return
        fi
    done
    bash "$root/scripts/setup.sh"
    # shellcheck disable=SC2034  # It is what the script that sources this reads.
    PYTHON="$root/.venv/bin/python"
}

pick_python
