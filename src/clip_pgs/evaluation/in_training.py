"""Evaluate the model of a run while it trains."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from clip_pgs.common import is_first_process
from clip_pgs.evaluation.datasets import PRESENT, check_presence, clean_name
from clip_pgs.evaluation.masked_inference import masking_of
from clip_pgs.evaluation.models import LoadedModel
from clip_pgs.evaluation.report.scores import averages
from clip_pgs.evaluation.results import DONE, Result, epoch_folder, plain_record
from clip_pgs.evaluation.runner import data_digest, evaluate
from clip_pgs.evaluation.suites import get_suite, load_suite
from clip_pgs.integrations.open_clip import masking_state
from clip_pgs.tables import counted

logger = logging.getLogger(__name__)


class EvaluationInTraining:
    """Scores a suite after an epoch; what the training loop calls on rank 0.

    Args:
        suite: Name of a suite, or "all".
        datasets: "demo", "paper" or a list file.
        data_root: As for `load_suite`.
        run: The run's folder; results go to `eval/epoch_N` in it. None writes none.
        batch_size: Images per step, >= 1.
        workers: Processes that read images, >= 0.
        inference_masking: A masking through which images are encoded, in place of whole images:
            its name, or "run" for the run's own, with what it has found so far.
        inference_options: Its options.
        trained: The run's options by name: its masking, its `epochs`, whether it has `mae`.

    Raises:
        ValueError: If suite, list or masking is unknown, an option of it is wrong, none of the
            data sets is there, or a suite needs the text tower that an autoencoder lacks.
    """

    def __init__(
        self,
        *,
        suite: str,
        datasets: str,
        data_root: str | None = None,
        run: Path | None,
        batch_size: int = 64,
        workers: int | None = None,
        inference_masking: str | None = None,
        inference_options: Mapping[str, Any] | None = None,
        trained: Mapping[str, Any] | None = None,
    ) -> None:
        self._eval_sets = load_suite(suite, datasets=datasets, data_root=data_root)
        if (trained or {}).get("mae") is not None:
            for eval_set in self._eval_sets:
                if get_suite(eval_set.suite).needs_text:
                    raise ValueError(
                        f"the suite {eval_set.suite} encodes texts, and a masked autoencoder has "
                        "no text tower; evaluate it by --eval-suite linear-probe"
                    )
        found = [check_presence(eval_set) for eval_set in self._eval_sets]
        if all(presence.state != PRESENT for presence in found):
            raise ValueError(f"none of the data sets to evaluate is there: {found[0].reason}")
        for eval_set, presence in zip(self._eval_sets, found, strict=True):
            if presence.state != PRESENT and is_first_process():
                logger.warning(
                    "%s %s is missing: %s", eval_set.suite, eval_set.name, presence.reason
                )
        self._run = run
        self._batch_size = batch_size
        self._workers = workers
        self._name = inference_masking
        self._masking_after = partial(
            masking_of, inference_masking, inference_options, told=trained or {}, weights="the run"
        )
        self._epochs = (trained or {}).get("epochs", 1)
        self._masking_after(progress=1.0, state={})

    def data_digests(self) -> dict[str, str]:
        """Return a digest of each data set by `SUITE/DATASET`; see `data_digest`."""
        found = {}
        for eval_set in self._eval_sets:
            # What is not there is told when it is scored.
            with suppress(OSError, ValueError):
                name = f"{eval_set.suite}/{clean_name(eval_set.name)}"
                found[name] = data_digest(eval_set)[:12]
        return {name: digest for name, digest in found.items() if digest}

    def __call__(
        self,
        *,
        model: nn.Module,
        transform: Callable,
        tokenize: Callable,
        epoch: int,
        record: Mapping[str, Any] | None = None,
    ) -> dict[str, float]:
        """Score the model.

        Args:
            model: The plain model, in eval mode.
            transform: Image to pixels.
            tokenize: Captions to token numbers.
            epoch: Completed epochs.
            record: What a checkpoint of these weights says of the run; results keep it.

        Returns:
            Metrics and averages by `SUITE/DATASET/METRIC` and `SUITE/AVERAGE/METRIC`; an average
            that lacks sets is `average_of_3_of_5`, and a suite through a masking
            `SUITE@MASKING`. None where the weights are not finite, which
            is logged.
        """
        output = None if self._run is None else epoch_folder(self._run, epoch)
        name = f"epoch_{epoch}"
        source = name if self._run is None else f"{self._run} after {counted(epoch, 'epoch')}"
        masking = self._masking_after(
            progress=min(epoch / self._epochs, 1.0), state=masking_state(model)
        )
        weights, training = _in_float32(model), plain_record(record)
        loaded = LoadedModel(weights, transform, tokenize, name, source, masking, training)
        try:
            # The run must draw the same numbers as one without evaluation.
            with torch.random.fork_rng(devices=[]):
                results = evaluate(
                    loaded,
                    self._eval_sets,
                    output=output,
                    batch_size=self._batch_size,
                    workers=self._workers,
                    keep_features=False,
                )
        except (ValueError, OSError) as error:
            # Whether to go on with such a model is for the training loop to say.
            logger.warning("not evaluated after epoch %d: %s", epoch, error)
            return {}
        ending = "" if masking is None else f"@{self._name}"
        return {
            f"{suite}{ending}/{rest}": value
            for name, value in _by_name(results).items()
            for suite, _, rest in [name.partition("/")]
        }


def _in_float32(model: nn.Module) -> nn.Module:
    """Return the model, or a float32 copy of one that was trained in pure half precision."""
    types = {parameter.dtype for parameter in model.parameters()}
    return model if types <= {torch.float32} else copy.deepcopy(model).float()


def _by_name(results: Sequence[Result]) -> dict[str, float]:
    values: dict[str, Any] = {
        f"{result.suite}/{clean_name(result.dataset)}/{metric}": value
        for result in results
        if result.status == DONE
        for metric, value in result.metrics.items()
    }
    not_done = {(result.suite, result.dataset) for result in results if result.status != DONE}
    for mean in averages(results):
        num_lacking = sum((mean.suite, dataset) in not_done for dataset in mean.missing)
        num_all = len(mean.sets) + len(mean.missing)
        lack = f"_of_{num_all - num_lacking}_of_{num_all}" if num_lacking else ""
        values[f"{mean.suite}/{mean.name}{lack}/{mean.metric}"] = mean.value
    return {name: value for name, value in values.items() if value is not None}
