"""Real processes, real signals, real files: what a run goes through and how it ends."""

import os
import signal

import pytest

from support.chaos import Launch, compare, num_steps, run_through_chaos
from support.ranks import output, train_together
from support.resuming import differences, last_checkpoint
from support.runs import flags, write_shards

pytestmark = pytest.mark.slow

NUM_STEPS, SAMPLES_PER_STEP = 32, 8


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
        "epochs": 2,
        "save_every_steps": 5,
        "save_frequency": 0,
        "batch_size": batch_size,
        "workers": 1,
        **options,
    }
    return flags(folder, **options)


def undisturbed(folder, argv, *, num_processes):
    """Return the folder of a run that is left alone, and needs no launcher."""
    name = f"undisturbed-{num_processes}"
    if (folder / "logs" / name).is_dir():
        return folder / "logs" / name
    codes = train_together(folder, [*argv, "--name", name], num_processes=num_processes)
    assert set(codes) == {0}, output(folder)
    return folder / "logs" / name


def test_one_process_survives_kills_signals_and_damaged_files(folder):
    argv = arguments(folder)
    tally = run_through_chaos(folder, argv, name="one", seed=1, num_stops=3, max_steps=10)
    expected = undisturbed(folder, argv, num_processes=1)
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

    launch = Launch(folder, [*argv, *names, "--resume", "latest"], num_processes=2)
    assert launch.wait() == 0, launch.output()
    expected = undisturbed(folder, argv, num_processes=2)
    assert differences(last_checkpoint(path), last_checkpoint(expected)) == []


def test_ranks_leave_when_their_launcher_dies_and_the_next_launch_waits_for_them(folder):
    argv = arguments(folder, batch_size=4)
    path = folder / "logs" / "orphans"
    again = [*argv, "--name", "orphans", "--resume", "latest"]
    launch = Launch(folder, again, num_processes=2)
    assert launch.wait_until(lambda: num_steps(path) >= 4), launch.output()
    os.kill(launch.launcher(), signal.SIGKILL)
    launch.wait()

    launch = Launch(folder, again, num_processes=2)
    assert launch.wait() == 0, launch.output()
    assert "Resuming" in launch.output()
    expected = undisturbed(folder, argv, num_processes=2)
    assert differences(last_checkpoint(path), last_checkpoint(expected)) == []
    assert num_steps(path) == NUM_STEPS
