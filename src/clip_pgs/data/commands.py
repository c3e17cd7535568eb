"""Processes beside this one, and how they end: workers, and commands that give shards."""

from __future__ import annotations

import atexit
import ctypes
import importlib
import multiprocessing
import os
import signal
import subprocess
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from functools import lru_cache
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

from clip_pgs.common import FAILED, signals_held

T = TypeVar("T")

# The exit codes of commands that a signal ended, and of shells that ran one.
_TOLD = {sign for number in (signal.SIGTERM, signal.SIGINT) for sign in (-number, 128 + number)}
# So much later than a command, this process has the signal that went to both.
_SIGNAL_SECONDS = 1.0
# A command whose data is damaged may end by itself, and its exit code then says more.
_END_SECONDS = 1.0
_CLEAN_UP_SECONDS = 0.2
# A data worker that is told to leave ends its commands in this time, if it can at all.
_LEAVE_SECONDS = 0.5
_KILL_SECONDS = 2.0
_PR_SET_PDEATHSIG = 1

_running: set[subprocess.Popen[bytes]] = set()
os.register_at_fork(after_in_child=_running.clear)


class LostProcessError(ValueError):
    """A process that worked for this one was killed; says what it did."""

    exit_code = FAILED


@contextmanager
def worker_processes(number: int, what: str) -> Iterator[ProcessPoolExecutor | None]:
    """Give processes that work beside this one; an error in the block ends them at once.

    Args:
        number: How many; for 0, and where the system has no room for them, None is given.
        what: What they do, such as "draw scenes", for the message.

    Raises:
        LostProcessError: If one of them is killed, and nobody minds within the block.
    """
    executor, earlier = None, set(multiprocessing.active_children())
    try:
        if number:
            # Their semaphores have a place in shared memory, which some systems lack.
            with suppress(OSError, NotImplementedError):
                executor = ProcessPoolExecutor(number, initializer=_follow_parent)
        if executor is not None:
            with signals_held(signal.SIGINT, signal.SIGTERM):
                # They begin with what is first to be done.
                executor.submit(int)
        yield executor
    except BrokenProcessPool:
        # A signal that went to all says more.
        time.sleep(_SIGNAL_SECONDS)
        raise LostProcessError(
            f"one of {number} processes that {what} was killed, maybe for want of memory"
        ) from None
    except BaseException:
        for process in set(multiprocessing.active_children()) - earlier:
            process.terminate()
        raise
    finally:
        if executor is not None:
            executor.shutdown(cancel_futures=True)


def map_in(
    executor: ProcessPoolExecutor, function: Callable[..., T], items: Iterable[Any], chunk: int = 1
) -> Iterator[T]:
    """Hand out all items at once, so many together, and yield what a function gives, in order.

    `executor.map` cancels the others where one fails, which may leave killed processes' siblings.
    """
    every = list(items)
    futures = deque(
        executor.submit(_apply, function, every[start : start + chunk])
        for start in range(0, len(every), chunk)
    )

    def results() -> Iterator[T]:
        while futures:
            yield from futures.popleft().result()

    return results()


def _apply(function: Callable[..., T], items: list[Any]) -> list[T]:
    return [function(item) for item in items]


def _follow_parent() -> None:
    """Leave Ctrl-C to the process that hands out the work; end with it, where Linux can tell."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # Where one is lost, the others are ended by it. Python's handler, which is inherited, can miss
    # it where the signal comes just before a wait for a lock, and the process would wait for ever.
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if hasattr(libc := ctypes.CDLL(None), "prctl"):
        libc.prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL))


def open_remote(shard: str) -> BinaryIO:
    """Open a URL or a `pipe:` command; on leaving the block early, its command is ended.

    A command is in a session of its own: what a terminal or a launcher sends to all processes of a
    run, Ctrl-C say, reaches the run alone, and whatever the command starts can be ended with it.

    Raises:
        OSError: Also by what is returned, if the command fails.
    """
    return _webdataset().gopen(shard)


def end_commands() -> None:
    """End the commands of this process that still run, with all that they have started."""
    for command in list(_running):
        _end(command)


def end_processes(processes: Sequence[BaseProcess]) -> None:
    """End data workers, also those that hang in a read, with the commands that they read.

    Args:
        processes: Children of this process.
    """
    commands = [child for process in processes for child in _children(process)]
    for process in processes:
        process.terminate()
    end = time.monotonic() + _LEAVE_SECONDS
    for process in processes:
        process.join(max(0.0, end - time.monotonic()))
    for process in processes:
        # torch raises an error where one of its workers is killed.
        with suppress(RuntimeError):
            process.kill()
            process.join(_KILL_SECONDS)
    # A worker may not have come to ending them, as on a busy machine; each leads a group.
    for command in commands:
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(command, signal.SIGKILL)


def _children(process: BaseProcess) -> list[int]:
    """Return the process ids of a process's children, where the system tells them."""
    found: list[int] = []
    with suppress(OSError):
        for task in Path(f"/proc/{process.pid}/task").iterdir():
            found += map(int, (task / "children").read_text("utf-8").split())
    return found


def _end(command: subprocess.Popen[bytes]) -> None:
    # Until it is waited for, no other process can have its number.
    if command.returncode is None:
        with suppress(ProcessLookupError):
            # Commands of a data worker inherit that it blocks SIGTERM.
            os.killpg(command.pid, signal.SIGKILL)


@lru_cache(maxsize=1)
def _webdataset() -> Any:
    """Return webdataset's module that opens URLs; imported late, as most runs need none."""
    module: Any = importlib.import_module("webdataset.gopen")

    class Command(module.Pipe):
        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, start_new_session=True, **options)
            _running.add(self.proc)

        def wait_for_child(self) -> None:
            if self.proc.wait() in _TOLD and not self.ignore_errors:
                time.sleep(_SIGNAL_SECONDS)
            super().wait_for_child()

        def close(self) -> None:
            super().close()
            _running.discard(self.proc)

        def __exit__(self, kind: type[BaseException] | None, *error: Any) -> None:
            try:
                if kind is not None and issubclass(kind, Exception):
                    with suppress(subprocess.TimeoutExpired):
                        self.proc.wait(_END_SECONDS)
            finally:
                if kind is not None and self.proc.poll() is None:
                    self.ignore_errors = True
                    # What it writes has no reader now: it ends by itself, and cleans up.
                    self.stream.close()
                    with suppress(subprocess.TimeoutExpired):
                        self.proc.wait(_CLEAN_UP_SECONDS)
                    _end(self.proc)
                self.close()

    # It takes no options for the processes that it starts.
    module.Pipe = Command
    atexit.register(end_commands)
    return module
