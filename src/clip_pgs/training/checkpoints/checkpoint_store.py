"""Saving in the background: the run waits for a copy in memory, a thread for the disk."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from time import perf_counter
from typing import Any

from clip_pgs.checkpoint_io import MOST_RECENT_NAME
from clip_pgs.training.checkpoints.checkpoint import find_non_finite
from clip_pgs.training.checkpoints.checkpoint_files import (
    name_latest,
    remove_older_steps,
    remove_previous_epoch,
    remove_unfinished,
    write_checkpoint,
)
from clip_pgs.training.checkpoints.host_copy import HostCopy

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
        self._under_way: Future[bool] | None = None
        self._last = folder
        remove_unfinished(folder)

    @property
    def is_busy(self) -> bool:
        """Whether the last checkpoint is still being written, so that `save` would wait for it."""
        return self._under_way is not None and not self._under_way.done()

    def save(
        self,
        content: Mapping[str, Any],
        *,
        as_epoch: bool = False,
        as_step: bool = False,
        as_most_recent: bool = False,
    ) -> float:
        """Copy a checkpoint and leave it to be written; nothing is done where no name is asked.

        Args:
            content: From `pack_checkpoint`.
            as_epoch: Write `epoch_N.pt`.
            as_step: Write `step_N.pt`.
            as_most_recent: Write `epoch_latest.pt`.

        Returns:
            The seconds that it held the caller.

        Raises:
            ValueError: If the content holds more than tensors and plain types.
        """
        names = [
            *([f"epoch_{content['epoch']}.pt"] if as_epoch else ()),
            *([f"step_{content['step']}.pt"] if as_step else ()),
            *([MOST_RECENT_NAME] if as_most_recent else ()),
        ]
        if not names:
            return 0.0
        started = perf_counter()
        self.wait()
        copied = self._host.take(content)
        held = perf_counter() - started
        self.held_seconds += held
        self._last = self._folder / names[0]
        self._under_way = self._thread.submit(self._write, copied, names, held)
        return held

    def wait(self) -> bool:
        """Wait for the last checkpoint; return whether it is there, True if none was saved."""
        if self._under_way is None:
            return True
        return self._under_way.result() and self._last.is_file()

    def close(self) -> bool:
        """Wait for the last checkpoint, return as `wait` does, and save nothing more."""
        self._thread.shutdown()
        if self.num_saved or self.num_failed:
            _logger.info(
                "Saved %d checkpoints, %d could not be; saving held the run for %.2f s, %.2f%% of "
                "its time",
                self.num_saved,
                self.num_failed,
                self.held_seconds,
                100 * self.held_seconds / (perf_counter() - self._opened_at),
            )
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
        self._remove_older(content, names)
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
        try:
            if self._keep_last is not None:
                remove_older_steps(self._folder, step=content["step"], keep_last=self._keep_last)
            if self._delete_previous and any(name.startswith("epoch") for name in names):
                remove_previous_epoch(self._folder, epoch=content["epoch"])
        except OSError as error:
            _logger.warning("An older checkpoint could not be removed: %s", error)
