"""Data workers that hang in a read: the process leaves all the same, with its code and sentence."""

import signal
import time

import pytest

from support.chaos import Launch, num_steps
from support.processes import is_running
from support.resuming import last_checkpoint
from support.runs import flags, write_shards

pytestmark = pytest.mark.slow

# Who waits for such workers one after the other, as torch does, waits five seconds for each.
NUM_WORKERS, SECONDS_TO_LEAVE = 6, 25


@pytest.fixture
def hanging(tmp_path):
    """Return a function that starts a run whose shards never end after its first steps."""

    def start(**options):
        shards = write_shards(tmp_path / "train", num_shards=NUM_WORKERS, samples_per_shard=12)
        wait = f"{{ sleep 60 & echo $! >> {tmp_path}/numbers; wait; }}"
        argv = flags(
            tmp_path,
            train_data=f"pipe:cat {shards}; [ ! -e {tmp_path}/stop ] || {wait}",
            train_num_samples=NUM_WORKERS * 12,
            epochs=40,
            batch_size=4,
            workers=NUM_WORKERS,
            **options,
        )
        launch = Launch(tmp_path, argv)
        assert launch.wait_until(lambda: num_steps(tmp_path / "logs" / "run") >= 2)
        (tmp_path / "stop").touch()
        return launch

    return start


def wait_for(launch, folder):
    started = time.monotonic()
    code = launch.wait()
    assert time.monotonic() - started < SECONDS_TO_LEAVE
    assert not is_running(folder / "numbers")
    return code


def test_data_that_stops_ends_the_run_though_its_workers_hang(hanging, tmp_path):
    launch = hanging(data_timeout=2)
    assert wait_for(launch, tmp_path) == 1
    last = launch.output().splitlines()[-1]
    assert last.startswith("error: no batch for 2 seconds: worker ")
    assert ".tar" in last
    assert "Traceback" not in launch.output()


def test_a_run_that_waits_for_data_leaves_when_told_to(hanging, tmp_path):
    launch = hanging(data_timeout=0)
    before = -1
    while before != (before := num_steps(tmp_path / "logs" / "run")):
        time.sleep(2)
    launch.process.send_signal(signal.SIGTERM)
    assert wait_for(launch, tmp_path) == 85
    assert "stopped by SIGTERM at sample" in launch.output().splitlines()[-1]
    # On a slow machine a step may have ended in between.
    run = tmp_path / "logs" / "run"
    assert last_checkpoint(run)["step"] == num_steps(run)
