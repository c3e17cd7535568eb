# shellcheck shell=bash
# Sourced by the launchers and scripts. Leaves PYTHON: that of the active environment where it has
# this package and the extras for training and evaluation, else that of .venv, set up or brought up
# to date.

has_the_package() {
    "$1" -c '
import re
import sys
from importlib.metadata import PackageNotFoundError, requires, version

try:
    for requirement in requires("clip-pgs"):
        if re.search("extra == .(train|eval)", requirement):
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
    bash "$root/scripts/setup.sh" train,eval
    # shellcheck disable=SC2034  # It is what the script that sources this reads.
    PYTHON="$root/.venv/bin/python"
}

pick_python
