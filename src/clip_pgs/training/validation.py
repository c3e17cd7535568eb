"""Measurements on held-out data during training, by OpenCLIP's own code and names."""

from __future__ import annotations

import argparse
import json
import logging
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Protocol

import torch
from open_clip_train.data import get_imagenet
from open_clip_train.train import evaluate as evaluate_with_open_clip
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from clip_pgs.common import measured_alike, one_sentence
from clip_pgs.data.bad_samples import StalledDataError, UnusableDataError
from clip_pgs.data.build import build_val_stream
from clip_pgs.data.decoding import UnreadableImageError, open_image, to_rgb
from clip_pgs.data.loader import SampleStream
from clip_pgs.files import CHECKPOINTS_NAME, append_line
from clip_pgs.tables import Cell, Table
from clip_pgs.training.build import ModelParts, build_model
from clip_pgs.training.checkpoint import Cost, load_start, restore
from clip_pgs.training.data_checks import has_training_data, held_out_digests
from clip_pgs.training.distributed import ProcessGroup
from clip_pgs.training.loggers import MetricLoggers
from clip_pgs.training.options import TrainOptions
from clip_pgs.training.stop import (
    StoppedError,
    StopRequest,
    StopSignals,
    as_bad_input,
    writing,
)

RESULTS_NAME = "results.jsonl"
# What stands beside measurements.
_AVERAGE = re.compile(r"([^/]+)/(?:id_|ood_)?average(?:_of_\d+_of_\d+)?/")
_BESIDE = ("epoch", "num_samples", "batch_size", "data")

_logger = logging.getLogger(__name__)


class Evaluate(Protocol):
    """An evaluation of the caller's own, run on rank 0 every `--eval-every` epochs."""

    def __call__(
        self,
        *,
        model: nn.Module,
        transform: Callable,
        tokenize: Callable,
        epoch: int,
        record: Mapping[str, Any],
    ) -> Mapping[str, float]:
        """Return measurements by name.

        Args:
            model: The plain model in eval mode.
            transform: Image to pixels.
            tokenize: Captions to token numbers.
            epoch: Completed epochs.
            record: What a checkpoint of these weights says of the run, under `clip_pgs`; {} where
                none is written.
        """


class Validation:
    """The held-out sets of a run: `--val-data`, `--imagenet-val`, `--imagenet-v2`.

    Args:
        options: The run's.
        parts: The model and its transforms.
        evaluate: Measures more than OpenCLIP does.
    """

    def __init__(
        self, options: TrainOptions, parts: ModelParts, *, evaluate: Evaluate | None = None
    ) -> None:
        self._options = options
        self._parts = parts
        self._evaluate = evaluate
        self._data: dict[str, Any] = {}
        self._stream: SampleStream | None = None
        if options.val_data:
            self._stream = build_val_stream(
                options, transform=parts.val_transform, tokenize=parts.tokenize
            )
            self._data["val"] = SimpleNamespace(dataloader=self._stream)
        transforms = (parts.train_transform, parts.val_transform)
        for name, folder in (("val", options.imagenet_val), ("v2", options.imagenet_v2)):
            if folder is not None:
                dataset = get_imagenet(options.openclip, transforms, name).dataloader.dataset
                loader = DataLoader(
                    _Pictures(dataset, parts.val_transform),
                    batch_size=options.batch_size,
                    num_workers=options.workers,
                )
                self._data[f"imagenet-{name}"] = SimpleNamespace(dataloader=loader)
        self._digests = held_out_digests(options)

    def run(self, *, epoch: int, epochs: int, record: Mapping[str, Any]) -> dict[str, float]:
        """Measure what is due, leaving the model in eval mode.

        Args:
            epoch: Completed epochs.
            epochs: Epochs of the whole run; everything is due after the last.
            record: What a checkpoint of the model says of the run.

        Returns:
            Values by OpenCLIP's names, empty where nothing was due, or where it failed and there is
            training to go on with.

        Raises:
            UnusableDataError, StalledDataError, OSError: If the held-out data lets it down and
                nothing is trained.
        """
        model = self._parts.model
        model.eval()
        changes = {"epochs": epochs, "rank": 0}
        # We report by ourselves, and the model is not wrapped.
        changes |= {"distributed": False, "save_logs": False, "wandb": False}
        options = argparse.Namespace(**{**vars(self._options.openclip), **changes})
        metrics: dict[str, Any] = {}
        is_training = has_training_data(self._options)
        data_errors = (UnusableDataError, StalledDataError, OSError) if is_training else ()
        with _going_on("validation", epoch, data_errors):
            metrics |= evaluate_with_open_clip(
                model, self._data, epoch, options, tokenizer=self._parts.tokenize
            )
        is_due = epoch % self._options.eval_every == 0 or epoch == epochs
        if self._evaluate is not None and is_due:
            with _going_on("evaluation", epoch, (OSError, *data_errors)):
                metrics |= self._evaluate(
                    model=model,
                    transform=self._parts.val_transform,
                    tokenize=self._parts.tokenize,
                    epoch=epoch,
                    record=record,
                )
        return {
            name: value if isinstance(value, int) else float(value)
            for name, value in metrics.items()
        }

    def data(self) -> dict[str, str]:
        """Return a digest of each set that is measured on, as far as its files tell one.

        The name is that of the option, such as "val_data", or "SUITE/DATASET".
        """
        # An evaluation of the caller's own may be a mere function.
        of_evaluation = getattr(self._evaluate, "data_digests", dict)
        return {**self._digests, **of_evaluation()}

    def warn_of_changes(self, measured: Sequence[Mapping[str, Any]]) -> None:
        """Log which data of a run that goes on are not those that it was measured on.

        Args:
            measured: Its measurements, in order, as `metrics_table` takes them.
        """
        before: dict[str, Any] = {}
        for entry in measured:
            data = entry.get("data")
            before |= data if isinstance(data, dict) else {}
        now = self.data() if before else {}
        changed = [name for name, digest in now.items() if before.get(name, digest) != digest]
        if changed:
            _logger.warning(
                "The run goes on with other data than it was measured on before: %s; measurements "
                "from here on are not compared with those",
                one_sentence(", ".join(changed)),
            )

    def close(self) -> None:
        """End the processes that load the held-out data."""
        if self._stream is not None:
            self._stream.close()


