"""Batches of shards that can only be read from the beginning.

Order depends on ranks and workers, as OpenCLIP's does. To enter an epoch in the middle, a worker
reads what comes before without decoding it.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from dataclasses import replace
from itertools import count
from multiprocessing.sharedctypes import RawArray

import torch
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info

from clip_pgs.data.batches import Batch, decode_item
from clip_pgs.data.order import Share, stable_seed
from clip_pgs.data.samples import RawSample, SampleDecoder, Skip
from clip_pgs.data.sequential.sequential_sources import SequentialSource
from clip_pgs.data.whereabouts import Whereabouts

logger = logging.getLogger(__name__)

# Skips are reported with the next batch, or without one when this many wait.
_MAX_PENDING_SKIPS = 256
# A worker that meets so many bad pairs in a row gives up.
_MAX_BAD_IN_ROW = 10_000

Example = tuple[Tensor, Tensor]


class SequentialBatches(IterableDataset[Batch]):
    """The batches of an epoch, each worker its own.

    Args:
        source: Where samples come from.
        decode: Makes tensors of them.
        whereabouts: Where workers note what they are reading.
        batch_size: Samples per batch.
        batches_per_epoch: Batches of a whole epoch on this rank, made by its workers in turn;
            they go through their shares again as need be, and bad samples' places are taken by
            others of the same batch, so that each batch takes as many pairs. None for one pass
            in which bad samples are left out, with a partial last batch.
        batches_per_step: Batches that make a step.
        rank: The process.
        world_size: Number of processes.
    """

    sampler = None

    def __init__(
        self,
        source: SequentialSource,
        decode: SampleDecoder,
        whereabouts: Whereabouts,
        *,
        batch_size: int,
        batches_per_epoch: int | None,
        batches_per_step: int = 1,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self.source = source
        self.decode = decode
        self.whereabouts = whereabouts
        self.batch_size = batch_size
        self.batches_per_epoch = batches_per_epoch
        self.batches_per_step = batches_per_step
        self.rank = rank
        self.world_size = world_size
        # Epoch and first batch. Persistent workers hold copies of the data set; this reaches them.
        self._start = RawArray("q", 2)

    @property
    def num_batches(self) -> int | None:
        """Batches left in the epoch on this rank; None if not known."""
        if self.batches_per_epoch is None:
            return None
        num_left = self.batches_per_epoch - self._start[1]
        return max(0, num_left // self.batches_per_step * self.batches_per_step)

    def start_at(self, epoch: int, position: int) -> None:
        """Enter an epoch after so many samples over all ranks, at the next whole batch."""
        first_batch = math.ceil(position / (self.batch_size * self.world_size))
        if first_batch:
            logger.info(
                "these shards can only be read from the beginning: each worker reads up to its "
                "part of sample %d; the order is as before for the same number of processes, "
                "workers and samples per batch",
                position,
            )
        self._start[0] = epoch
        self._start[1] = first_batch

    def describe(self, part: int, number: int) -> str:
        """Return a place that a worker noted, in words."""
        return f"{self.source.shards[part]} after {number} samples"

    def __iter__(self) -> Iterator[Batch]:
        info = get_worker_info()
        worker, num_workers = (info.id, info.num_workers) if info is not None else (0, 1)
        epoch, first_batch = self._start
        if self.num_batches is None:
            share = Share(self.rank, self.world_size, worker, num_workers)
            yield from self._one_pass(share, epoch)
            return
        # The loader asks its first worker first, whoever made the batch before.
        share = Share(self.rank, self.world_size, (worker + first_batch) % num_workers, num_workers)
        num_skipped = len(range(share.worker, first_batch, num_workers))
        quota = len(range(share.worker, first_batch + self.num_batches, num_workers))
        if quota > num_skipped:
            yield from self._full_batches(share, epoch, num_skipped, quota)

    def _one_pass(self, share: Share, epoch: int) -> Iterator[Batch]:
        examples: list[Example] = []
        skips: list[Skip] = []
        num_tried = 0
        for item in self.source.read(share, self.whereabouts, epoch=epoch, pass_index=0):
            num_tried += 1
            example = decode_item(item, self.decode, epoch)
            if isinstance(example, Skip):
                skips.append(example)
            else:
                examples.append(example)
            if len(examples) == self.batch_size or len(skips) == _MAX_PENDING_SKIPS:
                full = len(examples) == self.batch_size
                yield _collate(examples if full else [], num_tried, skips)
                examples, skips, num_tried = [] if full else examples, [], 0
        self.whereabouts.leave()
        if examples or skips:
            yield _collate(examples, num_tried, skips)

    def _full_batches(
        self, share: Share, epoch: int, num_skipped: int, quota: int
    ) -> Iterator[Batch]:
        pairs_to_skip = num_skipped * self.batch_size
        examples: list[Example | None] = []
        good: list[RawSample] = []
        skips: list[Skip] = []
        tried: set[str] = set()
        num_done, num_tried, num_bad_in_row = num_skipped, 0, 0
        for pass_index in count():
            num_usable = 0
            for item in self.source.read(
                share, self.whereabouts, epoch=epoch, pass_index=pass_index
            ):
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
                if good and len(examples) >= self.batch_size:
                    place = (epoch, share.rank, share.worker, num_done)
                    filled = self._fill(examples[-self.batch_size :], good, place)
                    self.whereabouts.leave()
                    yield _collate(filled, num_tried, skips)
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
                other = replace(good[seed % len(good)], visit=-1 - position)
                example = self.decode(other, epoch=place[0])
            filled.append(example)
        return filled


def _collate(examples: list[Example], num_tried: int, skips: list[Skip]) -> Batch:
    if not examples:
        return Batch(None, None, num_tried, skips, [])
    images, texts = zip(*examples, strict=True)
    return Batch(torch.stack(images), torch.stack(texts), num_tried, skips, [])
