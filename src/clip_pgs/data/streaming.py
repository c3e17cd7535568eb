"""Shards that can only be read from the beginning: URLs, commands and compressed files.

Order depends on ranks and workers, as OpenCLIP's does: an epoch goes through its shards in passes
(most need one), and the samples of a pass are a function of (seed, epoch, worker, pass). To enter
an epoch in the middle, a worker reads what comes before without decoding it.
"""

from __future__ import annotations

import logging
import math
import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import count
from multiprocessing.sharedctypes import RawArray
from typing import Literal, TypeVar

from torch.utils.data import IterableDataset, get_worker_info

from clip_pgs.data.batches import Batch, Batching, DataWorkerStatus, Example, collate, decode_item
from clip_pgs.data.plan import shuffled, stable_seed
from clip_pgs.data.samples import RawSample, SampleDecoder
from clip_pgs.data.skips import Skip
from clip_pgs.data.tar import read_shard

logger = logging.getLogger(__name__)

T = TypeVar("T")

# OpenCLIP's shuffle buffer: mixes several shards of the usual 1000 to 10000 pairs.
_BUFFER_SIZE = 5000
_INITIAL_SIZE = 1000
# Skips are reported with the next batch, or without one when this many wait.
_MAX_PENDING_SKIPS = 256
# A worker that meets so many bad pairs in a row gives up.
_MAX_BAD_IN_ROW = 10_000


@dataclass(frozen=True)
class Worker:
    """Which of all workers reads.

    Args:
        rank: Its process, in [0, world_size).
        world_size: Number of processes.
        index: In [0, num_workers), within the process.
        num_workers: Workers per process, at least 1.
    """

    rank: int = 0
    world_size: int = 1
    index: int = 0
    num_workers: int = 1


@dataclass(frozen=True)
class StreamingSource:
    """What a loader's workers read through, in passes.

    Args:
        shards: Expanded shards.
        order: "shuffled": each shard once a pass, dealt to ranks and workers anew each epoch, and
            samples mixed. "resampled": every worker draws as many shards as there are, with
            replacement, and mixes samples. "ordered": all workers of one process read all shards
            and hand on their own batches, so that batches are the same for any number of workers:
            a validation loss depends on what shares a batch.
        seed: Seed of the order.
        weights: Drawing weight of each shard, or None for equal ones.
        use_json: Take the side-car JSON for the caption.
    """

    shards: list[str]
    order: Literal["shuffled", "resampled", "ordered"]
    seed: int = 0
    weights: list[float] | None = None
    use_json: bool = False

    def read(
        self,
        worker: Worker,
        status: DataWorkerStatus,
        batch_size: int,
        *,
        epoch: int,
        pass_index: int,
    ) -> Iterator[RawSample | Skip]:
        """Yield the samples of one pass of a worker; every shard yields at least one item."""
        items = self._read_all(self._turns(worker, epoch, pass_index), status)
        if self.order == "ordered":
            return _own_batches(items, worker, batch_size)
        place = (worker.rank, worker.world_size, worker.index, worker.num_workers, pass_index)
        seed = stable_seed("mix", self.seed, epoch, *place)
        return shuffled_stream(items, seed, buffer_size=_BUFFER_SIZE, initial_size=_INITIAL_SIZE)

    def has_tried_all(self, shards: set[str]) -> bool:
        """Return whether passes that gave these shards can give no others."""
        weights = self.weights or [1.0] * len(self.shards)
        drawn = [shard for shard, weight in zip(self.shards, weights, strict=True) if weight]
        return self.order != "resampled" or shards.issuperset(drawn)

    def _turns(self, worker: Worker, epoch: int, pass_index: int) -> list[tuple[int, int]]:
        """Return the shards of a pass, each with what tells its repetitions apart."""
        numbers = range(len(self.shards))
        if self.order == "ordered":
            return [(shard, pass_index) for shard in numbers]
        if self.order == "shuffled":
            dealt = shuffled(numbers, "deal", self.seed, epoch)
            mine = dealt[worker.rank :: worker.world_size][worker.index :: worker.num_workers]
            if pass_index > 0:
                mine = shuffled(mine, "repeat", self.seed, epoch, pass_index)
            return [(shard, pass_index) for shard in mine]
        index = worker.rank * worker.num_workers + worker.index
        rng = random.Random(stable_seed("draw", self.seed, epoch, index, pass_index))
        drawn = rng.choices(numbers, weights=self.weights, k=len(numbers))
        # Distinct over the epoch, so that a shard drawn twice is augmented in two ways.
        num_readers, first = worker.world_size * worker.num_workers, pass_index * len(numbers)
        return [(shard, (first + draw) * num_readers + index) for draw, shard in enumerate(drawn)]

    def _read_all(
        self, turns: list[tuple[int, int]], status: DataWorkerStatus
    ) -> Iterator[RawSample | Skip]:
        for shard, repeat in turns:
            status.note(shard, 0)
            items = read_shard(self.shards[shard], repeat=repeat, use_json=self.use_json)
            for number, item in enumerate(items, start=1):
                yield item
                status.note(shard, number)


