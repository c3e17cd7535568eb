"""scripts/setup.sh and scripts/environment.sh, with a stub for Python and pip."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

import pytest

from support.scripts import STUB_PYTHON, run, write_executable


def set_up(clone, **environment):
    stub = clone.parent / "stub" / "python3"
    return run(clone / "scripts" / "setup.sh", cwd=clone.parent, PYTHON=str(stub), **environment)


def installations(clone):
    return (clone / "pip.log").read_text().splitlines()


def test_setup_makes_an_environment_with_all_extras_once(clone):
    first, second = set_up(clone), set_up(clone)
    assert (first.returncode, second.returncode) == (0, 0), first.stderr
    assert "takes minutes" in first.stdout
    assert second.stdout == ""
    (command,) = installations(clone)
    assert command.endswith("--constraint scripts/constraints.txt --editable .[training,eval,dev]")


@pytest.mark.parametrize("name", ["pyproject.toml", "scripts/constraints.txt"])
def test_setup_installs_again_when_the_requirements_change(clone, name):
    set_up(clone)
    (clone / ".venv" / "kept").touch()
    with (clone / name).open("a") as file:
        file.write("# changed\n")
    assert set_up(clone).returncode == 0
    assert len(installations(clone)) == 2
    assert (clone / ".venv" / "kept").exists()


def test_setup_starts_over_after_it_was_broken_off(clone):
    failed = set_up(clone, PIP_EXIT="1")
    assert failed.returncode == 1
    assert "error: the packages could not be installed" in failed.stderr
    (clone / ".venv" / "half a package").touch()
    done = set_up(clone)
    assert done.returncode == 0
    assert "making it anew" in done.stdout
    assert not (clone / ".venv" / "half a package").exists()


def test_setup_makes_a_new_environment_when_the_old_one_lost_its_python(clone):
    set_up(clone)
    (clone / ".venv" / "bin" / "python").unlink()
    assert set_up(clone).returncode == 0
    assert (clone / ".venv" / "bin" / "python").exists()


def test_setup_refuses_an_old_python_in_one_sentence(clone):
    old = clone.parent / "old python"
    write_executable(old, "#!/usr/bin/env bash\nexit 1\n")
    done = run(clone / "scripts" / "setup.sh", cwd=clone, PYTHON=str(old))
    assert done.returncode == 1
    assert done.stderr == (f"error: Python 3.10 or newer is needed, and none of these is: {old}\n")
    assert not (clone / ".venv").exists()


def picked_python(clone, **environment):
    script = clone.parent / "print_python.sh"
    script.write_text(f'source "{clone}/scripts/environment.sh"\necho "$PYTHON"\n')
    done = run(script, cwd=clone.parent, **environment)
    assert done.returncode == 0, done.stderr
    return Path(done.stdout.splitlines()[-1])


def test_an_active_environment_that_has_the_package_is_used_as_it_is(clone):
    python = picked_python(clone)
    assert python.parent == Path(sys.executable).parent
    assert not (clone / ".venv").exists()


def test_an_active_environment_without_the_package_gives_way_to_venv(clone):
    # `python` and `python3` fail to find the package, and are good enough to make .venv.
    stub = clone.parent / "stub"
    write_executable(stub / "python3", STUB_PYTHON.replace("exit 0", '[[ "$2" != *requires* ]]', 1))
    shutil.copy(stub / "python3", stub / "python")
    python = picked_python(clone, PATH=f"{stub}:{os.environ['PATH']}")
    assert python == clone / ".venv" / "bin" / "python"
    assert len(installations(clone)) == 1
