#!/usr/bin/env bash
# Make .venv in the repository root with the package (editable) and all its extras.
# Does nothing when nothing changed. PYTHON=... names the Python it is made from.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

find_python() {
    local candidates=(python3 python python3.13 python3.12 python3.11 python3.10)
    local candidate
    if [[ -n "${PYTHON:-}" ]]; then
        candidates=("$PYTHON")
    fi
    for candidate in "${candidates[@]}"; do
        if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; then
            printf '%s\n' "$candidate"
            return
        fi
    done
    printf 'error: Python 3.10 or newer is needed, and none of these is: %s\n' "${candidates[*]}" >&2
    return 1
}

# The root is part of it: an editable install points at the folder it was made in.
recipe="$({ pwd && cat pyproject.toml scripts/constraints.txt; } | cksum)"
stamp=.venv/clip-pgs-setup
state=""
if [[ -f "$stamp" ]]; then
    state="$(<"$stamp")"
fi
if [[ "$state" == "$recipe" ]] && .venv/bin/python -c "" 2>/dev/null; then
    exit 0
fi

python="$(find_python)"
if [[ "$state" == unfinished || "$state" == "$recipe" ]]; then
    echo "The .venv here was interrupted or has lost its Python; making it anew."
    rm -rf .venv
fi
echo "Setting up .venv: torch and the rest, once, several GB on Linux; this takes minutes."
mkdir -p .venv
echo unfinished >"$stamp"
if ! .venv/bin/python -m pip --version >/dev/null 2>&1; then
    "$python" -m venv .venv
fi
export PIP_DISABLE_PIP_VERSION_CHECK=1
if ! .venv/bin/python -m pip install --constraint scripts/constraints.txt \
    --editable ".[training,eval,dev]"; then
    echo "error: the packages could not be installed; pip says why above." >&2
    exit 1
fi
printf '%s\n' "$recipe" >"$stamp"
echo "Ready: .venv holds clip-pgs and everything it needs."
