"""Real processes, real signals, real files: what a run goes through and how it ends."""

import os
import signal

import pytest

from support.chaos import Launch, compare, num_steps, run_through_chaos
from support.resuming import differences, last_checkpoint
from support.runs import flags, write_shards

NUM_STEPS, SAMPLES_PER_STEP = 48, 8


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("chaos")
    write_shards(folder / "train", samples_per_shard=64)
    return folder


def arguments(folder, *, batch_size=8, **options):
    options = {
        "train_data": f"{folder}/train/{{00000..00001}}.tar",
        "name": None,
        "masking": "pgs",
        "mask_ratio_min": 0.3,
        "mask_ratio": 0.5,
        "epochs": 3,
        "save_every_steps": 5,
        "save_frequency": 0,
        "batch_size": batch_size,
        "workers": 1,
        **options,
    }
    return flags(folder, **options)


def finish(folder, argv, name, **options):
    launch = Launch(folder, [*argv, "--name", name], **options)
    assert launch.wait() == 0, launch.output()
    return folder / "logs" / name


def test_one_process_survives_kills_signals_and_damaged_files(folder):
    argv = arguments(folder)
    tally = run_through_chaos(folder, argv, name="one", seed=1, num_stops=3, max_steps=10)
    expected = finish(folder, argv, "one-expected")
    counts = {"num_steps": NUM_STEPS, "samples_per_step": SAMPLES_PER_STEP}
    compare(tally, folder / "logs" / "one", expected, **counts)
    assert (tally.lost, tally.unreadable, tally.differences) == (0, 0, [])
    assert set(tally.codes) <= {0, 85, -signal.SIGKILL}


def test_two_processes_restart_by_themselves_leave_when_told_and_end_alike(folder):
    argv = arguments(folder, batch_size=4)
    path = folder / "logs" / "two"
    names = ["--name", "two"]
    launch = Launch(folder, [*argv, *names], num_processes=2, MAX_RESTARTS="1")
    assert launch.wait_until(lambda: num_steps(path) >= 8), launch.output()
    dead = launch.trainers()[1]
    assert "Resuming" not in launch.output()
    os.kill(dead, signal.SIGKILL)
    assert launch.wait_until(lambda: "Resuming" in launch.output() and num_steps(path) >= 12)
    launch.process.send_signal(signal.SIGUSR1)
    assert launch.wait() == 85, launch.output()
    assert "stopped by SIGUSR1" in (path / "exit.json").read_text()

    finish(folder, [*argv, "--resume", "latest"], "two", num_processes=2)
    expected = finish(folder, argv, "two-expected", num_processes=2)
    assert differences(last_checkpoint(path), last_checkpoint(expected)) == []


def test_a_process_that_hangs_is_named(folder):
    argv = arguments(folder, batch_size=4, hang_timeout=2)
    path = folder / "logs" / "hanging"
    launch = Launch(folder, [*argv, "--name", "hanging"], num_processes=2)
    assert launch.wait_until(lambda: num_steps(path) >= 8), launch.output()
    stopped = launch.trainers()[1]
    os.kill(stopped, signal.SIGSTOP)
    launch.wait_until(lambda: (path / "exit.json").is_file())
    # torchrun would give it half a minute.
    os.kill(stopped, signal.SIGKILL)
    assert launch.wait() == 1
    assert "rank 1 hangs: no sign of life for" in (path / "exit.json").read_text()
