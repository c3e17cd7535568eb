"""A run's checkpoint files: written whole in the background, found again, set aside if damaged.

    epoch_N.pt, step_N.pt   after N epochs, after N optimizer steps
    epoch_latest.pt         OpenCLIP's `--save-most-recent`
    latest                  the name of the file to go on from, as text
    SHA256SUMS              their checksums, which `sha256sum -c` reads

At every moment `latest` names a file that loads: a file is written beside its place, synced,
read, listed in SHA256SUMS, put into its place, and only then named in `latest`; only after that
are older ones removed. The run waits for a copy in memory, a thread for the disk.
"""

from __future__ import annotations

import errno
import hashlib
import logging
import os
import shutil
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from time import perf_counter
from typing import IO, Any, BinaryIO, cast

import torch

from clip_pgs.checkpoint_reading import (
    LATEST_NAME,
    MOST_RECENT_NAME,
    RUN_FILE,
    SUMS_NAME,
    find_checkpoint,
    newest_checkpoint,
    read_checkpoint,
    read_sums,
)
from clip_pgs.common import CHECKPOINTS_NAME, UNFINISHED_ENDING, atomic_file, write_text
from clip_pgs.tables import counted
from clip_pgs.training.checkpoint import HostCopy, find_non_finite, load_checkpoint, named_tensors
from clip_pgs.training.distributed import ProcessGroup
from clip_pgs.training.options import TrainOptions
from clip_pgs.training.run_folder import trained_steps

DAMAGED_ENDING = ".damaged"

_logger = logging.getLogger(__name__)


class CheckpointStore:
    """Saves a run's checkpoints, one at a time, while the run goes on.

    A checkpoint that cannot be written, or that holds a NaN, is logged as an error and leaves
    all older ones, and `latest`, as they are.

    Args:
        folder: The run's checkpoint folder, in which nobody else writes.
        keep_last: How many files `step_N.pt` to keep, at least 1; None keeps all.
        delete_previous: Remove an epoch's file once the next epoch's is there.

    Attributes:
        held_seconds: How long `save` held its callers, in total.
        num_saved: Checkpoints that were written.
        num_failed: Checkpoints that were not.

    Raises:
        ValueError: If `keep_last` < 1.
    """

    def __init__(
        self, folder: Path, *, keep_last: int | None = None, delete_previous: bool = False
    ) -> None:
        if keep_last is not None and keep_last < 1:
            raise ValueError(f"keep_last must be >= 1, got {keep_last}")
        self.held_seconds = 0.0
        self.num_saved = 0
        self.num_failed = 0
        self._opened_at = perf_counter()
        self._folder = folder
        self._keep_last = keep_last
        self._delete_previous = delete_previous
        self._host = HostCopy()
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoints")
        self._writing: Future[bool] | None = None
        self._last = folder
        self._is_closed = False
        for path in sorted(folder.glob(f".*{UNFINISHED_ENDING}")):
            path.unlink()
            _logger.warning(
                "Removed %s, which was being written when the run was killed", path.name
            )

    @property
    def is_busy(self) -> bool:
        """Whether the last checkpoint is still being written, so that `save` would wait for it."""
        return self._writing is not None and not self._writing.done()

    def save(
        self,
        content: Mapping[str, Any],
        *,
        as_epoch: bool = False,
        as_step: bool = False,
        as_most_recent: bool = False,
    ) -> None:
        """Copy a checkpoint and leave it to be written; nothing is done where no name is asked.

        Args:
            content: From `pack_checkpoint`.
            as_epoch: Write `epoch_N.pt`.
            as_step: Write `step_N.pt`.
            as_most_recent: Write `epoch_latest.pt`.

        Raises:
            ValueError: If the content holds more than tensors and plain types.
        """
        names = [
            *([f"epoch_{content['epoch']}.pt"] if as_epoch else ()),
            *([f"step_{content['step']}.pt"] if as_step else ()),
            *([MOST_RECENT_NAME] if as_most_recent else ()),
        ]
        if not names:
            return
        started = perf_counter()
        self.wait()
        copied = self._host.take(content)
        held = perf_counter() - started
        self.held_seconds += held
        self._last = self._folder / names[0]
        self._writing = self._thread.submit(self._write, copied, names, held)

    def wait(self) -> bool:
        """Wait for the last checkpoint; return whether it is there, True if none was saved."""
        if self._writing is None:
            return True
        return self._writing.result() and self._last.is_file()

    def close(self) -> bool:
        """Wait for the last checkpoint, return as `wait` does, and save nothing more."""
        self._thread.shutdown()
        if not self._is_closed and (self.num_saved or self.num_failed):
            _logger.info(
                "Saved %s%s; saving held the run for %.2f s, %.2f%% of its time",
                counted(self.num_saved, "time"),
                f", {self.num_failed} could not be" if self.num_failed else "",
                self.held_seconds,
                100 * self.held_seconds / (perf_counter() - self._opened_at),
            )
        self._is_closed = True
        return self.wait()

    def _write(self, content: dict[str, Any], names: list[str], held: float) -> bool:
        started = perf_counter()
        what = f"{names[0]} (epoch {content['epoch']}, step {content['step']})"
        trouble = find_non_finite(content) or self._write_files(content, names)
        if trouble is not None:
            self.num_failed += 1
            _logger.error("%s was not saved: %s; older checkpoints are untouched", what, trouble)
            return False
        self.num_saved += 1
        _logger.info(
            "Saved %s: held the run for %.3f s, written in %.3f s",
            what,
            held,
            perf_counter() - started,
        )
        try:
            self._remove_older(content, names)
        except OSError as error:
            _logger.warning("An older checkpoint could not be removed: %s", error)
        return True

    def _write_files(self, content: dict[str, Any], names: list[str]) -> str | None:
        """Write a checkpoint under all its names; return what went wrong, None for nothing."""
        try:
            for name in names:
                write_checkpoint(content, self._folder / name)
                if name == names[0]:
                    name_latest(self._folder / name)
        except OSError as error:
            return error.strerror or str(error)
        except ValueError as error:
            return str(error)
        return None

    def _remove_older(self, content: dict[str, Any], names: list[str]) -> None:
        if self._keep_last is not None:
            steps = self._older("step", below=content["step"] + 1)
            for number in sorted(steps)[: -self._keep_last]:
                steps[number].unlink()
        if self._delete_previous and any(name.startswith("epoch") for name in names):
            epochs = self._older("epoch", below=content["epoch"])
            if epochs:
                epochs[max(epochs)].unlink()

    def _older(self, kind: str, *, below: int) -> dict[int, Path]:
        matches = {
            path: RUN_FILE.fullmatch(path.name) for path in self._folder.glob(f"{kind}_*.pt")
        }
        return {
            int(match[2]): path
            for path, match in matches.items()
            if match and match[2] and int(match[2]) < below
        }


