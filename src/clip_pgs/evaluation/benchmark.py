"""clip_benchmark on one data set: its builder, its classifier and its metrics, without its snags.

What is smoothed over, as of clip_benchmark 1.6.2: it does not declare `requests`; `accuracy`
fails on numpy >= 2.4; a webdataset with fewer shards than workers raises; its data sets can only
be sent to forked workers; autocast takes a device type, not "cuda:1"; progress bars and notes go
to the terminal.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import logging
import math
import os
import sys
from collections.abc import Callable, Iterator
from importlib.metadata import version
from typing import Any

import torch
from torch.utils.data import DataLoader
from tqdm import tqdm

from clip_pgs.evaluation.datasets import EvalSet, count_shards
from clip_pgs.evaluation.models import LoadedModel

logger = logging.getLogger(__name__)

RECALL_AT = [1, 5, 10]
_MODULES = ("clip_benchmark.datasets.builder", "webdataset", "requests", "sklearn")


def check_installation() -> None:
    """Check that clip_benchmark can run here.

    Raises:
        ValueError: If a package is missing, or numpy is too new for clip_benchmark.
    """
    for module in _MODULES:
        try:
            importlib.import_module(module)
        except ModuleNotFoundError as error:
            raise ValueError(
                f"evaluation needs the package {error.name}; install clip-pgs with its extra 'eval'"
            ) from error
    numpy_version = version("numpy")
    if tuple(int(part) for part in numpy_version.split(".")[:2]) >= (2, 4):
        raise ValueError(
            f"clip_benchmark cannot compute accuracies with numpy {numpy_version}; "
            "install 'numpy<2.4'"
        )


def score(
    loaded: LoadedModel,
    eval_set: EvalSet,
    *,
    device: torch.device,
    batch_size: int,
    workers: int,
    amp: bool,
) -> tuple[dict[str, float | None], int]:
    """Score a model on one data set.

    Args:
        loaded: The model, on `device`.
        eval_set: The data set and the task.
        device: Where the model is.
        batch_size: Images per step.
        workers: Processes that read images; no more than there are shards are used.
        amp: Whether to use half precision.

    Returns:
        clip_benchmark's metrics, each in [0, 1] or None where it is not defined (`acc5` with
        fewer than 5 classes), and the number of images.

    Raises:
        FileNotFoundError: If the data set is not there.
        Exception: Whatever a damaged data set makes clip_benchmark raise.
    """
    from clip_benchmark.datasets.builder import build_dataset

    num_shards = count_shards(eval_set.location)
    notes = io.StringIO()
    with contextlib.redirect_stdout(notes), contextlib.redirect_stderr(notes):
        dataset = build_dataset(
            f"wds/{eval_set.name}",
            root=eval_set.location,
            transform=loaded.transform,
            split="test",
            task=eval_set.task,
        )
    workers = min(workers, num_shards) if sys.platform == "linux" else 0
    loader = DataLoader(
        dataset.batched(batch_size),
        batch_size=None,
        num_workers=workers,
        multiprocessing_context="fork" if workers else None,
    )
    batches = _CountedBatches(loader, title=eval_set.name)
    if device.index is not None and device.type == "cuda":
        torch.cuda.set_device(device)
    with contextlib.redirect_stdout(notes), contextlib.redirect_stderr(notes), torch.no_grad():
        metrics = _SCORERS[eval_set.task](loaded, batches, device.type, amp)
    logger.debug("clip_benchmark on %s: %s", eval_set.name, notes.getvalue())
    defined = {key: None if math.isnan(value) else value for key, value in metrics.items()}
    return defined, batches.num_images


def default_workers() -> int:
    """Return how many processes read images by default."""
    return min(4, os.cpu_count() or 1)


class _CountedBatches:
    """A data loader that counts images and shows progress on a terminal."""

    def __init__(self, loader: DataLoader, *, title: str) -> None:
        self.dataset: Any = loader.dataset  # clip_benchmark asks it for the classes
        self.num_images = 0
        self._loader = loader
        self._title = title
        self._stream = sys.stderr

    def __iter__(self) -> Iterator[Any]:
        with tqdm(
            desc=self._title,
            unit=" images",
            file=self._stream,
            leave=False,
            position=0,  # not below the bar of clip_benchmark, which nobody sees
            disable=not self._stream.isatty(),
        ) as bar:
            for batch in self._loader:
                self.num_images += len(batch[0])
                yield batch
                bar.update(len(batch[0]))


def _score_classification(
    loaded: LoadedModel, batches: _CountedBatches, device: str, amp: bool
) -> dict[str, float]:
    from clip_benchmark.metrics import zeroshot_classification

    return zeroshot_classification.evaluate(
        loaded.model,
        batches,
        loaded.tokenizer,
        batches.dataset.classes,
        batches.dataset.templates,
        device=device,
        amp=amp,
    )


def _score_retrieval(
    loaded: LoadedModel, batches: _CountedBatches, device: str, amp: bool
) -> dict[str, float]:
    from clip_benchmark.metrics import zeroshot_retrieval

    return zeroshot_retrieval.evaluate(
        loaded.model, batches, loaded.tokenizer, device=device, amp=amp, recall_k_list=RECALL_AT
    )


_Scorer = Callable[[LoadedModel, _CountedBatches, str, bool], dict[str, float]]
_SCORERS: dict[str, _Scorer] = {
    "zeroshot_classification": _score_classification,
    "zeroshot_retrieval": _score_retrieval,
}