class _Pictures(Dataset[tuple[Tensor, int]]):
    """The pictures of one of OpenCLIP's ImageNet data sets, decoded as all others are.

    Args:
        dataset: torchvision's of folders, or that of ImageNet V2, whose folders are numbers.
        transform: Picture to pixels.
    """

    def __init__(self, dataset: Any, transform: Callable[[Image.Image], Tensor]) -> None:
        self._samples: list[tuple[str, int]] = getattr(dataset, "samples", None) or [
            (str(path), int(path.parent.name)) for path in dataset.fnames
        ]
        self._transform = transform

    def __len__(self) -> int:
        return len(self._samples)

    def __getitem__(self, number: int) -> tuple[Tensor, int]:
        path, label = self._samples[number]
        try:
            return self._transform(to_rgb(open_image(path))), label
        except UnreadableImageError as error:
            raise UnusableDataError(f"{path}: {error}") from None


@contextmanager
def _going_on(what: str, epoch: int, errors: tuple[type[Exception], ...]) -> Iterator[None]:
    """Warn of errors that must not end a run, as of held-out data that is gone or a full disk."""
    try:
        yield
    except errors as error:
        # Of a loader's process torch tells the traceback, too, whose last line is the error.
        reason = one_sentence(str(error).strip().rpartition("\n")[2])
        _logger.warning(
            "The %s after epoch %d could not be finished: %s; the run goes on", what, epoch, reason
        )


def metrics_table(measured: Sequence[Mapping[str, Any]]) -> str:
    """Return a run's last measurements beside the best of the same data, as a table for a terminal.

    Losses, recalls and accuracies of held-out sets, and the averages of a suite; where it has none,
    its sets.

    Args:
        measured: Values by OpenCLIP's names, the completed epochs as "epoch" and, where they are
            known, "batch_size" and "data"; see `measured_alike`.
    """
    now = measured[-1]
    names = [name for name in now if name not in _BESIDE and not name.endswith("_rank")]
    averages = {name: found[1] for name in names if (found := _AVERAGE.match(name))}
    rows = []
    for name in sorted(names, key=lambda name: not name.endswith("loss")):
        if name not in averages and name.partition("/")[0] in averages.values():
            continue
        sign = -1 if name.endswith("loss") else 1
        scored = [e for e in measured if name in e and measured_alike(name, e, now)]
        best = max(scored, key=lambda entry: sign * entry[name])
        is_best = best[name] == now[name]
        earlier = f"{best[name]:.4f} after epoch {best['epoch']}"
        rows.append((name, Cell(now[name], f"{now[name]:.4f}"), "*" if is_best else earlier))
    return Table.of(["", "now", "best so far"], rows).text()


def save_results(metrics: Mapping[str, float], checkpoint_folder: Path) -> None:
    """Append measurements to OpenCLIP's `results.jsonl`."""
    checkpoint_folder.mkdir(parents=True, exist_ok=True)
    append_line(checkpoint_folder / RESULTS_NAME, json.dumps(dict(metrics)))


def evaluate_only(
    options: TrainOptions,
    device: torch.device,
    folder: Path | None,
    group: ProcessGroup,
    signals: StopSignals,
    *,
    evaluate: Evaluate | None,
) -> None:
    """Measure a run's model once, as it comes or with the weights that `--resume` names.

    Args:
        options: The run's, which name no training data.
        device: This process's device.
        folder: The run's folder, None to write nothing.
        group: All processes, of which rank 0 measures.
        signals: Signals to this process.
        evaluate: Measures more than OpenCLIP does.

    Raises:
        BadInputError: If the checkpoint cannot be read or does not fit.
        StoppedError: If a signal asked the run to leave.
        UnwrittenError: If what was measured cannot be written.
    """
    with as_bad_input():
        parts = build_model(options, device)
        checkpoint = load_start(options, folder, group) or {}
        epoch = restore(checkpoint, model=parts.model) if checkpoint else 0
    if options.rank != 0:
        return
    validation = Validation(options, parts, evaluate=evaluate)
    record = checkpoint.get("clip_pgs", {})
    try:
        with signals.interruptible():
            metrics = validation.run(epoch=epoch, epochs=epoch, record=record)
    except StopRequest:
        raise StoppedError(f"stopped by {signals.name}", signals.code) from None
    finally:
        validation.close()
    table = metrics_table([{"epoch": epoch, **metrics}])
    _logger.info("After epoch %d:\n\n%s", epoch, table)
    if folder is None:
        return
    with writing("what was measured"):
        save_results(metrics, folder / CHECKPOINTS_NAME)
    cost = {**asdict(Cost()), **record.get("cost", {})}
    loggers = MetricLoggers(options, folder, first_step=cost["steps"])
    data = validation.data()
    loggers.each(lambda logger: logger.validation(metrics, epoch=epoch, cost=cost, data=data))
    loggers.each(lambda logger: logger.close())
    _logger.info("Measurements are in %s", folder / CHECKPOINTS_NAME)
