"""Files and folders of somebody else, which may not be read."""

import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

# Linux's version 3 of capabilities, and those to pass over what a file's mode says.
_VERSION, _OVERRIDE = 0x20080522, 0b110


@contextmanager
def unreadable(*paths: Path) -> Iterator[None]:
    """Let nobody read some paths, the administrator included, within the block."""
    modes = [path.stat().st_mode for path in paths]
    header, sets = (ctypes.c_uint32 * 2)(_VERSION, 0), (ctypes.c_uint32 * 6)()
    libc = ctypes.CDLL(None)
    is_kept = libc.capget(header, sets) == 0
    effective = sets[0]
    for path in paths:
        path.chmod(0)
    try:
        if is_kept:
            sets[0] &= ~_OVERRIDE
            libc.capset(header, sets)
        if os.access(paths[0], os.R_OK, effective_ids=True):
            pytest.skip("this process may read every file")
        yield
    finally:
        if is_kept:
            sets[0] = effective
            libc.capset(header, sets)
        for path, mode in zip(paths, modes, strict=True):
            path.chmod(mode)
