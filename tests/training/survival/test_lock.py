"""Two launches of one run at the same time."""

import signal
import subprocess
import sys

import pytest

from clip_pgs.training.__main__ import main
from clip_pgs.training.survival import lock
from support.runs import flags, run

HOLD = """
import sys, time
from pathlib import Path
from clip_pgs.training.survival.lock import run_lock
with run_lock(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(600)
"""


@pytest.fixture
def holder(tmp_path):
    command = [sys.executable, "-c", HOLD, str(tmp_path / "logs" / "run")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "held\n"
        yield process
        process.kill()


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def test_a_run_that_trains_is_left_alone(tmp_path, world, holder, monkeypatch, capfd):
    monkeypatch.setattr(lock, "PATIENCE_SECONDS", 0.3)
    folder = tmp_path / "logs" / "run"
    before = contents(folder)
    argv = flags(tmp_path, train_data=world.train_data, resume="latest")
    assert main(argv) == 2
    (line,) = [line for line in capfd.readouterr().err.splitlines() if "is being trained" in line]
    assert f"{folder} is being trained by process {holder.pid} on " in line
    assert contents(folder) == before


def test_a_launch_goes_on_when_the_one_before_is_gone(tmp_path, world, holder):
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    assert (
        run(tmp_path, train_data=world.train_data, resume="latest", epochs=1) / "export"
    ).is_dir()
