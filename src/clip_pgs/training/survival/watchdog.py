"""Ends a run in which nothing happens any more, and says who hangs and where.

A step of training has a time limit. What takes as long as it takes has none, such as an evaluation,
or a step of one process on a CPU: there the process hangs when it uses no processor time either. Of
several processes each tells the others where it is, so that they can name the one that keeps them
waiting: the one that is silent (stopped, or its machine gone), or else furthest behind. Who waits
for rank 0 to evaluate waits for ever, as long as rank 0 gives signs of life: it watches itself.
"""

from __future__ import annotations

import faulthandler
import multiprocessing
import os
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.distributed import DistError

from clip_pgs.training.options import TrainOptions
from clip_pgs.training.survival.signs import (
    STARTING,
    WAITING,
    Sign,
    Signs,
    name_hanging,
    store_address,
)

_MAX_INTERVAL = 10.0
# Share of the time for which a process that waits in vain keeps a processor busy, and more: it
# looks every few seconds whether what it waits for still lives.
_IDLE_SHARE = 0.001
_LAST_WORDS_SECONDS = 10.0


@dataclass(frozen=True)
class _Place:
    """Where this process is since when, and the seconds that it may be there; None for any."""

    step: int
    activity: str
    since: float
    limit: float | None


class Watchdog:
    """Watches this process from a thread, and the run's other processes with it.

    Args:
        args: Options, with `rank` and `world_size`; `hang_timeout` in seconds, 0 watches nothing.
        on_hang: Is given the sentence, in the thread, before the process is ended.
    """

    def __init__(self, args: TrainOptions, *, on_hang: Callable[[str], object]) -> None:
        self._rank = args.rank
        self._world_size = args.world_size
        self._timeout = args.hang_timeout
        # A CPU may work at a step for an hour; a GPU that hangs keeps a processor busy.
        self._has_deadlines = self._world_size > 1 or torch.device(args.device).type != "cpu"
        self._on_hang = on_hang
        self._done = threading.Event()
        self._thread: threading.Thread | None = None
        self._signs: Signs | None = None
        self._worked = self._worked_at = 0.0
        self.let(0, STARTING)
        if self._timeout <= 0:
            return
        self._interval = min(self._timeout / 5, _MAX_INTERVAL)
        address = store_address(args)
        if address is not None:
            self._signs = Signs(address, rank=self._rank, world_size=self._world_size)
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._thread.start()

    def note(self, step: int, activity: str, *, patience: float = 1.0) -> None:
        """Note what this process begins to do, and how many timeouts it may take."""
        self._place = _Place(step, activity, time.monotonic(), limit=patience * self._timeout)

    def let(self, step: int, activity: str) -> None:
        """Note what rank 0 begins, such as an evaluation: it may take as long as it takes.

        The other processes wait for it.
        """
        what = activity if self._rank == 0 else WAITING
        self._place = _Place(step, what, time.monotonic(), limit=None)

    def close(self) -> None:
        """Stop watching."""
        self._done.set()
        if self._thread is not None:
            self._thread.join()

    def _watch(self) -> None:
        number = 0
        while not self._done.wait(self._interval):
            if self._signs is not None:
                with suppress(DistError, RuntimeError):
                    # The run itself finds out, when the store is gone.
                    self._signs.exchange(self._sign(number))
            if self._is_late():
                self._bark(self._sign(number))
            number += 1

    def _is_late(self) -> bool:
        place, now = self._place, time.monotonic()
        if place.limit is not None and self._has_deadlines:
            return now > place.since + place.limit
        if self._rank != 0:
            return bool(self._silent(longer_than=self._timeout))
        worked = _seconds_worked()
        is_idle = abs(worked - self._worked) < _IDLE_SHARE * self._timeout
        if place.since > self._worked_at or not is_idle:
            self._worked, self._worked_at = worked, now
        return now > self._worked_at + self._timeout

    def _silent(self, *, longer_than: float) -> dict[int, float]:
        return {} if self._signs is None else self._signs.silent(longer_than=longer_than)

    def _sign(self, number: int) -> Sign:
        place = self._place
        seconds = time.monotonic() - place.since
        host = socket.gethostname()
        return Sign(number, place.step, place.activity, seconds, host, os.getpid())

    def _bark(self, sign: Sign) -> None:
        # What hangs may hold the lock that a last word needs.
        threading.Timer(_LAST_WORDS_SECONDS, os._exit, (1,)).start()
        self._on_hang(f"{self._name_hanging(sign)}; --hang-timeout is {self._timeout:g} s")
        faulthandler.dump_traceback(all_threads=True)
        for child in multiprocessing.active_children():
            child.kill()
        # The main thread may be where no exception reaches it.
        os._exit(1)

    def _name_hanging(self, sign: Sign) -> str:
        if self._world_size == 1:
            return f"the run hangs: for {sign.seconds:.0f} s {sign.describe()}"
        if self._rank == 0 and self._place.limit is None:
            return name_hanging({0: sign}, silent={})
        # Nobody misses this many turns but by being stopped.
        silent = self._silent(longer_than=max(4 * self._interval, 2.0))
        last = {self._rank: sign} if self._signs is None else self._signs.last
        return name_hanging(last, silent=silent)


def _seconds_worked() -> float:
    """Return the processor time of Python's threads but this one.

    Others of this process may answer what other processes ask of a store that it keeps.
    """
    here = threading.get_native_id()
    threads = [thread.native_id for thread in threading.enumerate() if thread.native_id != here]
    try:
        texts = [Path(f"/proc/self/task/{number}/schedstat").read_text() for number in threads]
    except OSError:
        # A thread that has just ended, or a system that tells this of whole processes alone.
        return time.process_time() - time.thread_time()
    return sum(int(text.split()[0]) for text in texts) / 1e9
