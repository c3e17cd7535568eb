"""Batches of an epoch whose samples can be read in any order, and what workers say of them."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing.sharedctypes import RawArray
from typing import NamedTuple, Protocol

import torch
from torch import Tensor
from torch.utils.data import Dataset, get_worker_info

from clip_pgs.data.bad_samples import BadSampleError, Skip
from clip_pgs.data.order import EpochPlan, SampleRef, stable_seed
from clip_pgs.data.samples import RawSample, SampleDecoder

Example = tuple[Tensor, Tensor]

# Where so many in a row are bad, it is not worth looking for a good one.
_MAX_ATTEMPTS = 1000


class Batch(NamedTuple):
    """What a worker hands over.

    Args:
        images: Shape (B, 3, H, W), floats or bytes, or None if there is none or only skips are
            reported.
        texts: Token ids of shape (B, T), or None.
        num_tried: Samples whose turn it was.
        skips: Those of them that could not be used, and shards that could not be read.
        barren: Shards without one usable sample; the worker has given up.
    """

    images: Tensor | None
    texts: Tensor | None
    num_tried: int
    skips: list[Skip]
    barren: list[str]


class Source(Protocol):
    """Samples that a loader's workers read in any order."""

    def read(self, ref: SampleRef) -> RawSample | Skip:
        """Read a sample, or say why it cannot be read."""

    def describe(self, shard: int, number: int) -> str:
        """Return the place of a sample in words."""


