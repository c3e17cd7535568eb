"""scripts/demo.sh, with a stub for what trains and evaluates."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import sys

import pytest

from support.scripts import ROOT, run, write_executable

# Leaves behind what each part of the demo would, and writes down its arguments.
STUB_DEMO = """#!/usr/bin/env bash
if [[ "$1" == -c ]]; then exec PYTHON "$@"; fi
echo "$2 ${*:3}" >>calls.log
case "$2 $*" in
*--check-only*) ;;
clip_pgs.training*) mkdir -p logs/demo/export ;;
clip_pgs.evaluation*) echo "the table" ;;
clip_pgs.inspection*) touch logs/demo/pgs_keeps.png ;;
esac
""".replace("PYTHON", sys.executable)


@pytest.fixture
def demo(clone):
    """Run `clip-train.sh` in a clone, and return its output and the modules that it ran."""
    for name in ("clip-train.sh", "clip-test.sh", "scripts/demo.sh"):
        shutil.copy(ROOT / name, clone / name)
    stub = clone.parent / "stub"
    write_executable(stub / "python", STUB_DEMO)

    def run_demo(*arguments, code=0):
        calls = clone / "calls.log"
        calls.write_text("")
        path = f"{stub}:{os.environ['PATH']}"
        done = run(clone / "clip-train.sh", *arguments, cwd=clone.parent, PATH=path)
        assert done.returncode == code, done.stderr
        return done.stderr if code else done.stdout, calls.read_text().splitlines()

    return run_demo


def modules(calls):
    return [call.split()[0].removeprefix("clip_pgs.") for call in calls]


def test_the_demo_makes_data_trains_evaluates_and_draws(demo):
    output, calls = demo()
    assert modules(calls) == ["data", "training", "evaluation", "inspection"]
    assert "the table" in output
    assert "logs/demo/pgs_keeps.png" in output


def test_the_demo_shows_a_finished_result_without_doing_it_again(demo):
    first, _ = demo()
    second, calls = demo()
    assert modules(calls) == ["data"]
    assert "the table" in second
    assert second.splitlines()[-6:] == first.splitlines()[-6:]


def test_the_demo_continues_an_unfinished_run(demo, clone):
    demo()
    shutil.rmtree(clone / "logs" / "demo" / "export")
    (clone / "logs" / "demo" / "checkpoints").mkdir()
    _, calls = demo()
    assert modules(calls) == ["data", "training", "evaluation", "inspection"]
    assert calls[1].endswith("--name demo --resume latest")
    assert (clone / "logs" / "demo" / "checkpoints").exists()


def test_a_fresh_demo_replaces_its_run_alone_and_passes_flags_on(demo, clone):
    demo()
    for kept in ("logs/demo/old", "logs/another"):
        (clone / kept).mkdir()
    _, calls = demo("--fresh", "--epochs", "1")
    assert modules(calls) == ["data", "training", "training", "evaluation", "inspection"]
    assert "--check-only" in calls[1]
    assert "--epochs 1" in calls[2]
    assert not (clone / "logs" / "demo" / "old").exists()
    assert (clone / "logs" / "another").exists()


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("holder", [{"process": 7, "host": "here"}, "", [], {"process": 7}])
def test_a_run_that_is_being_trained_is_not_removed(demo, clone, holder):
    demo()
    run_folder = clone / "logs" / "demo"
    with (run_folder / ".lock").open("w") as lock:
        json.dump(holder, lock)
        lock.flush()
        # Reading the file would let go of the lock, which is the process's.
        before = contents(run_folder)
        fcntl.lockf(lock, fcntl.LOCK_EX)
        error, calls = demo("--fresh", code=2)
        assert contents(run_folder) == before
    assert error.startswith("error: logs/demo is being trained by ")
    assert error.count("\n") == 1
    assert calls == []
    # What a run leaves behind that has ended, or was killed, holds nothing.
    demo("--fresh")


@pytest.mark.parametrize("arguments", [[], ["--fresh"]])
def test_a_second_demo_in_one_folder_is_refused(demo, clone, arguments):
    demo()
    folder = os.open(clone, os.O_RDONLY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)
        before = contents(clone / "logs")
        error, calls = demo(*arguments, code=2)
        assert contents(clone / "logs") == before
    finally:
        os.close(folder)
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert calls == []
    demo()


@pytest.mark.parametrize("flag", ["--help", "--check-only"])
def test_asking_what_a_fresh_demo_would_do_removes_nothing(demo, clone, flag):
    demo()
    before = contents(clone / "logs")
    _, calls = demo("--fresh", "--epochs", "1", flag)
    assert modules(calls) == ["training"]
    assert contents(clone / "logs") == before
