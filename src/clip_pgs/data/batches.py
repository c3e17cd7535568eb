"""What one worker of a loader does: read, decode, skip what is bad, and batch."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import count
from multiprocessing import Value
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info

from clip_pgs.data.order import Share
from clip_pgs.data.samples import BadSampleError, RawSample, SampleDecoder, Skip
from clip_pgs.data.sources import Source

# Skips are reported with the next batch, or without one when this many wait.
_MAX_PENDING_SKIPS = 256


class Batch(NamedTuple):
    """What a worker hands over.

    Args:
        images: Shape (B, 3, H, W), or None if only skips are reported.
        texts: Token ids of shape (B, T), or None.
        skips: What was skipped since the batch before.
        barren: The shards of a share without one usable sample; the worker has given up.
    """

    images: Tensor | None
    texts: Tensor | None
    skips: list[Skip]
    barren: list[str]


class BatchDataset(IterableDataset[Batch]):
    """The batches of an epoch, each worker its own.

    Args:
        source: Where samples come from.
        decode: Makes tensors of them.
        batch_size: Samples per batch.
        num_batches: Batches of an epoch on this rank, made by its workers in turn; they go
            through their shares again as need be. None for one pass, with a partial last batch.
        rank: The process.
        world_size: Number of processes.
    """

    def __init__(
        self,
        source: Source,
        decode: SampleDecoder,
        *,
        batch_size: int,
        num_batches: int | None,
        rank: int,
        world_size: int,
    ) -> None:
        self.source = source
        self.decode = decode
        self.batch_size = batch_size
        self.num_batches = num_batches
        self.rank = rank
        self.world_size = world_size
        # Persistent workers hold copies of the data set; this reaches them.
        self._epoch = Value("q", 0)

    @property
    def epoch(self) -> int:
        """The epoch that the next iterator goes through."""
        return self._epoch.value

    @epoch.setter
    def epoch(self, epoch: int) -> None:
        self._epoch.value = epoch

    def __iter__(self) -> Iterator[Batch]:
        info = get_worker_info()
        worker, num_workers = (info.id, info.num_workers) if info is not None else (0, 1)
        share = Share(self.rank, self.world_size, worker, num_workers)
        quota = None
        if self.num_batches is not None:
            quota = len(range(worker, self.num_batches, num_workers))
        if quota != 0:
            yield from self._batch(share, self.epoch, max_batches=quota)

    def _batch(self, share: Share, epoch: int, *, max_batches: int | None) -> Iterator[Batch]:
        images: list[Tensor] = []
        texts: list[Tensor] = []
        skips: list[Skip] = []
        num_batches = 0
        tried: set[str] = set()
        for pass_index in count():
            num_usable = 0
            for item in self.source.read(share, epoch=epoch, pass_index=pass_index):
                example = self._decode(item, epoch)
                if isinstance(example, Skip):
                    skips.append(example)
                    tried.add(example.shard)
                    if len(skips) >= _MAX_PENDING_SKIPS:
                        yield Batch(None, None, skips, [])
                        skips = []
                    continue
                num_usable += 1
                images.append(example[0])
                texts.append(example[1])
                if len(images) == self.batch_size:
                    yield Batch(torch.stack(images), torch.stack(texts), skips, [])
                    images, texts, skips = [], [], []
                    num_batches += 1
                    if num_batches == max_batches:
                        return
            if max_batches is None:
                break
            # Shards drawn with replacement: a pass may have missed those that are good.
            if num_usable:
                tried.clear()
            elif self.source.has_tried_all(tried):
                yield Batch(None, None, skips, sorted(tried))
                return
        if images:
            yield Batch(torch.stack(images), torch.stack(texts), skips, [])
        elif skips:
            yield Batch(None, None, skips, [])

    def _decode(self, item: RawSample | Skip, epoch: int) -> tuple[Tensor, Tensor] | Skip:
        if isinstance(item, Skip):
            return item
        try:
            return self.decode(item, epoch=epoch)
        except BadSampleError as error:
            return Skip(item.shard, item.key, error.reason, error.detail)
