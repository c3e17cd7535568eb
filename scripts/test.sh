#!/usr/bin/env bash
# Set up .venv, then run every check; arguments go to pytest. Ends non-zero if any check failed.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

bash scripts/setup.sh
export PATH="$PWD/.venv/bin:$PATH"
failed=""

check() {
    local name="$1"
    shift
    printf '\n== %s\n' "$name"
    if ! "$@"; then
        failed+=" $name"
    fi
}

lint_shell() {
    find . -path ./.venv -prune -o -name '*.sh' -print0 | xargs -0 shellcheck -x .ci/run
}

check ruff python -m ruff check .
check format python -m ruff format --check .
check mypy python -m mypy
check shellcheck lint_shell
check pytest python -m pytest "$@"

if [[ -n "$failed" ]]; then
    printf '\nFailed:%s\n' "$failed" >&2
    exit 1
fi
printf '\nAll checks passed.\n'
