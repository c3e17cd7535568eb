"""Measurements on held-out data during training, by OpenCLIP's own code and names."""

from __future__ import annotations

import argparse
import json
import logging
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Protocol

import torch
from open_clip_train.data import get_imagenet
from open_clip_train.train import evaluate as evaluate_with_open_clip
from torch import nn

from clip_pgs.common import CHECKPOINTS_NAME
from clip_pgs.data.build import build_val_stream
from clip_pgs.data.loader import SampleStream
from clip_pgs.training.build import ModelParts, build_model
from clip_pgs.training.checkpoint import restore
from clip_pgs.training.checkpoint_store import load_start
from clip_pgs.training.distributed import ProcessGroup
from clip_pgs.training.options import TrainOptions
from clip_pgs.training.sinks import Sinks
from clip_pgs.training.stop import (
    StoppedError,
    StopRequest,
    StopSignals,
    as_bad_input,
    writing,
)
from clip_pgs.training.telemetry import Cost

RESULTS_NAME = "results.jsonl"
# What OpenCLIP puts beside its measurements.
_COUNTS = ("epoch", "num_samples")

_logger = logging.getLogger(__name__)


class Evaluate(Protocol):
    """An evaluation of the caller's own, run on rank 0 every `--eval-every` epochs."""

    def __call__(
        self, *, model: nn.Module, transform: Callable, tokenize: Callable, epoch: int
    ) -> Mapping[str, float]:
        """Return measurements by name.

        Args:
            model: The plain model in eval mode.
            transform: Image to pixels.
            tokenize: Captions to token numbers.
            epoch: Completed epochs.
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
        if options.imagenet_val is not None:
            self._data["imagenet-val"] = get_imagenet(options.openclip, transforms, "val")
        if options.imagenet_v2 is not None:
            self._data["imagenet-v2"] = get_imagenet(options.openclip, transforms, "v2")

    def run(self, *, epoch: int, epochs: int) -> dict[str, float]:
        """Measure what is due, leaving the model in eval mode.

        Args:
            epoch: Completed epochs.
            epochs: Epochs of the whole run; everything is due after the last.

        Returns:
            Values by OpenCLIP's names, empty where nothing was due.
        """
        model = self._parts.model
        model.eval()
        changes = {"epochs": epochs, "rank": 0}
        # We report by ourselves, and the model is not wrapped.
        changes |= {"distributed": False, "save_logs": False, "wandb": False}
        options = argparse.Namespace(**{**vars(self._options.openclip), **changes})
        metrics = evaluate_with_open_clip(
            model, self._data, epoch, options, tokenizer=self._parts.tokenize
        )
        if self._evaluate is not None and _is_due(self._options.eval_every, epoch, epochs):
            try:
                metrics |= self._evaluate(
                    model=model,
                    transform=self._parts.val_transform,
                    tokenize=self._parts.tokenize,
                    epoch=epoch,
                )
            except OSError as error:
                _logger.warning(
                    "The evaluation after epoch %d could not be finished: %s; the run goes on",
                    epoch,
                    error,
                )
        return {
            name: value if isinstance(value, int) else float(value)
            for name, value in metrics.items()
        }

    def close(self) -> None:
        """End the processes that load the held-out data."""
        if self._stream is not None:
            self._stream.close()


def describe_metrics(metrics: Mapping[str, float]) -> list[str]:
    """Return measurements as lines: OpenCLIP's in one, losses first, an evaluation's by its set."""
    lines: dict[str, list[str]] = {}
    for name, value in sorted(metrics.items(), key=lambda item: not item[0].endswith("loss")):
        place, _, metric = name.rpartition("/")
        if name not in _COUNTS:
            lines.setdefault(place, []).append(f"{metric} {value:.4g}")
    return [f"{place} {', '.join(values)}".lstrip() for place, values in lines.items()]


def _is_due(every: int, epoch: int, epochs: int) -> bool:
    return epoch % every == 0 or epoch == epochs


def save_results(metrics: Mapping[str, float], checkpoint_folder: Path) -> None:
    """Append measurements to OpenCLIP's `results.jsonl`."""
    checkpoint_folder.mkdir(parents=True, exist_ok=True)
    with (checkpoint_folder / RESULTS_NAME).open("a") as file:
        file.write(json.dumps(dict(metrics)) + "\n")


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
    try:
        with signals.interruptible():
            metrics = validation.run(epoch=epoch, epochs=epoch)
    except StopRequest:
        raise StoppedError(f"stopped by {signals.name}", signals.code) from None
    finally:
        validation.close()
    for line in describe_metrics(metrics):
        _logger.info("After epoch %d: %s", epoch, line)
    if folder is None:
        return
    with writing("what was measured"):
        save_results(metrics, folder / CHECKPOINTS_NAME)
    cost = {**asdict(Cost()), **checkpoint.get("clip_pgs", {}).get("cost", {})}
    sinks = Sinks(options, folder, first_step=cost["steps"])
    sinks.each(lambda sink: sink.validation(metrics, epoch=epoch, cost=cost))
    sinks.each(lambda sink: sink.close())
    _logger.info("Measurements are in %s", folder / CHECKPOINTS_NAME)
