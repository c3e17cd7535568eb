"""Shards that can only be read from the beginning: URLs, commands and compressed files.

An epoch goes through its shards in passes; most epochs need one. The samples of a pass are a
function of (seed, epoch, share, pass).
"""

from __future__ import annotations

import random
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator

from clip_pgs.data.order import Share, shuffled, shuffled_stream, stable_seed
from clip_pgs.data.samples import RawSample, Skip
from clip_pgs.data.tar.tar_reader import read_shard
from clip_pgs.data.whereabouts import Whereabouts

# OpenCLIP's buffer: mixes several shards of the usual 1000 to 10000 pairs.
_BUFFER_SIZE = 5000
_INITIAL_SIZE = 1000


class SequentialSource(ABC):
    """What a loader's workers read through.

    Args:
        shards: Expanded shards.
        seed: Seed of the order.
    """

    def __init__(self, shards: list[str], *, seed: int) -> None:
        self.shards = shards
        self.seed = seed

    @abstractmethod
    def read(
        self, share: Share, whereabouts: Whereabouts, *, epoch: int, pass_index: int
    ) -> Iterator[RawSample | Skip]:
        """Yield the samples of one pass over this share; every shard yields at least one item."""

    def has_tried_all(self, shards: set[str]) -> bool:
        """Return whether passes that gave these shards can give no others."""
        return True

    def _read_all(
        self, visits: Iterable[tuple[int, int]], whereabouts: Whereabouts
    ) -> Iterator[RawSample | Skip]:
        for part, visit in visits:
            whereabouts.note(part, 0)
            for number, item in enumerate(read_shard(self.shards[part], visit=visit)):
                yield item
                whereabouts.note(part, number + 1)

    def _mixed(
        self,
        visits: Iterable[tuple[int, int]],
        whereabouts: Whereabouts,
        share: Share,
        epoch: int,
        pass_index: int,
    ) -> Iterator[RawSample | Skip]:
        place = (share.rank, share.world_size, share.worker, share.num_workers, pass_index)
        return shuffled_stream(
            self._read_all(visits, whereabouts),
            *("mix", self.seed, epoch, *place),
            buffer_size=_BUFFER_SIZE,
            initial_size=_INITIAL_SIZE,
        )


class ShuffledShards(SequentialSource):
    """Each shard once a pass, dealt to ranks and workers anew each epoch; samples shuffled."""

    def read(
        self, share: Share, whereabouts: Whereabouts, *, epoch: int, pass_index: int
    ) -> Iterator[RawSample | Skip]:
        """Yield each sample of the share's shards once."""
        mine = share.deal(shuffled(range(len(self.shards)), "deal", self.seed, epoch))
        if pass_index > 0:
            mine = shuffled(mine, "repeat", self.seed, epoch, pass_index)
        visits = [(part, pass_index) for part in mine]
        return self._mixed(visits, whereabouts, share, epoch, pass_index)


class OrderedShards(SequentialSource):
    """Each shard once a pass, in order, for one process.

    Every worker reads all shards and hands on its own batches, so that batches are the same for
    any number of workers: a validation loss depends on what shares a batch.

    Args:
        shards: Expanded shards.
        batch_size: Samples that one worker takes in a row.
    """

    def __init__(self, shards: list[str], *, batch_size: int) -> None:
        super().__init__(shards, seed=0)
        self.batch_size = batch_size

    def read(
        self, share: Share, whereabouts: Whereabouts, *, epoch: int, pass_index: int
    ) -> Iterator[RawSample | Skip]:
        """Yield the samples of the share's batches."""
        visits = [(part, pass_index) for part in range(len(self.shards))]
        position = 0
        for item in self._read_all(visits, whereabouts):
            if isinstance(item, Skip):
                if share.worker == 0:
                    yield item
                continue
            if position // self.batch_size % share.num_workers == share.worker:
                yield item
            position += 1


class ResampledShards(SequentialSource):
    """Shards drawn with replacement; a pass draws as many as there are.

    Args:
        shards: Expanded shards.
        weights: Drawing weight of each shard, or None for equal ones.
        seed: Seed of the draws.
    """

    def __init__(self, shards: list[str], *, weights: list[float] | None, seed: int) -> None:
        super().__init__(shards, seed=seed)
        self.weights = weights

    def read(
        self, share: Share, whereabouts: Whereabouts, *, epoch: int, pass_index: int
    ) -> Iterator[RawSample | Skip]:
        """Yield the samples of the shards drawn; every worker draws from all of them."""
        index = share.rank * share.num_workers + share.worker
        num_draws = len(self.shards)
        rng = random.Random(stable_seed("draw", self.seed, epoch, index, pass_index))
        drawn = rng.choices(range(num_draws), weights=self.weights, k=num_draws)
        # Distinct over the epoch, so that a shard drawn twice is augmented in two ways.
        first_visit = pass_index * num_draws
        num_readers = share.world_size * share.num_workers
        visits = [
            (part, (first_visit + draw) * num_readers + index) for draw, part in enumerate(drawn)
        ]
        return self._mixed(visits, whereabouts, share, epoch, pass_index)

    def has_tried_all(self, shards: set[str]) -> bool:
        """Return whether these are all the shards that can be drawn."""
        weights = self.weights or [1.0] * len(self.shards)
        return all(
            shard in shards for shard, weight in zip(self.shards, weights, strict=True) if weight
        )
