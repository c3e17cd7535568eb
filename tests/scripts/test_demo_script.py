"""scripts/demo.sh, with a stub for what trains and evaluates."""

from __future__ import annotations

import os
import shutil

import pytest

from support.scripts import ROOT, run, write_executable

# Leaves behind what each part of the demo would, and writes down its arguments.
STUB_DEMO = """#!/usr/bin/env bash
if [[ "$1" == -c ]]; then exit 0; fi
echo "$2 ${*:3}" >>calls.log
case "$2 $*" in
*--check-only*) ;;
clip_pgs.training*) mkdir -p logs/demo/export ;;
clip_pgs.evaluation*) echo "the table" ;;
clip_pgs.inspection*) touch logs/demo/pgs_keeps.png ;;
esac
"""


@pytest.fixture
def demo(clone):
    """Run `clip-train.sh` in a clone, and return its output and the modules that it ran."""
    for name in ("clip-train.sh", "clip-test.sh", "scripts/demo.sh"):
        shutil.copy(ROOT / name, clone / name)
    stub = clone.parent / "stub"
    write_executable(stub / "python", STUB_DEMO)

    def run_demo(*arguments):
        calls = clone / "calls.log"
        calls.write_text("")
        path = f"{stub}:{os.environ['PATH']}"
        done = run(clone / "clip-train.sh", *arguments, cwd=clone.parent, PATH=path)
        assert done.returncode == 0, done.stderr
        return done.stdout, calls.read_text().splitlines()

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
