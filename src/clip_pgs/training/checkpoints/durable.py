"""Files that are there whole or not at all, whenever the process, or the machine, dies."""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

UNFINISHED_ENDING = ".unfinished"


@contextmanager
def durable_file(path: Path) -> Iterator[BinaryIO]:
    """Open a file beside `path` to be written, which takes its place when all went well.

    Args:
        path: The file; what is there stays until the new one is on the disk.

    Raises:
        OSError: If it cannot be written; what was there is still there.
    """
    unfinished = unfinished_path(path)
    try:
        with unfinished.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, path)
        sync(path.parent)
    finally:
        unfinished.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a text file as UTF-8, whole or not at all.

    Raises:
        OSError: If it cannot be written; what was there is still there.
    """
    with durable_file(path) as file:
        file.write(text.encode())


def append_line(path: Path, line: str) -> None:
    """Append a line to a text file that several processes may share, whole or not at all.

    Raises:
        OSError: If it cannot be written; the file is as it was.
    """
    data = f"{line}\n".encode()
    file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        # Over NFS two machines' appends can meet at one place; not every file system has locks.
        with suppress(OSError):
            fcntl.lockf(file, fcntl.LOCK_EX)
        size = os.fstat(file).st_size
        # A disk that fills up takes a part without an error.
        if os.write(file, data) < len(data):
            os.ftruncate(file, size)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    finally:
        os.close(file)


def unfinished_path(path: Path) -> Path:
    """Return where a file or folder is while it is being written."""
    return path.with_name(f".{path.name}{UNFINISHED_ENDING}")


def sync(path: Path) -> None:
    """Wait until a file's content, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
