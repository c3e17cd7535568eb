"""Processes in which nothing happens any more: who is named, and who is left alone."""

import json
import signal

import pytest
from torch.distributed import TCPStore

from clip_pgs.training.watchdog import Activity, Heartbeats, WorkerStatus, name_hanging
from support.processes import run_suspended
from support.ranks import Hang, output, train_together
from support.resuming import last_checkpoint
from support.runs import flags

TIMEOUT = 3


FIRST_STEP = """
import time
from types import SimpleNamespace
from clip_pgs.training.watchdog import Activity, Watchdog

options = SimpleNamespace(rank=0, world_size=2, hang_timeout=1.0, device="cpu", distributed=False)
watchdog = Watchdog(options, on_hang=print)
with watchdog.watching(options):
    watchdog.note(Activity.TRAINING, step=0, patience=4)
    end = time.monotonic() + 4.5 + {more}
    print("begun", flush=True)
    # It may be stopped before it comes to this.
    time.sleep(max(0, end - time.monotonic()))
"""


def sign(*, step=5, activity=Activity.VOTING):
    return WorkerStatus(
        beat=1, step=step, activity=activity, seconds=9.0, host="node-a", process=77
    )


@pytest.mark.parametrize(
    ("signs", "silent", "beginning"),
    [
        (
            {0: sign(), 1: sign(activity=Activity.FETCHING)},
            {},
            "rank 1 hangs: for 9 s where it waits",
        ),
        (
            {0: sign(), 1: sign(step=4, activity=Activity.TRAINING)},
            {},
            "rank 1 hangs: for 9 s where it t",
        ),
        ({0: sign(), 1: sign()}, {1: 30.0}, "rank 1 hangs: no sign of life for 30 s, last seen"),
        ({0: sign()}, {1: 30.0}, "rank 1 hangs: no sign of life for 30 s, and none before"),
        ({0: sign(), 1: sign()}, {}, "no rank gets on: each waits for the others at step 5"),
    ],
)
def test_the_rank_that_others_wait_for_is_named(signs, silent, beginning):
    assert name_hanging(signs, silent=silent).startswith(beginning)


def test_machines_that_count_restarts_otherwise_hear_each_other(monkeypatch):
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    places = [Heartbeats(("127.0.0.1", store.port), rank=rank, world_size=2) for rank in range(2)]
    # As torchrun says it where each start of the processes has a store of its own.
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "False")
    for rank, place in enumerate(places):
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", str(rank))
        place.exchange(sign())
    assert places[1].last.keys() == {0, 1}


def train(folder, world, *, num_processes, trouble, **more):
    options = {"train_data": world.train_data, "epochs": 1, "hang_timeout": TIMEOUT, **more}
    argv = flags(folder, batch_size=8 // num_processes, **options)
    codes = train_together(folder, argv, num_processes=num_processes, trouble=trouble)
    return codes, json.loads((folder / "logs" / "run" / "exit.json").read_text())


@pytest.mark.slow
@pytest.mark.parametrize("activity", ["trains", "evaluates"])
def test_a_single_process_that_hangs_is_ended_in_a_sentence(tmp_path, world, activity):
    trouble = Hang(rank=0, activity=activity)
    codes, end = train(tmp_path, world, num_processes=1, trouble=trouble)
    assert codes == [1]
    assert end["code"] == 1
    assert end["reason"].startswith("the run hangs: for ")
    assert f" s where it {activity} at step " in end["reason"]
    assert end["reason"] in output(tmp_path)


@pytest.mark.slow
def test_a_step_on_a_cpu_that_works_takes_as_long_as_it_takes(tmp_path, world):
    trouble = Hang(rank=0, activity="trains", busy_seconds=2.5 * TIMEOUT)
    codes, end = train(tmp_path, world, num_processes=1, trouble=trouble)
    assert (codes, end["code"]) == ([0], 0), output(tmp_path)


@pytest.mark.slow
def test_an_evaluation_that_works_takes_as_long_as_it_takes(tmp_path, world):
    trouble = Hang(rank=0, activity="evaluates", busy_seconds=2.5 * TIMEOUT)
    codes, end = train(tmp_path, world, num_processes=2, trouble=trouble)
    assert (codes, end["code"]) == ([0, 0], 0), output(tmp_path)


@pytest.mark.slow
def test_an_evaluation_that_hangs_is_named_and_ends_all(tmp_path, world):
    trouble = Hang(rank=0, activity="evaluates")
    codes, end = train(tmp_path, world, num_processes=2, trouble=trouble)
    assert codes == [1, 1]
    assert end["reason"].startswith("rank 0 hangs: for "), output(tmp_path)
    assert " where it evaluates at step 4 " in end["reason"]


@pytest.mark.slow
@pytest.mark.parametrize("num_processes", [1, 2])
@pytest.mark.parametrize("stops_at", [2, None])
def test_a_disk_that_is_slow_is_no_hang(tmp_path, world, num_processes, stops_at):
    trouble = Hang(rank=0, activity="writes", busy_seconds=2.5 * TIMEOUT, stops_at=stops_at)
    codes, end = train(tmp_path, world, num_processes=num_processes, trouble=trouble)
    code = 0 if stops_at is None else 85
    assert (codes, end["code"]) == (num_processes * [code], code), output(tmp_path)
    assert last_checkpoint(tmp_path / "logs" / "run")["step"] == (stops_at or 4)


@pytest.mark.slow
@pytest.mark.parametrize("num_processes", [1, 2])
def test_a_save_that_waits_for_the_one_before_is_no_hang(tmp_path, world, num_processes):
    trouble = Hang(rank=0, activity="writes", busy_seconds=2.5 * TIMEOUT)
    more = {"num_processes": num_processes, "save_every_steps": 1}
    codes, end = train(tmp_path, world, trouble=trouble, **more)
    assert (codes, end["code"]) == (num_processes * [0], 0), output(tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("num_processes", [1, 2])
def test_a_disk_that_is_dead_is_told(tmp_path, world, num_processes):
    trouble = Hang(rank=0, activity="writes", stops_at=2)
    codes, end = train(tmp_path, world, num_processes=num_processes, trouble=trouble)
    assert codes == num_processes * [1]
    assert " where it waits for the disk at step 2 " in end["reason"], output(tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_a_process_that_is_stopped_is_named_by_the_other(tmp_path, world, rank):
    trouble = Hang(rank=rank, activity="stopped")
    codes, end = train(tmp_path, world, num_processes=2, trouble=trouble)
    assert (codes[rank], codes[1 - rank]) == (-signal.SIGKILL, 1)
    beginning = f"rank {rank} hangs: no sign of life for "
    assert end["reason"].startswith(beginning), output(tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(("more", "code"), [(2.5, 0), (8.0, 1)])
def test_a_step_that_is_suspended_for_longer_than_its_limit_has_all_of_it_anew(more, code):
    ended, said, _ = run_suspended(FIRST_STEP.format(more=more), seconds=4.5)
    assert ("hangs" in said) == bool(code)
    assert ended == code


@pytest.mark.slow
@pytest.mark.parametrize("num_processes", [1, 2])
def test_a_run_that_is_suspended_as_a_whole_goes_on(tmp_path, world, num_processes):
    trouble = Hang(rank=0, activity="suspended", busy_seconds=2.5 * TIMEOUT)
    codes, end = train(tmp_path, world, num_processes=num_processes, trouble=trouble)
    assert (codes, end["code"]) == (num_processes * [0], 0), output(tmp_path)
