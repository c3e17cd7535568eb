"""`skipped.jsonl`: every sample and shard that a run could not use, a JSON object each."""

from __future__ import annotations

import json
from pathlib import Path

from clip_pgs.common import append_line
from clip_pgs.data.skips import Skip
from clip_pgs.training.telemetry.lenient import Lenient
from clip_pgs.training.telemetry.sinks import keep_lines_before

SKIPPED_NAME = "skipped.jsonl"


class SkipLog:
    """Writes down and counts what one process of a run skips.

    Args:
        folder: The run's folder, in which all processes share the file; None counts only.
        rank: This process.

    Attributes:
        step: The optimiser step that samples are being fetched for.
    """

    def __init__(self, folder: Path | None, *, rank: int) -> None:
        self.step = 0
        self._path = None if folder is None else folder / SKIPPED_NAME
        self._rank = rank
        self._is_open = False
        self._waiting: list[Skip] = []
        self._shards: set[tuple[str | None, str | None]] = set()
        self._num_new = 0
        self._lenient = Lenient(SKIPPED_NAME)

    def open(self, *, step: int) -> None:
        """Begin at a step, from which on an earlier launch's lines are dropped by rank 0."""
        self.step = step
        self._is_open = True
        if self._path is not None and self._rank == 0:
            with self._lenient:
                kept = keep_lines_before(self._path, step)
                self._shards = {(e.get("shard"), e.get("reason")) for e in kept if not e.get("key")}
        for skip in self._waiting:
            self(skip)
        self._waiting.clear()

    def __call__(self, skip: Skip) -> None:
        """Take in one; those that come before `open` wait for it."""
        if not self._is_open:
            self._waiting.append(skip)
            return
        if not skip.key:
            # A bad shard is found anew by each launch and each phase.
            if (skip.shard, skip.reason) in self._shards:
                return
            self._shards.add((skip.shard, skip.reason))
        self._num_new += 1
        if self._path is not None:
            entry = {"step": self.step, "rank": self._rank, **vars(skip)}
            with self._lenient:
                self._path.parent.mkdir(parents=True, exist_ok=True)
                append_line(self._path, json.dumps(entry))

    def take_count(self) -> int:
        """Return how many came since the last call."""
        count, self._num_new = self._num_new, 0
        return count
