"""Shards whose samples are read in any order."""

from __future__ import annotations

import os
import resource
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

from clip_pgs.data.epoch_plan import MAX_LANES, SampleRef
from clip_pgs.data.samples import RawSample, Skip
from clip_pgs.data.sources import Source
from clip_pgs.data.tar.tar_index import ShardIndex, empty_index, index_file
from clip_pgs.data.tar.tar_reader import unreadable_shard

# One for each lane, and for some that change over from one shard to the next.
_MAX_OPEN = MAX_LANES + 64


@dataclass(frozen=True)
class _OpenShard:
    index: ShardIndex
    file: int | None

    def close(self) -> None:
        if self.file is not None:
            os.close(self.file)


class ShardSource(Source):
    """The samples of local shards; those in use stay open, with the places of their samples.

    Args:
        shards: Expanded local shards that are not compressed.
    """

    def __init__(self, shards: list[str]) -> None:
        self.shards = shards
        self._open: OrderedDict[int, _OpenShard] = OrderedDict()
        # Others in this process need files too.
        self._max_open = min(_MAX_OPEN, resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 2)

    def read(self, ref: SampleRef) -> RawSample | Skip:
        """Read one sample of a shard."""
        opened = self._opened(ref.part)
        index = opened.index
        if opened.file is not None and ref.number < len(index):
            return index.read(opened.file, ref.number, visit=ref.visit)
        key = f"sample {ref.number + 1}"
        if index.failure is not None:
            return Skip(index.shard, key, index.failure.reason, index.failure.detail)
        detail = f"the shard has {len(index)}, fewer than its sizes.json says"
        return Skip(index.shard, key, "no such sample", detail)

    def describe(self, part: int, number: int) -> str:
        """Return the shard and the number of the sample."""
        return f"{self.shards[part]}: sample {number + 1}"

    def _opened(self, part: int) -> _OpenShard:
        opened = self._open.get(part)
        if opened is None:
            while len(self._open) >= self._max_open:
                self._open.popitem(last=False)[1].close()
            opened = self._open[part] = _open_shard(self.shards[part])
        self._open.move_to_end(part)
        return opened

    def __getstate__(self) -> dict[str, Any]:
        # Another process opens its own.
        return {**self.__dict__, "_open": OrderedDict()}


def _open_shard(shard: str) -> _OpenShard:
    try:
        file = os.open(shard, os.O_RDONLY | os.O_CLOEXEC)
    except (OSError, ValueError) as error:
        return _OpenShard(empty_index(unreadable_shard(shard, error)), None)
    return _OpenShard(index_file(shard, file), file)
