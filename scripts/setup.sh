#!/usr/bin/env bash
# Make .venv in the repository root with the package (editable) and the extras that are named:
#   bash scripts/setup.sh [EXTRAS]    such as train,eval (without a word) or train,eval,dev
# Does nothing when they are there. PYTHON=... names the Python that .venv is made from.
# CLIP_PGS_TORCH=cpu takes torch built without CUDA from PyTorch's index, for machines without a GPU.
# One sets up at a time, where there is `flock`; others wait.
set -euo pipefail
if [[ "${1:-}" == -h || "${1:-}" == --help ]]; then
    sed -n '2,/^set/{/^set/!s/^# //p;}' "$0"
    exit 0
fi
cd "$(dirname "${BASH_SOURCE[0]}")/.."

cpu_index=https://download.pytorch.org/whl/cpu
stamp=.venv/clip-pgs-setup
log=.venv/clip-pgs-setup.log

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

# Join two comma-separated lists, without what is in both.
join() {
    local all="$1" word
    for word in ${2//,/ }; do
        if [[ ",$all," != *",$word,"* ]]; then
            all+="${all:+,}$word"
        fi
    done
    printf '%s\n' "$all"
}

if [[ "${CLIP_PGS_TORCH:-cpu}" != cpu ]]; then
    printf "error: CLIP_PGS_TORCH must be cpu or unset, got '%s'\n" "$CLIP_PGS_TORCH" >&2
    exit 2
fi
known=" $(sed -n '/^\[project.optional-dependencies\]/,/^\[tool/s/^\([a-z0-9-]*\) = .*/\1/p' \
    pyproject.toml | tr '\n' ' ')"
IFS=, read -ra named <<<"${1:-train,eval}"
for word in "${named[@]}" "${@:2}"; do
    if [[ $# -gt 1 || "$known" != *" $word "* ]]; then
        printf "error: EXTRAS must be of%s, joined by commas, got '%s'\n" "${known% }" "$*" >&2
        exit 2
    fi
done
exec 9<scripts/constraints.txt
if command -v flock >/dev/null && ! flock -n 9; then
    echo "Waiting for another setup of .venv here."
    # A file system without locks goes on without.
    flock 9 || true
fi
# The root is part of it: an editable install points at the folder it was made in.
recipe="$({ pwd && cat pyproject.toml scripts/constraints.txt; } | cksum)"
state="" there=""
if [[ -f "$stamp" ]]; then
    { read -r state && read -r there; } <"$stamp" || true
fi
extras="$(join "$there" "${1:-train,eval}")"
runs=false
if .venv/bin/python -c "" 2>/dev/null; then
    runs=true
fi
if [[ "$runs" == true && "$state" == "$recipe" && "$extras" == "$there" ]]; then
    exit 0
fi

python="$(find_python)"
if [[ "$state" == unfinished || ("$runs" == false && -n "$state") ]]; then
    echo "The .venv here was interrupted or has lost its Python; making it anew."
    rm -rf .venv
fi
source=()
size="5.9 GB of disk on Linux (CLIP_PGS_TORCH=cpu: 2 GB)"
if [[ "${CLIP_PGS_TORCH:-}" == cpu ]]; then
    if "$python" -c 'import sys, urllib.request as r; r.urlopen(sys.argv[1], timeout=20)' \
        "$cpu_index/torch/" 2>/dev/null; then
        source=(--extra-index-url "$cpu_index")
        size="2 GB of disk"
    else
        echo "$cpu_index cannot be reached, so torch comes from the usual index."
    fi
fi
echo "Setting up .venv with $extras, once: up to $size; this takes minutes."
mkdir -p .venv
echo unfinished >"$stamp"
if ! .venv/bin/python -m pip --version >/dev/null 2>&1; then
    "$python" -m venv .venv
fi
echo "Installing; pip's lines go to $log."
export PIP_DISABLE_PIP_VERSION_CHECK=1
if ! .venv/bin/python -m pip install --constraint scripts/constraints.txt "${source[@]}" \
    --editable ".[$extras]" >"$log" 2>&1; then
    tail -n 20 "$log" >&2
    echo "error: the packages could not be installed; pip says why above, and in $log." >&2
    exit 1
fi
printf '%s\n' "$recipe" "$extras" >"$stamp"
echo "Ready: .venv holds clip-pgs with $extras."
