#!/usr/bin/env bash
# Set up .venv, then run every check; arguments go to pytest. Ends non-zero if any check failed.
#   bash scripts/test.sh              all
#   bash scripts/test.sh --fast       without the slow tests, mypy and the site
#   bash scripts/test.sh --coverage   all, and which lines the tests' own processes ran; slower
set -euo pipefail
if [[ "${1:-}" == -h || "${1:-}" == --help ]]; then
    sed -n '2,/^set/{/^set/!s/^# //p;}' "$0"
    exit 0
fi
cd "$(dirname "${BASH_SOURCE[0]}")/.."

bash scripts/setup.sh train,eval,wandb,transformers,dev,docs
export PATH="$PWD/.venv/bin:$PATH"
# A process a core, of one thread each: small tensors do not repay what threads wait for each other.
export OMP_NUM_THREADS=1
# Each process would compile the rewritten tests anew, which takes seconds.
unset PYTHONDONTWRITEBYTECODE
# Files start in the order of tests/conftest.py; of themselves those of few long tests come last.
parallel=(-n logical --maxprocesses 8 --dist loadfile --no-loadscope-reorder)
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

build_site() {
    NO_MKDOCS_2_WARNING=1 python -m mkdocs build --strict --quiet
}

check ruff python -m ruff check .
check format python -m ruff format --check .
check shellcheck lint_shell
if [[ "${1:-}" == --fast ]]; then
    check pytest python -m pytest "${parallel[@]}" -m "not slow" "${@:2}"
else
    check mypy python -m mypy
    check site build_site
    if [[ "${1:-}" == --coverage ]]; then
        set -- --cov "${@:2}"
    fi
    check pytest python -m pytest "${parallel[@]}" "$@"
fi

if [[ -n "$failed" ]]; then
    printf '\nFailed:%s\n' "$failed" >&2
    exit 1
fi
printf '\nAll checks passed.\n'
