"""Data workers that hang in a read: the process leaves all the same, with its code and sentence."""

import os
import signal
import time

import pytest

from support.chaos import Launch, num_steps
from support.runs import flags, write_csv

pytestmark = pytest.mark.slow

# Who waits for such workers one after the other, as torch does, waits five seconds for each.
NUM_WORKERS, SECONDS_TO_LEAVE = 6, 25


@pytest.fixture
def hanging(tmp_path):
    """Return a function that starts a run whose images are pipes after its first steps."""

    def start(**options):
        table = write_csv(tmp_path / "pairs", num_samples=64)
        argv = flags(
            tmp_path, train_data=table, epochs=40, batch_size=4, workers=NUM_WORKERS, **options
        )
        launch = Launch(tmp_path, argv)
        assert launch.wait_until(lambda: num_steps(tmp_path / "logs" / "run") >= 2)
        for path in (tmp_path / "pairs").glob("*.png"):
            # Never without a name: a file that is missing is skipped.
            os.mkfifo(path.with_suffix(".pipe"))
            os.replace(path.with_suffix(".pipe"), path)
        return launch

    return start


def wait_for(launch):
    started = time.monotonic()
    code = launch.wait()
    assert time.monotonic() - started < SECONDS_TO_LEAVE
    return code


def test_data_that_stops_ends_the_run_though_its_workers_hang(hanging):
    launch = hanging(data_timeout=2)
    assert wait_for(launch) == 1
    last = launch.output().splitlines()[-1]
    assert last.startswith("error: no batch for 2 seconds: worker ")
    assert ".png" in last
    assert "Traceback" not in launch.output()


def test_a_run_that_waits_for_data_leaves_when_told_to(hanging, tmp_path):
    launch = hanging(data_timeout=0)
    before = -1
    while before != (before := num_steps(tmp_path / "logs" / "run")):
        time.sleep(2)
    launch.process.send_signal(signal.SIGTERM)
    assert wait_for(launch) == 85
    assert "stopped by SIGTERM at sample" in launch.output().splitlines()[-1]
    # On a slow machine a step may have ended in between.
    last = num_steps(tmp_path / "logs" / "run")
    assert (tmp_path / "logs" / "run" / "checkpoints" / f"step_{last}.pt").is_file()
