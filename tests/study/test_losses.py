"""What a finished study does where a part of it was lost; no run is trained here."""

import json
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from clip_pgs.study import runner
from clip_pgs.study.__main__ import main
from clip_pgs.study.record import read_code
from support.studies import fill

SCORES = {"random": [0.30, 0.32], "pgs": [0.35, 0.36]}
EXPORT = "export/open_clip_model.safetensors"


@pytest.fixture
def finished(study):
    """A study of four runs that are done, as far as its files say; a test may change it."""
    study.change(arms={arm: {"train": {"masking": arm}} for arm in SCORES})
    fill(study, SCORES, code=read_code().evaluation)
    for run in study.study.glob("*/seed_*"):
        (run / "exit.json").write_text('{"code": 0}')
        write_export(run)
    return study


def write_export(run):
    (run / "export").mkdir(exist_ok=True)
    save_file({"weight": torch.zeros(8)}, run / EXPORT)


@pytest.fixture
def started(finished, tmp_path, monkeypatch):
    """The commands and runs of what a study starts, which do at once what they would."""
    calls = []
    shutil.copytree(finished.study, tmp_path / "whole")

    def start(command, **_):
        flags = dict(word.removeprefix("--").split("=", 1) for word in command if "=" in word)
        run = Path(command[4]) if command[3] == "test" else Path(flags["logs"], flags["name"])
        calls.append((command[3], f"{run.parent.name}/{run.name.removeprefix('seed_')}"))
        if command[3] == "test":
            whole = tmp_path / "whole" / run.relative_to(finished.study) / "eval-unmasked"
            shutil.copytree(whole, flags["output"])
        else:
            write_export(run)
        return subprocess.Popen(["true"])

    monkeypatch.setattr(runner, "start_child", start)
    return calls


def cut(path):
    path.write_bytes(path.read_bytes()[:50])


def change_status(path):
    path.write_text(json.dumps({**json.loads(path.read_text()), "status": "failed"}))


@pytest.mark.slow
def test_what_lost_a_result_is_evaluated_again(finished, started, capsys):
    lost = "eval-unmasked/zeroshot-retrieval.json"
    (finished.study / "random/seed_0" / lost).unlink()
    cut(finished.study / "pgs/seed_0" / lost)
    change_status(finished.study / "pgs/seed_1" / lost)
    assert main(finished.argv()) == 0
    assert "3 of 4 runs are left" in capsys.readouterr().out
    assert started == [("test", "random/0"), ("test", "pgs/0"), ("test", "pgs/1")]
    rows = json.loads((finished.study / "results.json").read_text())["rows"]
    assert [list(row["seeds"]) for row in rows] == [["0", "1"], ["0", "1"]]
    assert main(finished.argv()) == 0
    assert "0 of 4 runs are left" in capsys.readouterr().out


@pytest.mark.slow
def test_what_lost_its_weights_is_exported_again_or_fails(finished, started, capsys, monkeypatch):
    monkeypatch.setattr(
        runner,
        "newest_checkpoint",
        lambda folder: folder / "1.pt" if "pgs" in str(folder) else None,
    )
    (finished.study / "random/seed_0" / EXPORT).unlink()
    (finished.study / "pgs/seed_0" / EXPORT).unlink()
    whole = (finished.study / "pgs/seed_1" / EXPORT).read_bytes()
    (finished.study / "pgs/seed_1" / EXPORT).write_bytes(whole[:-1])
    assert main(finished.argv()) == 1
    out = capsys.readouterr().out
    assert "random, seed 0: failed" in out
    assert "lacks whole weights in its export, and a checkpoint" in out
    assert "pgs, seed 0: it lacks whole weights in its export, and goes on from" in out
    again = [("train", "pgs/0"), ("test", "pgs/0"), ("train", "pgs/1"), ("test", "pgs/1")]
    assert started == again
    # Its scores were those of its weights.
    assert list(finished.record("random", 0)["evaluations"]) == ["unmasked"]
    write_export(finished.study / "random/seed_0")
    assert main(finished.argv()) == 0
    assert finished.record("random", 0)["failed"] == ""
    assert started == again


def test_a_run_that_hung_is_named_by_its_reason_and_not_by_its_stacks(
    finished, capsys, monkeypatch
):
    lost = finished.study / "pgs/seed_1"
    (lost / EXPORT).unlink()
    monkeypatch.setattr(runner, "newest_checkpoint", lambda folder: folder / "1.pt")

    def start(command, *, stdout, **_):
        reason = "rank 0 hangs in the data loader"
        (lost / "exit.json").write_text(json.dumps({"code": 1, "reason": reason}))
        stdout.write(b'Thread 0x1:\n  File "trainer.py", line 9 in step\n')
        return subprocess.Popen(["false"])

    monkeypatch.setattr(runner, "start_child", start)
    assert main(finished.argv()) == 1
    assert "pgs, seed 1: failed: rank 0 hangs in the data loader" in capsys.readouterr().out
