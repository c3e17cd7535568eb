"""Log lines of a run: to standard error and to `out.log`, in OpenCLIP's form."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from tqdm import tqdm

_FORMAT = "%(asctime)s | %(levelname)s | %(message)s"
_DATE_FORMAT = "%Y-%m-%d,%H:%M:%S"
_logger = logging.getLogger(__name__)
_CHATTY = ("torch._dynamo", "torch._inductor", "torch._functorch", "torch.fx", "PIL", "fsspec")


class _AboveProgressBar(logging.Handler):
    """Writes lines to standard error without breaking a progress bar there."""

    def emit(self, record: logging.LogRecord) -> None:
        # OpenCLIP's model factory tells its steps through the root logger: a matter for the file.
        if record.name == "root" and record.levelno < logging.WARNING:
            return
        # Where nobody listens any more, there is nobody to tell.
        with suppress(OSError):
            tqdm.write(self.format(record), file=sys.stderr)


class _RunFile(logging.FileHandler):
    """Writes lines to the run's file; where it cannot, it says so once, elsewhere."""

    _is_told = False

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802
        error = sys.exc_info()[1]
        if not isinstance(error, OSError):
            super().handleError(record)
        elif not self._is_told:
            self._is_told = True
            name = Path(self.baseFilename).name
            _logger.warning("%s cannot be written: %s; the run goes on", name, error.strerror)

    def close(self) -> None:
        # What could not be written is tried again.
        with suppress(OSError):
            super().close()


@contextmanager
def logging_to(path: Path | None, *, level: int) -> Iterator[None]:
    """Log to standard error, and to a file where one is given.

    Args:
        path: Appended to.
        level: Lowest level that is shown.
    """
    handlers: list[logging.Handler] = [_AboveProgressBar()]
    unwritten: OSError | None = None
    if path is not None:
        try:
            handlers.append(_RunFile(path))
        except OSError as error:
            unwritten = error
    root = logging.getLogger()
    level_before = root.level
    root.setLevel(level)
    for name in _CHATTY:
        logging.getLogger(name).setLevel(logging.WARNING)
    # A library that logs through the root logger before the run makes it print each line twice.
    others = [handler for handler in root.handlers if type(handler) is logging.StreamHandler]
    for other in others:
        root.removeHandler(other)
    for handler in handlers:
        handler.setFormatter(logging.Formatter(_FORMAT, datefmt=_DATE_FORMAT))
        root.addHandler(handler)
    if unwritten is not None:
        _logger.warning("%s cannot be written: %s; the run goes on", path, unwritten.strerror)
    try:
        yield
    finally:
        root.setLevel(level_before)
        for handler in handlers:
            root.removeHandler(handler)
            handler.close()
        for other in others:
            root.addHandler(other)
