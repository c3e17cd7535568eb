import os
import re
import subprocess
import sys

import pytest

from clip_pgs.training.__main__ import main
from support.options import VALID


def run(folder, *argv, **environment):
    return subprocess.run(
        [sys.executable, "-m", "clip_pgs.training", *argv],
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


@pytest.mark.slow
def test_bad_input_is_one_sentence_exit_code_2_and_nothing_created(tmp_path):
    done = run(tmp_path, *VALID, "--masking", "pgs", "--mask-ratio", "1.5", "--name", "demo")
    assert done.returncode == 2
    assert done.stderr == "error: mask_ratio must be in [0, 1), got 1.5\n"
    assert done.stdout == ""
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_check_only_says_what_the_run_takes_and_creates_nothing(tmp_path):
    done = run(tmp_path, *VALID, "--masking", "pgs", "--name", "demo", "--check-only")
    assert (done.returncode, done.stderr) == (0, "")
    assert re.search(r"^parameters +150 M, 150 M of them trained$", done.stdout, re.MULTILINE)
    assert re.search(r"^tokens kept +98 of 196 patches$", done.stdout, re.MULTILINE)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_another_rank_says_nothing_and_leaves_alike(tmp_path):
    done = run(tmp_path, "--model", "ViT-B-16", RANK="1", WORLD_SIZE="2")
    assert (done.returncode, done.stderr, done.stdout) == (2, "", "")


def test_warnings_are_shown_before_the_run(capsys, monkeypatch, caplog):
    monkeypatch.delenv("RANK", raising=False)
    assert main([*VALID, "--momentum", "0.9", "--check-only"]) == 0
    assert "--momentum has no effect with --opt adamw" in caplog.text


def test_an_interrupted_run_leaves_with_130(monkeypatch):
    def interrupt(args, **_):
        raise KeyboardInterrupt

    monkeypatch.setattr("clip_pgs.training.trainer.train", interrupt)
    assert main(VALID) == 130


def test_help_leaves_with_0(capsys):
    with pytest.raises(SystemExit) as left:
        main(["-h"])
    assert left.value.code == 0


@pytest.mark.slow
@pytest.mark.parametrize(
    "environment",
    [{"WORLD_SIZE": "2", "RANK": "0"}, {"SLURM_NTASKS": "2", "SLURM_PROCID": "0"}],
)
def test_processes_that_nobody_started_are_one_sentence(tmp_path, environment):
    done = run(tmp_path, *VALID, "--name", "demo", **environment)
    assert done.returncode == 2
    assert "WORLD_SIZE or SLURM_NTASKS" in done.stderr
    assert "MASTER_ADDR" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "logs").exists()