class _HashingWriter:
    """Passes bytes on to a file and hashes what was meant to be written, not what was."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.digest = hashlib.sha256()

    def write(self, data: bytes) -> int:
        self.digest.update(data)
        return self._file.write(data)

    def flush(self) -> None:
        self._file.flush()


def write_checkpoint(content: Mapping[str, Any], path: Path) -> None:
    """Write a checkpoint; what is at its place stays there until the new file is known to load.

    Args:
        content: Tensors and plain types, as from `pack_checkpoint`.
        path: Its place; its folder is made where somebody removed it.

    Raises:
        OSError: If it cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    needed = sum(tensor.nbytes for _, tensor in named_tensors(content))
    free = shutil.disk_usage(path.parent).free
    if needed > free:
        # Filling the disk to find out would fail everybody else's writes.
        raise OSError(
            errno.ENOSPC, f"No space left: it needs {needed / 1e9:.3g} GB of {free / 1e9:.3g} GB"
        )
    with atomic_file(path) as file:
        writer = _HashingWriter(file)
        try:
            torch.save(content, cast("IO[bytes]", writer))
        except RuntimeError as error:
            raise _disk_error(error) from error
        writer.flush()
        read_checkpoint(file.name, use_mmap=True)
        # Until the file is in its place, the sum of the one that it replaces holds as well.
        _list_sum(path, writer.digest.hexdigest(), replaces=False)
    _list_sum(path, writer.digest.hexdigest(), replaces=True)


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
    `clip_pgs.checkpoint_reading.newest_checkpoint` instead, which leaves everything as it is.

    Args:
        folder: A run's checkpoint folder.

    Raises:
        ValueError: If there are checkpoints and all are damaged.
    """
    damaged: dict[Path, ValueError] = {}
    newest = newest_checkpoint(folder, on_damage=damaged.__setitem__)
    if newest is None:
        aside = [path.name for path in sorted(folder.glob(f"*.pt{DAMAGED_ENDING}"))]
        if damaged or aside:
            reason = next(iter(damaged.values()), "they were set aside before")
            names = ", ".join([path.name for path in damaged] + aside)
            raise ValueError(
                f"no checkpoint in {folder} is whole ({names}): {reason}; put back a copy, or "
                "remove the folder to begin anew"
            )
        return None
    for path, damage in damaged.items():
        os.replace(path, path.with_name(path.name + DAMAGED_ENDING))
        _logger.warning("%s; it is set aside as %s%s", damage, path.name, DAMAGED_ENDING)
    pointer = folder / LATEST_NAME
    if pointer.is_file():
        name = Path(pointer.read_text(encoding="utf-8", errors="replace").strip()).name
        if not (folder / name).is_file():
            if RUN_FILE.fullmatch(name) and folder / name not in damaged:
                _logger.warning("%s is gone: going on from %s", folder / name, newest.name)
            name_latest(newest)
    return newest


def load_start(
    options: TrainOptions, folder: Path | None, group: ProcessGroup
) -> dict[str, Any] | None:
    """Return the checkpoint that `--resume` names, None to start fresh.

    Rank 0 looks into folders, so that all ranks load the same file, or refuse alike.
    """
    if options.resume is None:
        return None
    path, trouble = None, ""
    if options.rank == 0:
        try:
            path = _find_start(options, folder)
        except ValueError as error:
            trouble = str(error)
    path, trouble = group.broadcast((path, trouble))
    if trouble:
        raise ValueError(trouble)
    if path is None:
        steps = trained_steps(folder)[0] if folder is not None and options.rank == 0 else 0
        if steps:
            lost = counted(steps, "step")
            _logger.warning(
                "Nothing in %s was saved: its %s are lost; starting fresh", folder, lost
            )
        else:
            _logger.info("No checkpoint in %s yet: starting fresh", folder)
        return None
    checkpoint = load_checkpoint(path)
    place = checkpoint.get("epoch", 0), checkpoint.get("position", 0)
    _logger.info("Resuming from %s (epoch %d, sample %d of it)", path, *place)
    return checkpoint


def _find_start(options: TrainOptions, folder: Path | None) -> Path | None:
    path = options.resume
    if path == "latest":
        assert folder is not None
        latest = find_latest(folder / CHECKPOINTS_NAME)
        if latest is not None or options.resume_instead is None:
            return latest
        path = options.resume_instead
    assert path is not None
    return find_checkpoint(path)
