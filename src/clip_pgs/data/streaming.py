"""Shards that can only be read from the beginning: URLs, commands and compressed files.

Order depends on ranks and workers, as OpenCLIP's does: an epoch goes through its shards in passes
(most need one), and the samples of a pass are a function of (seed, epoch, worker, pass). To enter
an epoch in the middle, a worker reads what comes before without decoding it.
"""

from __future__ import annotations

import logging
import math
import random
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import count
from multiprocessing.sharedctypes import RawArray
from typing import TypeVar

from torch.utils.data import IterableDataset, get_worker_info

from clip_pgs.data.bad_samples import Skip
from clip_pgs.data.batches import Batch, Batching, DataWorkerStatus, Example, collate, decode_item
from clip_pgs.data.order import shuffled, stable_seed
from clip_pgs.data.samples import RawSample, SampleDecoder
from clip_pgs.data.shards import count_earlier
from clip_pgs.data.tar import read_shard
from clip_pgs.tables import counted

logger = logging.getLogger(__name__)

T = TypeVar("T")

# OpenCLIP's shuffle buffer: mixes several shards of the usual 1000 to 10000 pairs.
_BUFFER_SIZE = 5000
_INITIAL_SIZE = 1000
# Of the encoded images and captions in it: 5000 pairs of 400 kB.
_BUFFER_BYTES = 2**31
# Skips are reported with the next batch, or without one when this many wait.
_MAX_PENDING_SKIPS = 256
# A worker that meets so many bad pairs in a row gives up.
_MAX_BAD_IN_ROW = 10_000


