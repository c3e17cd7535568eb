"""Keeps two launches from training one run at the same time.

A launch may begin while the one before it still saves: ranks that outlive a killed launcher, say.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from clip_pgs.training.survival.exits import BadInputError, unwritten_folder

LOCK_NAME = ".lock"
PATIENCE_SECONDS = 60.0

_POLL_SECONDS = 0.1
_logger = logging.getLogger(__name__)


@contextmanager
def run_lock(folder: Path | None) -> Iterator[None]:
    """Hold a run's folder for this process, as long as the block runs.

    The lock ends with the process, however that ends; a file system without locks has none.

    Args:
        folder: The run's folder; None holds nothing.

    Raises:
        BadInputError: If another process holds it for `PATIENCE_SECONDS`.
        UnwrittenError: If the folder cannot be written.
    """
    if folder is None:
        yield
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # Unbuffered: what a full disk refuses is not tried again when the file is closed.
        file = (folder / LOCK_NAME).open("ab+", buffering=0)
    except OSError as error:
        raise unwritten_folder(error) from error
    with file:
        _wait_for(file, folder)
        # Where the disk is full, the lock holds without a name.
        with suppress(OSError):
            file.truncate(0)
            holder = {"process": os.getpid(), "host": socket.gethostname()}
            file.write(json.dumps(holder).encode())
        yield


def _wait_for(file: IO[bytes], folder: Path) -> None:
    end = time.monotonic() + PATIENCE_SECONDS
    is_told = False
    while not _take(file):
        if time.monotonic() > end:
            raise BadInputError(
                f"{folder} is being trained by {_holder(file)}; wait for its end, or stop it, or "
                f"take another --name (if it is gone, remove {folder / LOCK_NAME})"
            )
        if not is_told:
            _logger.warning("waiting for %s, which still trains %s", _holder(file), folder)
            is_told = True
        time.sleep(_POLL_SECONDS)


def _take(file: IO[bytes]) -> bool:
    try:
        # Not flock, whose locks the data workers of a killed process would go on holding.
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return False
    except OSError:
        # No locks here.
        return True
    return True


def _holder(file: IO[bytes]) -> str:
    file.seek(0)
    with suppress(ValueError, KeyError, TypeError):
        entry = json.loads(file.read())
        return f"process {entry['process']} on {entry['host']}"
    return "another process"
