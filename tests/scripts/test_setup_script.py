"""scripts/setup.sh and scripts/environment.sh, with a stub for Python and pip."""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from support.scripts import ENVIRONMENT, ROOT, STUB_PYTHON, run, write_executable


def set_up(clone, *extras, **environment):
    stub = str(clone.parent / "stub" / "python3")
    script = clone / "scripts" / "setup.sh"
    return run(script, *extras, cwd=clone.parent, PYTHON=stub, **environment)


def installations(clone):
    return (clone / "pip.log").read_text().splitlines()


def test_setup_makes_an_environment_once_and_says_its_size_before(clone):
    first, second = set_up(clone), set_up(clone)
    assert (first.returncode, second.returncode) == (0, 0), first.stderr
    assert "GB" in first.stdout.splitlines()[0]
    assert len(first.stdout.splitlines()) <= 4
    assert second.stdout == ""
    (command,) = installations(clone)
    assert command.endswith("--constraint scripts/constraints.txt --editable .[train,eval]")


def test_setup_waits_for_another_and_takes_what_it_made(clone):
    assert set_up(clone).returncode == 0
    stamp = clone / ".venv" / "clip-pgs-setup"
    made = stamp.read_text()
    stamp.write_text("unfinished")
    with (clone / "scripts" / "constraints.txt").open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        command = ["bash", str(clone / "scripts" / "setup.sh")]
        options = {"cwd": clone, "env": ENVIRONMENT, "text": True, "stdout": subprocess.PIPE}
        with subprocess.Popen(command, **options) as second:
            assert second.stdout.readline().startswith("Waiting")
            stamp.write_text(made)
            fcntl.flock(lock, fcntl.LOCK_UN)
            assert second.communicate()[0] == ""
    assert second.returncode == 0
    assert len(installations(clone)) == 1


@pytest.mark.parametrize("script", ["scripts/setup.sh", "scripts/test.sh", "clip-test.sh"])
@pytest.mark.parametrize("flag", ["-h", "--help"])
def test_help_sets_nothing_up(clone, script, flag):
    shutil.copy(ROOT / script, clone / script)
    done = run(clone / script, flag, cwd=clone.parent)
    assert (done.returncode, done.stderr) == (0, "")
    assert f"bash {script} " in done.stdout
    assert not (clone / ".venv").exists()


def test_setup_adds_the_extras_that_are_not_there(clone):
    for extras in ("train", "train,dev", "dev", "train"):
        assert set_up(clone, extras).returncode == 0
    named = [command.rpartition(".")[2] for command in installations(clone)]
    assert named == ["[train]", "[train,dev]"]


def test_setup_takes_torch_without_cuda_where_that_is_asked_for(clone):
    assert set_up(clone, CLIP_PGS_TORCH="cpu").returncode == 0
    (command,) = installations(clone)
    assert "--extra-index-url https://download.pytorch.org/whl/cpu --editable" in command


def test_setup_goes_on_with_the_usual_torch_where_the_index_cannot_be_reached(clone):
    stub = clone.parent / "stub" / "python3"
    write_executable(stub, STUB_PYTHON.replace("exit 0", '[[ "$2" != *urlopen* ]]; exit', 1))
    done = set_up(clone, CLIP_PGS_TORCH="cpu")
    assert done.returncode == 0
    assert "cannot be reached" in done.stdout
    (command,) = installations(clone)
    assert "--extra-index-url" not in command


def test_setup_refuses_another_torch_before_it_makes_anything(clone):
    done = set_up(clone, CLIP_PGS_TORCH="gpu")
    assert done.returncode == 2
    assert done.stderr == "error: CLIP_PGS_TORCH must be cpu or unset, got 'gpu'\n"
    assert not (clone / ".venv").exists()


@pytest.mark.parametrize(
    "extras", [["nosuchextra"], ["train,nosuch"], ["train", "eval"], ["tr*"], [","], ["train "]]
)
def test_setup_refuses_an_unknown_extra_before_it_makes_anything(clone, extras):
    done = set_up(clone, *extras)
    assert done.returncode == 2
    assert done.stderr.startswith("error: EXTRAS must be of all train ")
    assert done.stderr.endswith(f" dev, joined by commas, got '{' '.join(extras)}'\n")
    assert not (clone / ".venv").exists()


def test_setup_takes_every_extra(clone):
    tomllib = pytest.importorskip("tomllib")
    every = tomllib.loads((clone / "pyproject.toml").read_text())["project"]
    names = ",".join(every["optional-dependencies"])
    assert set_up(clone, names).returncode == 0
    assert installations(clone)[0].endswith(f"[{names}]")


def test_pips_lines_are_shown_when_it_fails(clone):
    failed = set_up(clone, PIP_EXIT="1", PIP_SAYS="no such package")
    assert failed.returncode == 1
    assert "no such package" in failed.stderr
    assert "no such package" not in set_up(clone, PIP_SAYS="no such package").stdout


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
