"""Commands that give shards: none outlives who reads it. Workers: what becomes of killed ones."""

import errno
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import pytest

from clip_pgs.common import leaving_when_told
from clip_pgs.data import archive, commands, tar
from clip_pgs.data.__main__ import main
from clip_pgs.data.commands import map_in, worker_processes
from clip_pgs.data.tar import read_shard
from support.processes import is_running
from support.runs import flags
from support.streams import open_stream, with_options


@pytest.fixture
def shard(make_shards, tmp_path):
    """Return a command that gives three pairs, never ends, and notes the process that it starts."""
    path = make_shards([3]) / "0.tar"
    return f"pipe:sleep 60 & echo $! > {tmp_path}/number; head -c -1024 '{path}'; wait"


def test_a_command_ends_where_its_shard_is_not_read_on(shard, tmp_path):
    items = read_shard(shard)
    next(items)
    items.close()
    assert not is_running(tmp_path / "number")


def test_a_command_whose_shard_is_not_read_on_cleans_up(make_shards, tmp_path):
    # More than a pipe holds, so that it still writes.
    path, place = make_shards([100]) / "0.tar", tmp_path / "scratch"
    place.mkdir()
    items = read_shard(f"pipe:cp '{path}' {place}; cat {place}/0.tar; rm {place}/0.tar")
    next(items)
    items.close()
    assert list(place.iterdir()) == []


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
def test_a_command_ends_with_the_error_of_who_waits_for_it(shard, tmp_path, error):
    def interrupt(*_):
        raise error

    before = signal.signal(signal.SIGUSR2, interrupt)
    target = (threading.get_ident(), signal.SIGUSR2)
    timer = threading.Timer(0.5, signal.pthread_kill, target)
    timer.start()
    try:
        # What damages a shard is an item of it.
        items = list(read_shard(shard))
        assert error is OSError
        assert items[-1].reason == "unreadable shard"
    except KeyboardInterrupt:
        assert error is KeyboardInterrupt
    finally:
        signal.signal(signal.SIGUSR2, before)
    assert not is_running(tmp_path / "number")


def test_a_failing_command_still_says_how_it_ended(tmp_path):
    (skip,) = read_shard("pipe:echo no archive; sleep 0.3; exit 3")
    assert "exit 3" in skip.detail


@pytest.mark.slow
@pytest.mark.parametrize(("workers", "seconds"), [(1, None), (2, None), (2, 0.0)])
def test_a_command_ends_with_the_data_worker_that_hangs_in_it(
    make_args, make_shards, tmp_path, monkeypatch, workers, seconds
):
    if seconds is not None:
        # As on a busy machine, where a worker does not come to ending it.
        monkeypatch.setattr("clip_pgs.data.commands._LEAVE_SECONDS", seconds)
    path = make_shards([3]) / "0.tar"
    args = make_args(
        train_data=f"pipe:cat {path}; sleep 60 & echo $! >> {tmp_path}/number; : {{0..1}}; wait",
        train_num_samples=6,
        batch_size=1,
        data_timeout=3.0,
    )
    stream = open_stream(with_options(args, workers=workers))
    with pytest.raises(Exception, match="no batch for 3 seconds"):
        list(stream)
    assert not is_running(tmp_path / "number")


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 85), (signal.SIGINT, 130)])
@pytest.mark.parametrize("to_group", [False, True])
def test_a_check_that_waits_for_a_command_ends_with_it_and_by_the_name_of_the_signal(
    tmp_path, number, code, to_group
):
    command = f"pipe:touch {tmp_path}/begun; sleep 60; cat nothing.tar"
    argv = flags(tmp_path, train_data=command, train_num_samples=8, check_only=True)
    with subprocess.Popen(
        [sys.executable, "-m", "clip_pgs.training", *argv],
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        # A shell lets what it starts in the background ignore it.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    ) as process:
        while not (tmp_path / "begun").exists() and process.poll() is None:
            time.sleep(0.1)
        (os.killpg if to_group else os.kill)(process.pid, number)
        # Whoever still runs holds the pipe.
        _, errors = process.communicate(timeout=20)
    assert process.returncode == code
    name = signal.Signals(number).name
    assert errors.splitlines()[-1] == f"stopped by {name} before the start"


def test_a_command_that_a_signal_ends_waits_for_the_one_to_this_process(monkeypatch):
    class WaitedError(BaseException):
        """The signal, which comes while the reader waits."""

    def sleep(seconds):
        raise WaitedError

    monkeypatch.setattr(commands, "time", SimpleNamespace(sleep=sleep, monotonic=time.monotonic))
    with pytest.raises(WaitedError):
        list(read_shard("pipe:kill -TERM $$"))
    (skip,) = read_shard("pipe:exit 3")
    assert "exit 3" in skip.detail


def _how_signals_end(_):
    return signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)


