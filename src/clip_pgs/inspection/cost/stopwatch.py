"""The time that consecutive parts of a computation take, on a CPU or a GPU."""

from __future__ import annotations

from time import perf_counter, process_time

import torch


class Stopwatch:
    """Measures consecutive parts.

    A GPU is timed by its own events, so that nothing waits in between; one thread of a CPU by
    processor time, which other processes do not lengthen; several threads by the clock.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._clock = process_time if torch.get_num_threads() == 1 else perf_counter
        self._marks: list[torch.cuda.Event | float] = []
        self.mark()

    def mark(self) -> None:
        """End a part and begin the next."""
        if self._device.type != "cuda":
            self._marks.append(self._clock())
            return
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._device))
        self._marks.append(event)

    def parts(self) -> list[float]:
        """Wait for the device and return the seconds of each part."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        pairs = zip(self._marks, self._marks[1:], strict=False)
        return [_seconds_between(first, second) for first, second in pairs]


def _seconds_between(first: torch.cuda.Event | float, second: torch.cuda.Event | float) -> float:
    if isinstance(first, float) or isinstance(second, float):
        assert isinstance(first, float)
        assert isinstance(second, float)
        return second - first
    return first.elapsed_time(second) / 1000
