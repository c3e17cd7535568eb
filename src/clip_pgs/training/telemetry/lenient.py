"""Disks that are full: what only tells of a run does not end it."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import TracebackType

from torch import Tensor

from clip_pgs.training.telemetry.sinks import Sink

_logger = logging.getLogger(__name__)


class Lenient:
    """Lets blocks go on that cannot write something, and says so the first time.

    Args:
        what: What they write, as a sentence begins with it.
    """

    def __init__(self, what: str) -> None:
        self._what = what
        self._is_told = False

    def __enter__(self) -> None:
        return None

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> bool:
        if not isinstance(error, OSError):
            return False
        if not self._is_told:
            self._is_told = True
            _logger.warning(
                "%s cannot be written: %s; the run goes on", self._what, error.strerror or error
            )
        return True


class LenientSink:
    """Passes measurements on to a sink, and goes on where it cannot write them.

    Args:
        sink: The sink.
        what: What it writes.
    """

    def __init__(self, sink: Sink, what: str) -> None:
        self._sink = sink
        self._lenient = Lenient(what)

    def train(self, values: Mapping[str, float], *, epoch: int, step: int) -> None:
        """Pass on."""
        with self._lenient:
            self._sink.train(values, epoch=epoch, step=step)

    def validation(
        self, values: Mapping[str, float], *, epoch: int, cost: Mapping[str, float]
    ) -> None:
        """Pass on."""
        with self._lenient:
            self._sink.validation(values, epoch=epoch, cost=cost)

    def picture(self, name: str, pixels: Tensor, *, step: int) -> None:
        """Pass on."""
        with self._lenient:
            self._sink.picture(name, pixels, step=step)

    def close(self) -> None:
        """Pass on."""
        with self._lenient:
            self._sink.close()


@contextmanager
def lenient_threads() -> Iterator[None]:
    """Let threads that cannot write, such as TensorBoard's, end without a traceback.

    Whoever gave them something to write is told by an error of its own.
    """
    before = threading.excepthook

    def hook(ended: threading.ExceptHookArgs) -> None:
        if not isinstance(ended.exc_value, OSError):
            before(ended)

    threading.excepthook = hook
    try:
        yield
    finally:
        threading.excepthook = before