def test_processes_end_by_sigterm_without_pythons_help():
    # Where one is lost they are joined after it; a handler in Python can miss a signal before a
    # wait for a lock.
    with leaving_when_told(), worker_processes(2, "draw") as processes:
        expected = {(signal.SIG_DFL, signal.SIG_IGN)}
        assert set(processes.map(_how_signals_end, range(4))) == expected


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_in_the_midst_of_a_fork_ends_the_work(number):
    # Python swallows what a hook of a fork raises, as logging's does while it gives up its lock.
    script = f"""
import os, signal, time
from clip_pgs.common import AskedToLeaveError, leaving_when_told
from clip_pgs.data.commands import map_in, worker_processes

signal.signal(signal.SIGINT, signal.default_int_handler)
with leaving_when_told():
    os.register_at_fork(after_in_parent=lambda: os.kill(os.getpid(), {int(number)}))
    try:
        with worker_processes(2, "wait") as processes:
            processes.submit(time.sleep, 60).result()
    except (AskedToLeaveError, KeyboardInterrupt):
        print("left")
"""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=50, check=True
    )
    assert (done.stdout, done.stderr) == ("left\n", "")


def test_an_error_ends_what_processes_have_begun():
    begin = time.monotonic()
    with pytest.raises(TypeError), worker_processes(2, "wait") as processes:
        list(map_in(processes, time.sleep, ["", *[60] * 5]))
    assert time.monotonic() - begin < 30
    assert multiprocessing.active_children() == []


@pytest.fixture
def deadly(make_tar, tmp_path, monkeypatch):
    """Shards that kill each process that reads them, but this one."""
    parent, opened = os.getpid(), archive.open_archive

    def open_or_die(file, shard):
        if os.getpid() != parent:
            os.kill(os.getpid(), signal.SIGKILL)
        return opened(file, shard)

    monkeypatch.setattr(tar, "open_archive", open_or_die)
    monkeypatch.setattr(commands, "_SIGNAL_SECONDS", 0.0)
    make_tar(tmp_path / "shard", [("a.jpg", b"image"), ("a.txt", b"a dog")])
    shards = [f"{tmp_path}/{number}.tar" for number in range(500)]
    for shard in shards:
        os.link(tmp_path / "shard", shard)
    return shards


def test_a_killed_process_ends_the_count_of_words_in_a_sentence(deadly, tmp_path, capsys):
    argv = ["words", f"{tmp_path}/*.tar", "-o", f"{tmp_path}/words.json", "--workers", "2"]
    assert main(argv) == 1
    error = "error: one of 2 processes that count words was killed, maybe for want of memory\n"
    assert capsys.readouterr().err == error
    assert not (tmp_path / "words.json").exists()
    assert multiprocessing.active_children() == []


@pytest.mark.parametrize("has_room", [True, False])
def test_shards_are_indexed_without_the_processes_that_are_killed_or_not_to_be_had(
    deadly, monkeypatch, has_room
):
    monkeypatch.setattr(os, "cpu_count", lambda: 4)

    def refuse(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    if not has_room:
        monkeypatch.setattr(commands, "ProcessPoolExecutor", refuse)
    monkeypatch.setattr(tar, "_SECONDS_ALONE", 0.0)
    assert tar.index_shards(deadly) == dict.fromkeys(deadly, (1, None))
    assert multiprocessing.active_children() == []
