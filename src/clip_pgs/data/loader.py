"""Loading processes around the batches, and the account of what they skip."""

from __future__ import annotations

import logging
import random
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from clip_pgs.data.batches import Batch, BatchDataset
from clip_pgs.data.samples import NoUsableSampleError, Skip

logger = logging.getLogger(__name__)

_MAX_LOGGED_SKIPS = 10


class SampleStream:
    """Batches of images and texts, epoch by epoch.

    Iterating yields (images, texts): float (B, 3, H, W) and long (B, T), on the CPU, pinned where
    CUDA is available. It raises NoUsableSampleError where a worker's share has no usable sample.
    Skipped samples are logged as warnings: the first few by name, all of them as a total.

    Args:
        dataset: The batches of each worker.
        num_workers: Loading processes; 0 loads in this one.
        num_samples: Samples of an epoch over all ranks; None if not known.
        num_batches: Batches of an epoch on each rank; None if not known.

    Attributes:
        num_samples: As above.
        num_batches: As above.
        num_workers: As above, after what the shards allow.
        skipped: Samples skipped by reason in the epoch that is being read or was read last.
    """

    def __init__(
        self,
        dataset: BatchDataset,
        *,
        num_workers: int,
        num_samples: int | None,
        num_batches: int | None,
    ) -> None:
        self.num_workers = num_workers
        self.num_samples = num_samples
        self.num_batches = num_batches
        self.skipped: Counter[str] = Counter()
        self._first_skip: Skip | None = None
        self._dataset = dataset
        self._loader = self._make_loader()

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch that the next iterator goes through, 0 at first.

        Args:
            epoch: Any epoch; it gives the same batches whatever was read before.
        """
        self._dataset.epoch = epoch

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        self.skipped.clear()
        self._first_skip = None
        num_batches = 0
        barren: list[str] = []
        for batch in self._read_loader():
            self._record(batch.skips)
            barren = batch.barren
            if barren:
                break
            if batch.images is not None and batch.texts is not None:
                num_batches += 1
                yield batch.images, batch.texts
        if barren or num_batches == 0:
            # Ends the workers now. Those that die with a traceback, in the garbage collector,
            # are no longer reached by their queues: torch waits five seconds for each.
            self._loader = self._make_loader()
            raise NoUsableSampleError(self._describe_barren(barren))
        if self.skipped:
            logger.warning("in this epoch %s", self._describe_skipped())

    def _read_loader(self) -> Iterator[Batch]:
        if self.num_workers > 0:
            yield from self._loader
            return
        # Samples seed the generators of the process that decodes them, which is this one.
        batches = iter(self._loader)
        while True:
            with _preserved_generators():
                batch = next(batches, None)
            if batch is None:
                return
            yield batch

    def _make_loader(self) -> DataLoader[Batch]:
        return DataLoader(
            self._dataset,
            batch_size=None,
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
            pin_memory=torch.cuda.is_available(),
            # The loader draws a number at each start; not from the stream of the run.
            generator=torch.Generator().manual_seed(0),
        )

    def _record(self, skips: list[Skip]) -> None:
        for skip in skips:
            if self._first_skip is None:
                self._first_skip = skip
            if self.skipped.total() < _MAX_LOGGED_SKIPS:
                logger.warning("skipped %s", skip)
            elif self.skipped.total() == _MAX_LOGGED_SKIPS:
                logger.warning("skipped more; the epoch's total follows at its end")
            self.skipped[skip.reason] += 1

    def _describe_barren(self, shards: list[str]) -> str:
        places = f" in {', '.join(shards[:3])}" if shards else ""
        more = f" and {len(shards) - 3} more" if len(shards) > 3 else ""
        return (
            f"no usable sample{places}{more}: {self._describe_skipped()}; "
            f"the first is {self._first_skip}"
        )

    def _describe_skipped(self) -> str:
        reasons = ", ".join(f"{reason}: {number}" for reason, number in self.skipped.most_common())
        return f"{self.skipped.total()} skipped ({reasons})"


@contextmanager
def _preserved_generators() -> Iterator[None]:
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])
