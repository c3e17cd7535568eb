"""A clone in which scripts can set up, train and submit without doing the real thing."""

from __future__ import annotations

import shutil

import pytest

from support.scripts import ROOT, STUB_PYTHON, write_executable


@pytest.fixture
def clone(tmp_path):
    """A copy of what setup.sh reads, in a folder with a space."""
    root = tmp_path / "a clone"
    (root / "scripts").mkdir(parents=True)
    for name in ("setup.sh", "environment.sh", "constraints.txt", "slurm_train.sh"):
        shutil.copy(ROOT / "scripts" / name, root / "scripts")
    shutil.copy(ROOT / "pyproject.toml", root)
    write_executable(tmp_path / "stub" / "python3", STUB_PYTHON)
    return root
