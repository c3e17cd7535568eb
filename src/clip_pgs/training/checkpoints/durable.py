"""Files that are there whole or not at all, whenever the process, or the machine, dies."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
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