class StreamingBatches(IterableDataset[Batch]):
    """The batches of an epoch, each worker its own.

    Workers make the batches of a rank in turn. In training they go through their shards again as
    need be, and bad samples' places are taken by others of the same batch, so that each batch
    takes as many pairs.

    Args:
        source: Where samples come from.
        decode: Makes tensors of them.
        batching: How samples become batches.
        num_samples: Samples of an epoch over all ranks, None if not known.
        num_workers: Loading processes.
    """

    sampler = None

    def __init__(
        self,
        source: StreamingSource,
        decode: SampleDecoder,
        batching: Batching,
        *,
        num_samples: int | None,
        num_workers: int,
    ) -> None:
        self.source = source
        self.decode = decode
        self.batching = batching
        self.num_workers = num_workers
        self.status = DataWorkerStatus(num_workers)
        self.num_samples = None if num_samples is None else batching.num_samples(num_samples)
        # Epoch and first batch. Persistent workers hold copies of the data set; this reaches them.
        self._start = RawArray("q", 2)

    @property
    def num_batches(self) -> int | None:
        """Batches left in the epoch on this rank; None if not known."""
        if self.num_samples is None:
            return None
        per_step = self.batching.per_step or 1
        num_left = self.batching.num_batches(self.num_samples) - self._start[1]
        return max(0, num_left // per_step * per_step)

    def start_at(self, epoch: int, position: int) -> None:
        """Enter an epoch after so many samples over all ranks, at the next whole batch."""
        first_batch = math.ceil(position / (self.batching.batch_size * self.batching.world_size))
        if first_batch:
            logger.info(
                "these shards can only be read from the beginning: each worker reads up to its "
                "part of sample %d; the order is as before for the same number of processes, "
                "workers and samples per batch",
                position,
            )
        self._start[:] = [epoch, first_batch]

    def describe(self, shard: int, number: int) -> str:
        """Return a place that a worker noted, in words."""
        return f"{self.source.shards[shard]} after {number} samples"

    def __iter__(self) -> Iterator[Batch]:
        info = get_worker_info()
        index, num_workers = (info.id, info.num_workers) if info is not None else (0, 1)
        epoch, first_batch = self._start
        ranks = self.batching.rank, self.batching.world_size
        if self.batching.per_step is None:
            yield from self._one_pass(Worker(*ranks, index, num_workers), epoch)
            return
        # The loader asks its first worker first, whoever made the batch before.
        index = (index + first_batch) % num_workers
        num_skipped = len(range(index, first_batch, num_workers))
        quota = len(range(index, first_batch + (self.num_batches or 0), num_workers))
        if quota > num_skipped:
            worker = Worker(*ranks, index, num_workers)
            yield from self._full_batches(worker, epoch, num_skipped, quota)

    def _read(self, worker: Worker, epoch: int, pass_index: int) -> Iterator[RawSample | Skip]:
        size = self.batching.batch_size
        return self.source.read(worker, self.status, size, epoch=epoch, pass_index=pass_index)

    def _one_pass(self, worker: Worker, epoch: int) -> Iterator[Batch]:
        examples: list[Example] = []
        skips: list[Skip] = []
        num_tried = 0
        for item in self._read(worker, epoch, 0):
            num_tried += 1
            example = decode_item(item, self.decode, epoch)
            if isinstance(example, Skip):
                skips.append(example)
            else:
                examples.append(example)
            if len(examples) == self.batching.batch_size or len(skips) == _MAX_PENDING_SKIPS:
                full = len(examples) == self.batching.batch_size
                yield collate(examples if full else [], num_tried, skips)
                examples, skips, num_tried = [] if full else examples, [], 0
        self.status.clear()
        if examples or skips:
            yield collate(examples, num_tried, skips)

    def _full_batches(
        self, worker: Worker, epoch: int, num_skipped: int, quota: int
    ) -> Iterator[Batch]:
        pairs_to_skip = num_skipped * self.batching.batch_size
        examples: list[Example | None] = []
        good: list[RawSample] = []
        skips: list[Skip] = []
        tried: set[str] = set()
        num_done, num_tried, num_bad_in_row = num_skipped, 0, 0
        for pass_index in count():
            num_usable = 0
            for item in self._read(worker, epoch, pass_index):
                if pairs_to_skip:
                    is_pair = isinstance(item, RawSample)
                    pairs_to_skip -= is_pair
                    num_usable += is_pair
                    continue
                num_tried += 1
                example = decode_item(item, self.decode, epoch)
                if isinstance(example, Skip):
                    skips.append(example)
                    tried.add(example.shard)
                    num_bad_in_row += 1
                    if isinstance(item, RawSample):
                        examples.append(None)
                elif isinstance(item, RawSample):
                    num_usable += 1
                    num_bad_in_row = 0
                    examples.append(example)
                    good.append(item)
                # A batch without one good pair has nothing to fill its places with.
                if good and len(examples) >= self.batching.batch_size:
                    place = (epoch, worker.rank, worker.index, num_done)
                    filled = self._fill(examples[-self.batching.batch_size :], good, place)
                    self.status.clear()
                    yield collate(filled, num_tried, skips)
                    examples, good, skips, num_tried = [], [], [], 0
                    num_done += 1
                    if num_done == quota:
                        return
                if num_bad_in_row == _MAX_BAD_IN_ROW:
                    break
            # Shards drawn with replacement: a pass may have missed those that are good.
            gives_up = num_bad_in_row == _MAX_BAD_IN_ROW
            if gives_up or (num_usable == 0 and self.source.has_tried_all(tried)):
                yield Batch(None, None, num_tried, skips, sorted(tried))
                return
            if num_usable:
                tried.clear()

    def _fill(
        self,
        examples: list[Example | None],
        good: list[RawSample],
        place: tuple[int, int, int, int],
    ) -> list[Example]:
        """Put good pairs of a batch, augmented in another way, where there is None."""
        filled = []
        for position, example in enumerate(examples):
            if example is None:
                seed = stable_seed("instead", self.decode.seed, *place, position)
                other = replace(good[seed % len(good)], repeat=-1 - position)
                example = self.decode(other, epoch=place[0])
            filled.append(example)
        return filled


def _own_batches(
    items: Iterator[RawSample | Skip], worker: Worker, batch_size: int
) -> Iterator[RawSample | Skip]:
    position = 0
    for item in items:
        if isinstance(item, Skip):
            if worker.index == 0:
                yield item
            continue
        if position // batch_size % worker.num_workers == worker.index:
            yield item
        position += 1


def shuffled_stream(
    items: Iterable[T], seed: int, *, buffer_size: int, initial_size: int
) -> Iterator[T]:
    """Shuffle a stream through a buffer.

    Args:
        items: The stream.
        seed: What the order depends on, alone.
        buffer_size: Items held at most.
        initial_size: Items read before the first comes out; from there the buffer grows by one
            with each that does, so that a run need not wait for a full one.
    """
    rng = random.Random(seed)
    buffer: list[T] = []

    def take() -> T:
        index = rng.randrange(len(buffer))
        buffer[index], buffer[-1] = buffer[-1], buffer[index]
        return buffer.pop()

    num_out = 0
    for item in items:
        buffer.append(item)
        if len(buffer) > min(buffer_size, initial_size + num_out):
            num_out += 1
            yield take()
    while buffer:
        yield take()


def check_enough_shards(num_shards: int, world_size: int) -> None:
    """Refuse fewer shards than processes, which read one each."""
    if num_shards < world_size:
        raise ValueError(
            f"{num_shards} shards cannot feed {world_size} processes, as they can only be read "
            "from the beginning; each needs one of its own (or --dataset-resampled)"
        )