class DataWorkerStatus:
    """What each worker is reading, for when it reads for ever or dies of it.

    Args:
        num_workers: Number of workers; with 0 the process itself takes notes.
    """

    def __init__(self, num_workers: int) -> None:
        # Process, shard and number of each, which the process they work for can read.
        self._fields = RawArray("q", 3 * max(1, num_workers))

    def note(self, shard: int, number: int) -> None:
        """Note what this worker is about to read."""
        slot = self._slot()
        # The process comes last: where there is one, there is something to read.
        self._fields[slot + 1 : slot + 3] = [shard, number]
        self._fields[slot] = os.getpid()

    def clear(self) -> None:
        """Note that this worker has nothing to read."""
        self._fields[self._slot()] = 0

    def busy(self) -> list[tuple[int, int, int, int]]:
        """Return (worker, process, shard, number) of each worker that is reading."""
        slots = range(0, len(self._fields), 3)
        notes = [(slot // 3, *self._fields[slot : slot + 3]) for slot in slots]
        return [note for note in notes if note[1]]

    def _slot(self) -> int:
        info = get_worker_info()
        return 3 * info.id if info is not None else 0


@dataclass(frozen=True)
class Batching:
    """How the samples of an epoch become batches.

    The order of the samples of a step is micro-batch, rank, sample, so that neither accumulation
    nor the number of processes changes what a step sees.

    Args:
        batch_size: Samples of a batch.
        per_step: Batches that make a step; an epoch gives whole steps, and another sample takes
            the place of a bad one. None gives every usable sample, for one process, the last ones
            in a partial batch.
        rank: The process.
        world_size: Number of processes.
    """

    batch_size: int
    per_step: int | None
    rank: int = 0
    world_size: int = 1

    def num_batches(self, num_samples: int) -> int:
        """Return the batches on each rank that so many samples, over all ranks, give."""
        if self.per_step is None:
            return math.ceil(num_samples / self.batch_size)
        return num_samples // (self.batch_size * self.per_step * self.world_size) * self.per_step

    def num_samples(self, num_samples: int) -> int:
        """Return how many of so many samples are in batches, over all ranks."""
        if self.per_step is None:
            return num_samples
        return self.num_batches(num_samples) * self.batch_size * self.world_size


@dataclass(eq=False)
class PlannedBatches(Dataset[Batch]):
    """The batches of an epoch by their positions, which it gives to torch's loader as a sampler.

    Another sample of the epoch takes the place of a bad one, chosen from (seed, epoch, position,
    attempt) alone, so that no other sample moves.

    Args:
        source: Where samples come from.
        plan: Which sample has which position; it must have some.
        decode: Makes tensors of them.
        batching: Which positions make a batch.
        num_samples: Samples of an epoch; it may enter the plan's next pass.
        num_workers: Loading processes, no more than there are batches.
    """

    source: Source
    plan: EpochPlan
    decode: SampleDecoder
    batching: Batching
    num_samples: int
    num_workers: int

    def __post_init__(self) -> None:
        self.num_workers = min(self.num_workers, self.batching.num_batches(self.num_samples))
        self.status = DataWorkerStatus(self.num_workers)
        self.sampler = self
        self._num_planned = self.num_samples
        self.num_samples = self.batching.num_samples(self.num_samples)
        self._epoch = self._position = 0

    @property
    def num_batches(self) -> int:
        """Batches left in the epoch on this rank."""
        return self.batching.num_batches(max(0, self._num_planned - self._position))

    def start_at(self, epoch: int, position: int) -> None:
        """Enter an epoch after so many samples over all ranks."""
        self._epoch, self._position = epoch, position

    def __len__(self) -> int:
        return self.num_batches

    def __iter__(self) -> Iterator[tuple[int, range]]:
        """Yield the epoch and the positions of each batch."""
        size, batching = self.batching.batch_size, self.batching
        for index in range(self.num_batches):
            start = (index * batching.world_size + batching.rank) * size + self._position
            yield self._epoch, range(start, min(start + size, self._num_planned))

    def describe(self, shard: int, number: int) -> str:
        """Return a place that a worker noted, in words."""
        return self.source.describe(shard, number)

    def __getitem__(self, request: tuple[int, range]) -> Batch:
        epoch, positions = request
        examples: list[Example] = []
        skips: list[Skip] = []
        for num_tried, position in enumerate(positions, start=1):
            example = self._example(self.plan.sample_at(epoch, position), epoch)
            if isinstance(example, Skip):
                skips.append(example)
                if self.batching.per_step is None:
                    continue
                found = self._find_other(epoch, position)
                if isinstance(found, list):
                    self.status.clear()
                    return Batch(None, None, num_tried, skips, sorted({example.shard, *found}))
                example = found
            examples.append(example)
        self.status.clear()
        return collate(examples, len(positions), skips)

    def _find_other(self, epoch: int, position: int) -> Example | list[str]:
        """Return a good sample for a bad one's place, or the shards where there was none.

        The bad ones among those tried are not reported: each is at its own position.
        """
        num_samples = self.plan.num_samples
        seed = stable_seed("instead", self.decode.seed, epoch, position)
        start, stride = seed % num_samples, seed // num_samples % num_samples
        while math.gcd(stride, num_samples) != 1:
            stride += 1
        shards = set()
        for attempt in range(min(num_samples, _MAX_ATTEMPTS)):
            ref = self.plan.sample_at(epoch, (start + attempt * stride) % num_samples)
            # It comes in its own place too: augmented in another way, it is no copy.
            example = self._example(ref._replace(repeat=-1 - position), epoch)
            if not isinstance(example, Skip):
                return example
            shards.add(example.shard)
        return sorted(shards)

    def _example(self, ref: SampleRef, epoch: int) -> Example | Skip:
        self.status.note(ref.shard, ref.number)
        return decode_item(self.source.read(ref), self.decode, epoch)


def decode_item(item: RawSample | Skip, decode: SampleDecoder, epoch: int) -> Example | Skip:
    """Decode what was read, or say why it cannot be used."""
    if isinstance(item, Skip):
        return item
    try:
        return decode(item, epoch=epoch)
    except BadSampleError as error:
        return item.skip(error)


def collate(examples: list[Example], num_tried: int, skips: list[Skip]) -> Batch:
    """Make a batch of decoded pairs; see `Batch`."""
    if not examples:
        return Batch(None, None, num_tried, skips, [])
    images, texts = zip(*examples, strict=True)
    return Batch(torch.stack(images), torch.stack(texts), num_tried, skips, [])
