import os
import re
import subprocess
import sys

import pytest

from clip_pgs.training.__main__ import main
from support.options import VALID


@pytest.fixture(autouse=True)
def _empty_folder(tmp_path, monkeypatch):
    """Nothing of who runs the tests is found: no file, and no process beside this one."""
    monkeypatch.chdir(tmp_path)
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "SLURM_NTASKS", "SLURM_PROCID"):
        # What open_clip sets of these goes again, too.
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)


def test_bad_input_is_one_sentence_exit_code_2_and_nothing_created(tmp_path, capfd):
    assert main([*VALID, "--masking", "pgs", "--mask-ratio", "1.5", "--name", "demo"]) == 2
    assert capfd.readouterr() == ("", "error: mask_ratio must be in [0, 1), got 1.5\n")
    assert list(tmp_path.iterdir()) == []


def test_check_only_says_what_the_run_takes_and_creates_nothing(tmp_path, capfd, caplog):
    assert main([*VALID, "--masking", "pgs", "--name", "demo", "--check-only"]) == 0
    out, error = capfd.readouterr()
    assert (error, caplog.text) == ("", "")
    assert re.search(r"^parameters +150 M, 150 M of them trained$", out, re.MULTILINE)
    assert re.search(r"^tokens kept +98 of 196 patches$", out, re.MULTILINE)
    assert list(tmp_path.iterdir()) == []


def run(*argv, **env):
    return subprocess.run(
        [sys.executable, "-m", "clip_pgs.training", *argv],
        env={**os.environ, "OMP_NUM_THREADS": "1", **env},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


@pytest.mark.slow
def test_another_rank_says_nothing_and_leaves_alike():
    done = run("--model", "ViT-B-16", RANK="1", WORLD_SIZE="2")
    assert (done.returncode, done.stderr, done.stdout) == (2, "", "")


@pytest.mark.slow
def test_warnings_are_shown_before_the_run_in_one_form():
    done = run(*VALID, "--momentum", "0.9", "--check-only")
    assert done.returncode == 0
    assert "WARNING: --momentum has no effect with --opt adamw" in done.stderr
    assert {line[:9] for line in done.stderr.splitlines()} == {"WARNING: "}


def test_an_interrupted_run_leaves_with_130(monkeypatch):
    def interrupt(args, **_):
        raise KeyboardInterrupt

    monkeypatch.setattr("clip_pgs.training.trainer.train", interrupt)
    assert main(VALID) == 130


def test_help_leaves_with_0(capsys):
    with pytest.raises(SystemExit) as left:
        main(["-h"])
    assert left.value.code == 0


@pytest.mark.parametrize(
    "environment",
    [{"WORLD_SIZE": "2", "RANK": "0"}, {"SLURM_NTASKS": "2", "SLURM_PROCID": "0"}],
)
def test_processes_that_nobody_started_are_one_sentence(tmp_path, monkeypatch, capfd, environment):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert main([*VALID, "--name", "demo"]) == 2
    error = capfd.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert "WORLD_SIZE or SLURM_NTASKS" in error
    assert "MASTER_ADDR" in error
    assert not (tmp_path / "logs").exists()
