"""Images of a data set in batches, read by clip_benchmark's own builder."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch.utils.data import DataLoader
from tqdm import tqdm

from clip_pgs.evaluation.datasets.datasets import count_shards
from clip_pgs.evaluation.models.models import LoadedModel

logger = logging.getLogger(__name__)


class ImageBatches:
    """Batches of a data set, with a progress bar on rank 0's terminal.

    Args:
        loader: Yields (images, labels or captions).
        title: What the bar is called.
        total: About how many images there are; None where unknown.

    Attributes:
        dataset: clip_benchmark's data set, with its `classes` and `templates`.
    """

    def __init__(self, loader: DataLoader, *, title: str, total: int | None) -> None:
        self.dataset: Any = loader.dataset
        self._loader = loader
        self._title = title
        self._total = total

    def __iter__(self) -> Iterator[Any]:
        with tqdm(
            desc=self._title,
            total=self._total,
            unit=" images",
            file=sys.stderr,
            leave=False,
            # The bars of several processes would write over each other.
            disable=not sys.stderr.isatty() or os.environ.get("RANK", "0") != "0",
        ) as bar:
            for batch in self._loader:
                yield batch
                bar.update(len(batch[0]))


def estimate_images(location: str, split: str) -> int | None:
    """Say about how many images a split has, from the samples and the size of its first shard.

    Args:
        location: Folder or URL of the data set.
        split: "test" or "train".

    Returns:
        The exact number where there is one shard, and None for a URL or a damaged shard.
    """
    if "://" in location:
        return None
    shards = sorted(Path(location, split).glob("*.tar"))
    try:
        with tarfile.open(shards[0]) as tar:
            # A sample is all files with the same name up to the first dot.
            samples = {name.partition(".")[0] for name in tar.getnames()}
        total_bytes = sum(shard.stat().st_size for shard in shards)
        return round(len(samples) * total_bytes / shards[0].stat().st_size)
    except (OSError, tarfile.TarError, IndexError):
        return None


def open_batches(
    loaded: LoadedModel,
    location: str,
    *,
    name: str,
    task: str,
    split: str = "test",
    batch_size: int,
    workers: int,
) -> ImageBatches:
    """Open a data set in clip_benchmark's webdataset layout.

    Args:
        loaded: Whose transform the images go through.
        location: Folder or URL.
        name: The data set's name without `wds/`.
        task: clip_benchmark's name of the task.
        split: "test" or "train".
        batch_size: Images per batch, >= 1.
        workers: Processes that read images; no more than there are shards are used, and none
            where processes cannot be forked.

    Raises:
        FileNotFoundError: If the data set or the split is not there.
    """
    from clip_benchmark.datasets.builder import build_dataset

    num_shards = count_shards(location, split)
    notes = io.StringIO()
    with contextlib.redirect_stdout(notes), contextlib.redirect_stderr(notes):
        dataset = build_dataset(
            f"wds/{name}", root=location, transform=loaded.transform, split=split, task=task
        )
    logger.debug("clip_benchmark on %s: %s", name, notes.getvalue())
    workers = min(workers, num_shards) if sys.platform == "linux" else 0
    loader = DataLoader(
        dataset.batched(batch_size),
        batch_size=None,
        num_workers=workers,
        multiprocessing_context="fork" if workers else None,
    )
    return ImageBatches(
        loader,
        title=name if split == "test" else f"{name} {split}",
        total=estimate_images(location, split) if sys.stderr.isatty() else None,
    )
