"""Shell scripts as processes, and stubs in the place of what takes minutes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
_KEPT = ("HOME", "LANG", "TMPDIR", "PYTHONPATH")
# The environment that runs the tests, active; not the one that made the variables of a launcher.
ENVIRONMENT = {
    **{name: os.environ[name] for name in _KEPT if name in os.environ},
    "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    "OMP_NUM_THREADS": "1",
}


def run(script, *arguments, cwd, timeout=400, **environment):
    return subprocess.run(
        ["bash", str(script), *map(str, arguments)],
        cwd=cwd,
        env={**ENVIRONMENT, **environment},
        capture_output=True,
        text=True,
        timeout=timeout,
    )


def write_executable(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)


# A Python that makes environments of itself and writes down what pip is told.
STUB_PYTHON = """#!/usr/bin/env bash
case "$1 $2" in
"-c "*) exit 0 ;;
"-m venv") mkdir -p "$3/bin" && cp "$0" "$3/bin/python" ;;
"-m pip")
    [[ "$3" == install ]] || exit 0
    echo "$@" >>pip.log
    echo "${PIP_SAYS:-}"
    exit "${PIP_EXIT:-0}"
    ;;
esac
"""
