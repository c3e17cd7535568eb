"""A run's checkpoint files: written whole, found again, set aside where they are damaged.

    epoch_N.pt, step_N.pt   after N epochs, after N optimiser steps
    epoch_latest.pt         OpenCLIP's `--save-most-recent`
    latest                  the name of the file to go on from, as text
    SHA256SUMS              their checksums, which `sha256sum -c` reads

At every moment `latest` names a file that loads: a file is written beside its place, synced,
read, listed in SHA256SUMS, put into its place, and only then named in `latest`; only after that
are older ones removed.
"""

from __future__ import annotations

import errno
import hashlib
import logging
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any, BinaryIO, cast

import torch

from clip_pgs.checkpoint_io import (
    LATEST_NAME,
    RUN_FILE,
    SUMS_NAME,
    newest_checkpoint,
    read_checkpoint,
    read_sums,
)
from clip_pgs.common import UNFINISHED_ENDING, atomic_file, write_text
from clip_pgs.training.checkpoints.checkpoint import named_tensors

DAMAGED_ENDING = ".damaged"

_logger = logging.getLogger(__name__)


class _HashingWriter:
    """Passes bytes on to a file and hashes what was meant to be written, not what was."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._digest = hashlib.sha256()

    def write(self, data: bytes) -> int:
        self._digest.update(data)
        return self._file.write(data)

    def flush(self) -> None:
        self._file.flush()

    def hexdigest(self) -> str:
        return self._digest.hexdigest()


def write_checkpoint(content: Mapping[str, Any], path: Path) -> None:
    """Write a checkpoint; what is at its place stays there until the new file is known to load.

    Args:
        content: Tensors and plain types, as from `pack_checkpoint`.
        path: Its place; its folder is made where somebody removed it.

    Raises:
        OSError: If it cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    _check_space(content, path.parent)
    with atomic_file(path) as file:
        writer = _HashingWriter(file)
        try:
            torch.save(content, cast("IO[bytes]", writer))
        except RuntimeError as error:
            raise _disk_error(error) from error
        writer.flush()
        read_checkpoint(file.name, use_mmap=True)
        # Until the file is in its place, the sum of the one that it replaces holds as well.
        _list_sum(path, writer.hexdigest(), replaces=False)
    _list_sum(path, writer.hexdigest(), replaces=True)


def _check_space(content: Mapping[str, Any], folder: Path) -> None:
    """Refuse what cannot fit: filling the disk to find out would fail everybody else's writes."""
    needed = sum(tensor.nbytes for _, tensor in named_tensors(content))
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise OSError(
            errno.ENOSPC, f"No space left: it needs {needed / 1e9:.3g} GB of {free / 1e9:.3g} GB"
        )


def _disk_error(error: RuntimeError) -> OSError:
    """Return what went wrong; torch tells it as a wrong position in the archive."""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, OSError):
        cause = cause.__context__
    return cause or OSError(str(error))


def _list_sum(path: Path, digest: str, *, replaces: bool) -> None:
    """List a file's checksum and drop those of files that are gone."""
    earlier = read_sums(path.parent)
    new = (path.name, digest)
    sums = [line for line in earlier if (path.parent / line[0]).exists() and line != new]
    if replaces:
        sums = [line for line in sums if line[0] != path.name]
    sums.append(new)
    if sums != earlier:
        text = "".join(f"{digest}  {name}\n" for name, digest in sums)
        write_text(path.with_name(SUMS_NAME), text)


def name_latest(path: Path) -> None:
    """Make `latest` name a checkpoint beside it.

    Raises:
        OSError: If it cannot be written; it then names the one before.
    """
    write_text(path.with_name(LATEST_NAME), f"{path.name}\n")


def find_latest(folder: Path) -> Path | None:
    """Return the checkpoint that got furthest among those of a folder that are whole.

    Files that cannot be read or whose checksum is wrong are named in a warning and set aside, as
    `*.damaged`, where one is whole. Who looks into the folder of a run that may be under way calls
    `clip_pgs.checkpoint_io.newest_checkpoint` instead, which leaves everything as it is.

    Args:
        folder: A run's checkpoint folder.

    Raises:
        ValueError: If there are checkpoints and all are damaged.
    """
    damaged: dict[Path, ValueError] = {}
    newest = newest_checkpoint(folder, on_damage=damaged.__setitem__)
    if newest is None:
        _refuse_damage(folder, damaged)
        return None
    for path, error in damaged.items():
        _set_aside(path, error)
    _correct_latest(newest)
    return newest


def _refuse_damage(folder: Path, damaged: Mapping[Path, ValueError]) -> None:
    """Refuse to begin again where what was trained is there and cannot be read."""
    aside = [path.name for path in sorted(folder.glob(f"*.pt{DAMAGED_ENDING}"))]
    if damaged or aside:
        reason = next(iter(damaged.values()), "they were set aside before")
        names = ", ".join([path.name for path in damaged] + aside)
        raise ValueError(
            f"no checkpoint in {folder} is whole ({names}): {reason}; put back a copy, or remove "
            "the folder to begin anew"
        )


def _correct_latest(path: Path) -> None:
    """Let `latest` name a file that is whole, should it name one that was not."""
    pointer = path.with_name(LATEST_NAME)
    if not pointer.is_file():
        return
    name = pointer.read_text(encoding="utf-8", errors="replace").strip()
    if not (path.parent / Path(name).name).is_file():
        name_latest(path)


def _set_aside(path: Path, error: ValueError) -> None:
    aside = path.with_name(path.name + DAMAGED_ENDING)
    os.replace(path, aside)
    _logger.warning("%s; it is set aside as %s", error, aside.name)


def remove_unfinished(folder: Path) -> None:
    """Remove what a process left that died while it was writing; nobody else may be writing."""
    for path in sorted(folder.glob(f".*{UNFINISHED_ENDING}")):
        path.unlink()
        _logger.warning("Removed %s, which was being written when the run was killed", path.name)


def remove_older_steps(folder: Path, *, step: int, keep_last: int) -> None:
    """Remove all but the last `keep_last` of the files `step_N.pt` up to step `step`."""
    steps = {number: path for number, path in _numbered(folder, "step").items() if number <= step}
    for number in sorted(steps)[:-keep_last]:
        steps[number].unlink()


def remove_previous_epoch(folder: Path, *, epoch: int) -> None:
    """Remove the file of the last epoch before `epoch` that has one."""
    older = {number: path for number, path in _numbered(folder, "epoch").items() if number < epoch}
    if older:
        older[max(older)].unlink()


def _numbered(folder: Path, kind: str) -> dict[int, Path]:
    matches = {path: RUN_FILE.fullmatch(path.name) for path in folder.glob(f"{kind}_*.pt")}
    return {int(match[2]): path for path, match in matches.items() if match and match[2]}
