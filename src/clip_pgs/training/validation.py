"""Measurements on held-out data during training, by OpenCLIP's own code and names."""

from __future__ import annotations

import argparse
import json
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Protocol

from open_clip_train.data import get_imagenet
from open_clip_train.train import evaluate as evaluate_with_open_clip
from torch import nn

from clip_pgs.data.loader import SampleStream
from clip_pgs.data.stream import build_val_stream
from clip_pgs.training.build import ModelParts
from clip_pgs.training.options import TrainOptions

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
        args: Options.
        parts: The model and its transforms.
        evaluate: Measures more than OpenCLIP does.
    """

    def __init__(
        self, args: TrainOptions, parts: ModelParts, *, evaluate: Evaluate | None = None
    ) -> None:
        self._args = args
        self._parts = parts
        self._evaluate = evaluate
        self._data: dict[str, Any] = {}
        self._stream: SampleStream | None = None
        if args.val_data:
            self._stream = build_val_stream(
                args, transform=parts.val_transform, tokenize=parts.tokenize
            )
            self._data["val"] = SimpleNamespace(dataloader=self._stream)
        transforms = (parts.train_transform, parts.val_transform)
        if args.imagenet_val is not None:
            self._data["imagenet-val"] = get_imagenet(args.openclip, transforms, "val")
        if args.imagenet_v2 is not None:
            self._data["imagenet-v2"] = get_imagenet(args.openclip, transforms, "v2")

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
        options = {**vars(self._args.openclip), "epochs": epochs, "rank": 0}
        # We report by ourselves, and the model is not wrapped.
        options |= {"distributed": False, "save_logs": False, "wandb": False}
        metrics = evaluate_with_open_clip(
            model, self._data, epoch, argparse.Namespace(**options), tokenizer=self._parts.tokenize
        )
        if self._evaluate is not None and _is_due(self._args.eval_every, epoch, epochs):
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
