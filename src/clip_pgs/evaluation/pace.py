"""How much of an evaluation is done, and how long the rest will take."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence


class Pace:
    """Estimates the time left from the bytes read so far.

    Args:
        sizes: Bytes of the pieces of work, in order; None where unknown.
        clock: Seconds that only grow.
    """

    def __init__(
        self, sizes: Sequence[int | None], *, clock: Callable[[], float] = time.perf_counter
    ) -> None:
        self._left = list(sizes)
        self._clock = clock
        self._last = clock()
        self._seconds = 0.0
        self._bytes = 0

    def advance(self, *, was_work: bool) -> None:
        """Count the next piece as over.

        Args:
            was_work: False for a piece that was skipped, which says nothing about the pace.
        """
        now = self._clock()
        size = self._left.pop(0)
        if was_work:
            self._seconds += now - self._last
            self._bytes += size or 0
        self._last = now

    def seconds_left(self) -> float | None:
        """Return how long the rest will take, or None where nothing tells."""
        known = [size for size in self._left if size is not None]
        if not known or len(known) < len(self._left) or not self._bytes:
            return None
        return self._seconds * sum(known) / self._bytes


def format_seconds(seconds: float) -> str:
    """Return a duration as a person says it, such as "40 s", "12 min" or "3.5 h"."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
