"""Where a worker's samples come from: shards, shards drawn with replacement, or a table's rows.

An epoch goes through its data in passes; most epochs need one. The samples of a pass are a
function of (seed, epoch, share, pass).
"""

from __future__ import annotations

import io
import random
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from pathlib import Path

from PIL import Image

from clip_pgs.data.order import Share, shuffled, shuffled_stream, stable_seed
from clip_pgs.data.samples import RawSample, Skip
from clip_pgs.data.tables import PairTable
from clip_pgs.data.tar_reader import read_shard

# OpenCLIP's buffer: mixes several shards of the usual 1000 to 10000 pairs.
_BUFFER_SIZE = 5000
_INITIAL_SIZE = 1000


class Source(ABC):
    """What a loader's workers read from."""

    @abstractmethod
    def read(self, share: Share, *, epoch: int, pass_index: int) -> Iterator[RawSample | Skip]:
        """Yield the samples of one pass over this share; every shard yields at least one item."""

    def has_tried_all(self, shards: set[str]) -> bool:
        """Return whether passes that gave these shards can give no others."""
        return True


class ShardSource(Source):
    """Each shard once a pass, shards and samples shuffled.

    Args:
        shards: Expanded shards, dealt to ranks and workers anew each epoch.
        seed: Seed of the order.
    """

    def __init__(self, shards: list[str], *, seed: int) -> None:
        self.shards = shards
        self.seed = seed

    def read(self, share: Share, *, epoch: int, pass_index: int) -> Iterator[RawSample | Skip]:
        """Yield each sample of the share's shards once."""
        mine = share.deal(shuffled(self.shards, "deal", self.seed, epoch))
        if pass_index > 0:
            mine = shuffled(mine, "repeat", self.seed, epoch, pass_index)
        samples = _read_all((shard, pass_index) for shard in mine)
        return _mixed(samples, self.seed, epoch, share, pass_index)


class OrderedShardSource(Source):
    """Each shard once a pass, in order, for one process.

    Every worker reads all shards and hands on its own batches, so that batches are the same for
    any number of workers: a validation loss depends on what shares a batch.

    Args:
        shards: Expanded shards.
        batch_size: Samples that one worker takes in a row.
    """

    def __init__(self, shards: list[str], *, batch_size: int) -> None:
        self.shards = shards
        self.batch_size = batch_size

    def read(self, share: Share, *, epoch: int, pass_index: int) -> Iterator[RawSample | Skip]:
        """Yield the samples of the share's batches."""
        position = 0
        for item in _read_all((shard, pass_index) for shard in self.shards):
            if isinstance(item, Skip):
                if share.worker == 0:
                    yield item
                continue
            if position // self.batch_size % share.num_workers == share.worker:
                yield item
            position += 1


class ResampledShardSource(Source):
    """Shards drawn with replacement; a pass draws as many as there are.

    Args:
        shards: Expanded shards.
        weights: Drawing weight of each shard, or None for equal ones.
        seed: Seed of the draws.
    """

    def __init__(self, shards: list[str], *, weights: list[float] | None, seed: int) -> None:
        self.shards = shards
        self.weights = weights
        self.seed = seed

    def read(self, share: Share, *, epoch: int, pass_index: int) -> Iterator[RawSample | Skip]:
        """Yield the samples of the shards drawn; every worker draws from all of them."""
        index = share.rank * share.num_workers + share.worker
        num_draws = len(self.shards)
        rng = random.Random(stable_seed("draw", self.seed, epoch, index, pass_index))
        drawn = rng.choices(self.shards, weights=self.weights, k=num_draws)
        # Distinct over the epoch, so that a shard drawn twice is augmented in two ways.
        first_visit = pass_index * num_draws
        num_readers = share.world_size * share.num_workers
        visits = (
            (shard, (first_visit + draw) * num_readers + index) for draw, shard in enumerate(drawn)
        )
        return _mixed(_read_all(visits), self.seed, epoch, share, pass_index)

    def has_tried_all(self, shards: set[str]) -> bool:
        """Return whether these are all the shards that can be drawn."""
        weights = self.weights or [1.0] * len(self.shards)
        return all(
            shard in shards for shard, weight in zip(self.shards, weights, strict=True) if weight
        )


