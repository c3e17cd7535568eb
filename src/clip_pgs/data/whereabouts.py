"""What each worker is reading, for when it reads for ever or dies of it."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.sharedctypes import RawArray
from types import FrameType

from torch.utils.data import get_worker_info

# Process, part and number.
_NUM_FIELDS = 3
_SECONDS_BETWEEN_SIGNALS = 0.5


class StalledDataError(RuntimeError):
    """Data that stopped coming; says what was being read."""


class Whereabouts:
    """Notes of workers that the process they work for can read.

    Args:
        num_workers: Number of workers; with 0 the process itself takes notes.
    """

    def __init__(self, num_workers: int) -> None:
        self._num_slots = max(1, num_workers)
        self._fields = RawArray("q", _NUM_FIELDS * self._num_slots)

    def note(self, part: int, number: int) -> None:
        """Note what this worker is about to read."""
        slot = _slot()
        # The process comes last: where there is one, there is something to read.
        self._fields[slot + 1] = part
        self._fields[slot + 2] = number
        self._fields[slot] = os.getpid()

    def leave(self) -> None:
        """Note that this worker has nothing to read."""
        self._fields[_slot()] = 0

    def busy(self) -> list[tuple[int, int, int, int]]:
        """Return (worker, process, part, number) of each worker that is reading."""
        notes = []
        for worker in range(self._num_slots):
            start = _NUM_FIELDS * worker
            process, part, number = self._fields[start : start + _NUM_FIELDS]
            if process:
                notes.append((worker, process, part, number))
        return notes


def _slot() -> int:
    info = get_worker_info()
    return _NUM_FIELDS * (info.id if info is not None else 0)


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raise StalledDataError where the body takes longer; in the main thread alone.

    Args:
        seconds: The limit; 0 sets none.
    """
    if not seconds or threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(signal_number: int, frame: FrameType | None) -> None:
        raise StalledDataError(f"no batch for {seconds:g} seconds")

    before = signal.signal(signal.SIGALRM, stop)
    # Again and again: what is raised in a destructor is lost, and cleaning up may wait too.
    signal.setitimer(signal.ITIMER_REAL, seconds, _SECONDS_BETWEEN_SIGNALS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
