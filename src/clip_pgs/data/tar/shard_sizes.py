"""How many samples each of the shards holds: as stated beside them, or counted."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from time import monotonic

from clip_pgs.data.samples import Skip
from clip_pgs.data.tar.shards import read_sizes
from clip_pgs.data.tar.tar_index import index_shard

logger = logging.getLogger(__name__)

_NUM_READERS = 8
_SECONDS_BETWEEN_REPORTS = 10.0
# A run asks for the same shards again in its checks and in each of its phases.
_counted: dict[tuple[str, int, int], tuple[int, Skip | None]] = {}


@dataclass(frozen=True)
class ShardSizes:
    """The sizes of shards.

    Args:
        sizes: Samples of each shard.
        failures: What is wrong with those that were counted.
    """

    sizes: list[int]
    failures: list[Skip]


def size_shards(shards: list[str], *, use_stated: bool = True) -> ShardSizes:
    """Return how many samples each shard holds.

    Args:
        shards: Local shards that are not compressed.
        use_stated: Believe the `sizes.json` in a shard's folder; shards it leaves out are
            counted, and so are all where there is none.

    Raises:
        ValueError: If a `sizes.json` cannot be understood.
    """
    stated = _stated_sizes(shards) if use_stated else {}
    unknown = list(dict.fromkeys(shard for shard in shards if shard not in stated))
    counted = dict(zip(unknown, _count_all(unknown), strict=True))
    sizes = [stated[shard] if shard in stated else counted[shard][0] for shard in shards]
    return ShardSizes(sizes, [skip for _, skip in counted.values() if skip is not None])


def _stated_sizes(shards: list[str]) -> dict[str, int]:
    by_folder: dict[Path, dict[str, int]] = {}
    stated = {}
    for shard in shards:
        path = Path(shard)
        if path.parent not in by_folder:
            file = path.parent / "sizes.json"
            by_folder[path.parent] = read_sizes(file) if file.is_file() else {}
        if path.name in by_folder[path.parent]:
            stated[shard] = by_folder[path.parent][path.name]
    return stated


def _count_all(shards: list[str]) -> Iterator[tuple[int, Skip | None]]:
    """Yield size and failure of each shard; say now and then how far it is."""
    reported = monotonic()
    # The wait is for the disk, or for another machine's.
    with ThreadPoolExecutor(_NUM_READERS) as executor:
        for num_done, result in enumerate(executor.map(_count, shards), start=1):
            if monotonic() - reported > _SECONDS_BETWEEN_REPORTS:
                reported = monotonic()
                logger.info(
                    "counted the samples of %d of %d shards; a sizes.json beside them saves this",
                    num_done,
                    len(shards),
                )
            yield result


def _count(shard: str) -> tuple[int, Skip | None]:
    try:
        status = os.stat(shard)
        state = (shard, status.st_size, status.st_mtime_ns)
    except OSError:
        state = (shard, -1, -1)
    if state not in _counted:
        index = index_shard(shard)
        _counted[state] = len(index), index.failure
    return _counted[state]
