"""Which sample stands at which position of an epoch.

A plan is a pure function of the seed, the epoch and the sizes of the data: it knows neither
ranks nor workers nor batches, so that a run may go on with others of them, at any position,
without reading what comes before. Nothing here keeps state: OpenCLIP's sample shuffle seeds
itself from process id and time, so that no two of its runs see the same order.
"""

from __future__ import annotations

import hashlib
import math
import random
from abc import ABC, abstractmethod
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from functools import lru_cache
from itertools import accumulate
from statistics import median_low
from typing import NamedTuple, TypeVar

import numpy as np

T = TypeVar("T")

# Lanes are read side by side. Enough of them to mix, few enough to keep their shards open.
MAX_LANES = 256
# Samples from one lane in a row: a reader of every eighth batch, say, then opens few shards.
_CHUNK = 32
# Samples that change places within a shard.
_WINDOW = 4096
# Samples drawn from a shard before another is drawn.
_RUN = 512


def stable_seed(*parts: int | str) -> int:
    """Return a seed in [0, 2**63) that depends on the parts alone, on every machine."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def shuffled(items: Iterable[T], *parts: int | str) -> list[T]:
    """Return the items in an order that depends on the parts alone."""
    order = list(items)
    random.Random(stable_seed(*parts)).shuffle(order)
    return order


def permutation(size: int, *parts: int | str) -> np.ndarray:
    """Return the numbers below `size` in an order that depends on the parts alone.

    Returns:
        Shape (size,), the smallest unsigned integers that hold them.
    """
    # Numpy promises the numbers of RandomState, and of no other generator, for all time.
    generator = np.random.RandomState(stable_seed(*parts) % 2**32)
    return generator.permutation(size).astype(np.min_scalar_type(max(size - 1, 0)))


class SampleRef(NamedTuple):
    """A sample of the data, and which of its appearances in an epoch this is.

    Args:
        shard: In [0, number of shards); 0 in a table.
        number: Its place there, from 0.
        repeat: Tells appearances apart; 0 for the first.
    """

    shard: int
    number: int
    repeat: int = 0


class EpochPlan(ABC):
    """The order of an epoch.

    Attributes:
        num_samples: Positions after which a plan comes to the first sample again; may be 0.
    """

    num_samples: int

    @abstractmethod
    def sample_at(self, epoch: int, position: int) -> SampleRef:
        """Return the sample at a position >= 0; the plan must have samples."""


class OrderedPlan(EpochPlan):
    """Every sample once, in the order of the data.

    Args:
        sizes: Samples of each shard.
    """

    def __init__(self, sizes: Sequence[int]) -> None:
        self.num_samples = sum(sizes)
        self._ends = list(accumulate(sizes))

    def sample_at(self, epoch: int, position: int) -> SampleRef:
        """Return the sample at a position, the same in each epoch."""
        repeat, position = divmod(position, self.num_samples)
        shard = bisect_right(self._ends, position)
        start = self._ends[shard - 1] if shard else 0
        return SampleRef(shard, position - start, repeat)


class RowPlan(EpochPlan):
    """Every row once, in an order that differs between epochs.

    Args:
        num_rows: Number of rows.
        seed: Seed of the order.
    """

    def __init__(self, num_rows: int, *, seed: int) -> None:
        self.num_samples = num_rows
        self._seed = seed

    def sample_at(self, epoch: int, position: int) -> SampleRef:
        """Return the row at a position."""
        repeat, position = divmod(position, self.num_samples)
        rows = _row_order(self.num_samples, self._seed, epoch, repeat)
        return SampleRef(0, int(rows[position]), repeat)


class ShardPlan(EpochPlan):
    """Every sample of the shards once, in an order that differs between epochs.

    The shards are shuffled and laid end to end; the line is cut into lanes of equal length, which
    give chunks in turn. Samples change places within windows, which lie in one lane and shard.

    Args:
        sizes: Samples of each shard.
        seed: Seed of the order.
        num_earlier: How often each stands before in the list of shards, so that its samples are
            further appearances of the same; None counts as 0 for each.
    """

    def __init__(
        self, sizes: Sequence[int], *, seed: int, num_earlier: Sequence[int] | None = None
    ) -> None:
        self.num_samples = sum(sizes)
        self._num_earlier = [0] * len(sizes) if num_earlier is None else num_earlier
        self._num_copies = 1 + max(self._num_earlier, default=0)
        self._sizes = tuple(sizes)
        self._seed = seed
        self._num_lanes = min(MAX_LANES, sum(size > 0 for size in sizes))

    def sample_at(self, epoch: int, position: int) -> SampleRef:
        """Return the sample at a position."""
        repeat, position = divmod(position, self.num_samples)
        lane, place = self._in_lanes(position)
        first, end = self._lane_start(lane), self._lane_start(lane + 1)
        line, starts = self._lay_out(epoch, repeat)
        nth = bisect_right(starts, first + place) - 1
        shard, shard_start = line[nth], starts[nth]

        first = max(first, shard_start)
        end = min(end, shard_start + self._sizes[shard])
        offset = self._lane_start(lane) + place - first
        window = offset // _WINDOW * _WINDOW
        size = min(_WINDOW, end - first - window)
        place_in_shard = first - shard_start + window
        moved = _window_order(size, self._seed, epoch, repeat, shard, place_in_shard)
        appearance = repeat * self._num_copies + self._num_earlier[shard]
        return SampleRef(shard, place_in_shard + int(moved[offset - window]), appearance)

    # What a reader needs again for the samples that follow.
    @lru_cache(maxsize=4)  # noqa: B019 - a run has one plan, which lives as long as it reads
    def _lay_out(self, epoch: int, repeat: int) -> tuple[list[int], list[int]]:
        """Return the filled shards in the order of a pass over an epoch, and where each starts."""
        line = [shard for shard, size in enumerate(self._sizes) if size > 0]
        line = shuffled(line, "shards", self._seed, epoch, repeat)
        return line, [0, *accumulate(self._sizes[shard] for shard in line[:-1])]

    def _lane_start(self, lane: int) -> int:
        length, num_longer = divmod(self.num_samples, self._num_lanes)
        return lane * length + min(lane, num_longer)

    def _in_lanes(self, position: int) -> tuple[int, int]:
        """Return the lane of a position, and the place in the lane."""
        num_rounds = self.num_samples // self._num_lanes // _CHUNK
        chunk, offset = divmod(position, _CHUNK)
        round_index, lane = divmod(chunk, self._num_lanes)
        if round_index < num_rounds:
            return lane, round_index * _CHUNK + offset
        # What does not fill a chunk in each lane comes sample by sample.
        position -= num_rounds * _CHUNK * self._num_lanes
        offset, lane = divmod(position, self._num_lanes)
        return lane, num_rounds * _CHUNK + offset


class ResampledPlan(EpochPlan):
    """Samples of shards drawn with replacement, lane by lane, as often as their size and weight.

    OpenCLIP draws a shard by its weight and reads it through, so that a sample of a large shard
    comes as often as one of a small shard; the same holds here.

    Args:
        sizes: Samples of each shard.
        weights: Drawing weight of each shard, or None for equal ones.
        seed: Seed of the draws.
    """

    def __init__(self, sizes: Sequence[int], *, weights: Sequence[float] | None, seed: int) -> None:
        filled = [
            (size, 1.0 if weights is None else weights[shard], shard)
            for shard, size in enumerate(sizes)
            if size > 0 and (weights is None or weights[shard] > 0)
        ]
        self.num_samples = sum(size for size, _, _ in filled)
        self._seed = seed
        if not filled:
            return
        self._sizes = [size for size, _, _ in filled]
        self._shards = [shard for _, _, shard in filled]
        self._ends = list(accumulate(size * weight for size, weight, _ in filled))
        # Small shards are drawn from more often, so that they still mix.
        self._chunk = min(_CHUNK, median_low(self._sizes))
        self._chunks_per_run = min(_RUN, median_low(self._sizes)) // self._chunk
        self._num_lanes = min(MAX_LANES, len(filled))
        self._num_passes = math.ceil(self._run_length / min(self._sizes))

    def sample_at(self, epoch: int, position: int) -> SampleRef:
        """Return the sample at a position; later passes draw on."""
        chunk, offset = divmod(position, self._chunk)
        round_index, lane = divmod(chunk, self._num_lanes)
        nth_draw, chunk_in_run = divmod(round_index, self._chunks_per_run)
        shard, numbers = self._draw(epoch, lane, nth_draw)
        nth_pass, place = divmod(chunk_in_run * self._chunk + offset, len(numbers))
        # Distinct over the epoch, so that a sample drawn twice is augmented in two ways.
        repeat = (nth_draw * self._num_passes + nth_pass) * self._num_lanes + lane
        return SampleRef(shard, int(numbers[place]), repeat)

    @lru_cache(maxsize=2 * MAX_LANES)  # noqa: B019 - as above
    def _draw(self, epoch: int, lane: int, nth_draw: int) -> tuple[int, np.ndarray]:
        """Return a shard and the samples of it, each once, that follow in a lane.

        Returns:
            The shard, and numbers of shape (V,), V being at most a run's length.
        """
        place = (self._seed, epoch, lane, nth_draw)
        drawn = random.Random(stable_seed("draw", *place)).random() * self._ends[-1]
        nth = min(bisect_right(self._ends, drawn), len(self._ends) - 1)
        numbers = permutation(self._sizes[nth], "visit", *place)[: self._run_length]
        return self._shards[nth], numbers.copy()

    @property
    def _run_length(self) -> int:
        return self._chunks_per_run * self._chunk


@lru_cache(maxsize=2 * MAX_LANES)
def _window_order(size: int, *parts: int) -> np.ndarray:
    return permutation(size, "window", *parts)


@lru_cache(maxsize=2)
def _row_order(num_rows: int, *parts: int) -> np.ndarray:
    return permutation(num_rows, "rows", *parts)