class RowSource(Source):
    """Rows that can be read in any order, each once a pass.

    Args:
        num_rows: Number of rows.
        batch_size: Rows that one worker takes in a row; the order of batches then does not
            depend on the number of workers.
        seed: Seed of the order.
        shuffle: Whether to shuffle the rows.
    """

    def __init__(self, num_rows: int, *, batch_size: int, seed: int, shuffle: bool) -> None:
        self.num_rows = num_rows
        self.batch_size = batch_size
        self.seed = seed
        self.shuffle = shuffle

    @abstractmethod
    def read_row(self, row: int, visit: int) -> RawSample | Skip:
        """Read one row."""

    def read(self, share: Share, *, epoch: int, pass_index: int) -> Iterator[RawSample | Skip]:
        """Yield the rows of the share's batches."""
        rows = list(range(self.num_rows))
        if self.shuffle:
            rows = shuffled(rows, "rows", self.seed, epoch)
        # Ranks must have the same number of rows: the first ones come twice where it is uneven.
        rows += rows[: -len(rows) % share.world_size]
        rows = rows[share.rank :: share.world_size]
        starts = range(0, len(rows), self.batch_size)
        for start in starts[share.worker :: share.num_workers]:
            for row in rows[start : start + self.batch_size]:
                yield self.read_row(row, pass_index)


class TableSource(RowSource):
    """Pairs of a table; image paths are relative to the working directory, as OpenCLIP's are."""

    def __init__(self, table: PairTable, *, batch_size: int, seed: int, shuffle: bool) -> None:
        super().__init__(len(table), batch_size=batch_size, seed=seed, shuffle=shuffle)
        self.table = table

    def read_row(self, row: int, visit: int) -> RawSample | Skip:
        """Read one row's image file."""
        shard, path = str(self.table.path), self.table.images[row]
        # Rows count from 1 below the header, as a reader of the table counts them.
        key = f"row {row + 1}"
        try:
            image = Path(path).read_bytes()
        except (OSError, ValueError) as error:
            return Skip(shard, key, "unreadable image file", str(error))
        return RawSample(shard, key, image, self.table.captions[row].encode(), visit)


class BlankSource(RowSource):
    """Black images with one caption, to measure the speed of training without data.

    Args:
        size: (height, width) of the images.
        num_rows: Number of samples.
        batch_size: See `RowSource`.
    """

    def __init__(self, size: tuple[int, int], *, num_rows: int, batch_size: int) -> None:
        super().__init__(num_rows, batch_size=batch_size, seed=0, shuffle=False)
        buffer = io.BytesIO()
        Image.new("RGB", size[::-1]).save(buffer, format="PNG")
        self.image = buffer.getvalue()

    def read_row(self, row: int, visit: int) -> RawSample | Skip:
        """Return the one sample there is."""
        return RawSample("synthetic", str(row), self.image, b"Dummy caption", visit)


def _read_all(visits: Iterable[tuple[str, int]]) -> Iterator[RawSample | Skip]:
    for shard, visit in visits:
        yield from read_shard(shard, visit=visit)


def _mixed(
    samples: Iterator[RawSample | Skip], seed: int, epoch: int, share: Share, pass_index: int
) -> Iterator[RawSample | Skip]:
    place = (share.rank, share.world_size, share.worker, share.num_workers, pass_index)
    return shuffled_stream(
        samples,
        *("mix", seed, epoch, *place),
        buffer_size=_BUFFER_SIZE,
        initial_size=_INITIAL_SIZE,
    )