@dataclass(eq=False)
class StreamingBatches(IterableDataset[Batch]):
    """The batches of an epoch, each worker its own, whose samples are read in passes.

    In training each shard comes once a pass, dealt to ranks and workers anew each epoch, and
    samples are mixed; resampled, every worker draws as many shards as there are. Workers make the
    batches of a rank in turn, go through their shards again as need be, and fill bad samples'
    places with others of the same batch, so that each batch takes as many pairs.
    In a measurement all workers read all shards and hand on their own batches, each of as many
    pairs in a row, less the bad ones: the same for any number of workers, since a validation loss
    depends on what shares a batch.

    Args:
        shards: Expanded shards.
        decode: Makes tensors of samples; its seed is that of the order.
        batching: How samples become batches.
        num_samples: Samples of an epoch over all ranks, None if not known.
        num_workers: Loading processes; in training, no more than can be fed are used.
        resampled: Draw shards with replacement.
        weights: Drawing weight of each shard, or None for equal ones.
    """

    sampler = None

    shards: list[str]
    decode: SampleDecoder
    batching: Batching
    num_samples: int | None
    num_workers: int
    resampled: bool = False
    weights: list[float] | None = None

    def __post_init__(self) -> None:
        if self.num_samples is not None:
            self.num_samples = self.batching.num_samples(self.num_samples)
        self._num_earlier = count_earlier(self.shards)
        # Epoch and first batch. Persistent workers hold copies of the data set; this reaches them.
        self._start = RawArray("q", 2)
        asked = self.num_workers
        if self.batching.per_step is not None:
            # A worker with less than one batch of its own would repeat samples within a batch.
            fed = len(self.shards) // self.batching.world_size if not self.resampled else asked
            self.num_workers = min(asked, fed, self.num_batches or 0)
        if self.num_workers < asked:
            logger.warning(
                "%d workers per process instead of --workers %d: %d shards with %d batches per "
                "process feed no more",
                self.num_workers,
                asked,
                len(self.shards),
                self.num_batches,
            )
        self.status = DataWorkerStatus(self.num_workers)

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
        return f"{self.shards[shard]} after {counted(number, 'sample')}"

    def __iter__(self) -> Iterator[Batch]:
        info = get_worker_info()
        index, num_workers = (info.id, info.num_workers) if info is not None else (0, 1)
        epoch, first_batch = self._start
        if self.batching.per_step is None:
            yield from self._one_pass(epoch, index, num_workers)
            return
        # The loader asks its first worker first, whoever made the batch before.
        index = (index + first_batch) % num_workers
        num_skipped = len(range(index, first_batch, num_workers))
        quota = len(range(index, first_batch + (self.num_batches or 0), num_workers))
        if quota > num_skipped:
            yield from self._full_batches(epoch, index, num_workers, num_skipped, quota)

    def _read(self, turns: Iterable[tuple[int, int]]) -> Iterator[RawSample | Skip]:
        """Yield the samples of shards, each with what tells its repetitions apart."""
        use_json = self.decode.caption_key is not None
        for shard, repeat in turns:
            self.status.note(shard, 0)
            items = read_shard(self.shards[shard], repeat=repeat, use_json=use_json)
            for number, item in enumerate(items, start=1):
                yield item
                self.status.note(shard, number)

    def _mixed_pass(
        self, epoch: int, index: int, num_workers: int, pass_index: int
    ) -> Iterator[RawSample | Skip]:
        """Yield the samples of one pass of a worker; every shard yields at least one item."""
        seed, rank, world_size = self.decode.seed, self.batching.rank, self.batching.world_size
        numbers = range(len(self.shards))
        if self.resampled:
            reader = rank * num_workers + index
            rng = random.Random(stable_seed("draw", seed, epoch, reader, pass_index))
            drawn = rng.choices(numbers, weights=self.weights, k=len(numbers))
            # Distinct over the epoch, so that a shard drawn twice is augmented in two ways.
            places = range(pass_index * len(numbers), (pass_index + 1) * len(numbers))
            repeats = [place * world_size * num_workers + reader for place in places]
        else:
            drawn = shuffled(numbers, "deal", seed, epoch)[rank::world_size][index::num_workers]
            if pass_index > 0:
                drawn = shuffled(drawn, "repeat", seed, epoch, pass_index)
            # Of a shard that is named twice each has its own.
            num_copies = 1 + max(self._num_earlier)
            repeats = [pass_index * num_copies + self._num_earlier[shard] for shard in drawn]
        place = (rank, world_size, index, num_workers, pass_index)
        return shuffled_stream(
            self._read(zip(drawn, repeats, strict=True)),
            stable_seed("mix", seed, epoch, *place),
            size_of=_num_bytes,
        )

    def _one_pass(self, epoch: int, index: int, num_workers: int) -> Iterator[Batch]:
        size = self.batching.batch_size
        examples: list[Example] = []
        skips: list[Skip] = []
        num_tried = num_pairs = 0
        for item in self._read((shard, 0) for shard in range(len(self.shards))):
            # What is no pair is the first worker's.
            owner, ends_batch = 0, False
            if isinstance(item, RawSample):
                owner = num_pairs // size % num_workers
                num_pairs += 1
                ends_batch = num_pairs % size == 0
            if owner != index:
                continue
            num_tried += 1
            example = decode_item(item, self.decode, epoch)
            if isinstance(example, Skip):
                skips.append(example)
            else:
                examples.append(example)
            if ends_batch or len(skips) == _MAX_PENDING_SKIPS:
                yield collate(examples if ends_batch else [], num_tried, skips)
                examples, skips, num_tried = [] if ends_batch else examples, [], 0
        self.status.clear()
        if examples or skips:
            yield collate(examples, num_tried, skips)

    def _full_batches(
        self, epoch: int, index: int, num_workers: int, num_skipped: int, quota: int
    ) -> Iterator[Batch]:
        pairs_to_skip = num_skipped * self.batching.batch_size
        examples: list[Example | None] = []
        good: list[RawSample] = []
        skips: list[Skip] = []
        tried: set[str] = set()
        num_done, num_tried, num_bad_in_row = num_skipped, 0, 0
        for pass_index in count():
            num_usable = 0
            for item in self._mixed_pass(epoch, index, num_workers, pass_index):
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
                    place = (epoch, self.batching.rank, index, num_done)
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
            weights = self.weights or [1.0] * len(self.shards)
            drawn = {shard for shard, weight in zip(self.shards, weights, strict=True) if weight}
            has_tried_all = not self.resampled or tried >= drawn
            if num_bad_in_row == _MAX_BAD_IN_ROW or (num_usable == 0 and has_tried_all):
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


def _num_bytes(item: RawSample | Skip) -> int:
    if isinstance(item, Skip):
        return 0
    return len(item.image or b"") + sum(map(len, item.captions))


def shuffled_stream(
    items: Iterable[T],
    seed: int,
    *,
    size_of: Callable[[T], int],
    buffer_size: int = _BUFFER_SIZE,
    initial_size: int = _INITIAL_SIZE,
    max_bytes: int = _BUFFER_BYTES,
) -> Iterator[T]:
    """Shuffle a stream through a buffer.

    Args:
        items: The stream.
        seed: What the order depends on, alone.
        size_of: Bytes of an item.
        buffer_size: Items held at most.
        initial_size: Items read before the first comes out; from there the buffer grows by one
            with each that does, so that a run need not wait for a full one.
        max_bytes: What they may have together, but for one item that is larger.
    """
    rng = random.Random(seed)
    buffer: list[T] = []
    held = num_out = 0

    def take() -> T:
        nonlocal held
        index = rng.randrange(len(buffer))
        buffer[index], buffer[-1] = buffer[-1], buffer[index]
        held -= size_of(buffer[-1])
        return buffer.pop()

    for item in items:
        buffer.append(item)
        held += size_of(item)
        while len(buffer) > min(buffer_size, initial_size + num_out) or held > max_bytes:
            num_out += 1
            yield take()
    while buffer:
        yield take()
