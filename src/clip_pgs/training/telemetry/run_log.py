"""Log lines of a run: to standard error and to `out.log`, in OpenCLIP's form."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tqdm import tqdm

_FORMAT = "%(asctime)s | %(levelname)s | %(message)s"
_DATE_FORMAT = "%Y-%m-%d,%H:%M:%S"
_CHATTY = ("torch._dynamo", "torch._inductor", "torch._functorch", "torch.fx", "PIL", "fsspec")


class _AboveProgressBar(logging.Handler):
    """Writes lines to standard error without breaking a progress bar there."""

    def emit(self, record: logging.LogRecord) -> None:
        # OpenCLIP's model factory tells its steps through the root logger: a matter for the file.
        if record.name == "root" and record.levelno < logging.WARNING:
            return
        tqdm.write(self.format(record), file=sys.stderr)


@contextmanager
def logging_to(path: Path | None, *, level: int) -> Iterator[None]:
    """Log to standard error, and to a file where one is given.

    Args:
        path: Appended to.
        level: Lowest level that is shown.
    """
    handlers: list[logging.Handler] = [_AboveProgressBar()]
    if path is not None:
        handlers.append(logging.FileHandler(path))
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
    try:
        yield
    finally:
        root.setLevel(level_before)
        for handler in handlers:
            root.removeHandler(handler)
            handler.close()
        for other in others:
            root.addHandler(other)
