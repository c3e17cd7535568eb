"""Evaluate one model over many data sets; one that fails does not stop the others."""

from __future__ import annotations

import logging
import time
import traceback
from collections.abc import Sequence
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

import clip_pgs
from clip_pgs.evaluation.benchmark import check_installation, default_workers, score
from clip_pgs.evaluation.datasets import EvalSet
from clip_pgs.evaluation.models import LoadedModel
from clip_pgs.evaluation.results import (
    CSV_NAME,
    DONE,
    FAILED,
    MISSING,
    Result,
    read_results,
    write_csv,
    write_result,
)
from clip_pgs.evaluation.weights import check_finite, weights_digest

logger = logging.getLogger(__name__)

ERRORS_NAME = "errors.log"
_PACKAGES = ("clip-benchmark", "open_clip_torch", "torch", "torchvision", "numpy")


def evaluate(
    loaded: LoadedModel,
    eval_sets: Sequence[EvalSet],
    *,
    output: str | Path | None = None,
    batch_size: int = 64,
    workers: int | None = None,
    amp: bool | None = None,
) -> list[Result]:
    """Score a model on data sets with clip_benchmark.

    Args:
        loaded: The model; it is scored where it is, in eval mode, and left in its own mode.
        eval_sets: From `load_suite`.
        output: Folder for the result files and `results.csv`, made if need be; None writes none.
        batch_size: Images per step, >= 1.
        workers: Processes that read images; None takes up to 4.
        amp: Whether to use half precision; None means on CUDA only.

    Returns:
        One result per data set, in the same order, its `status` "done", "missing" or "failed".

    Raises:
        ValueError: If the weights are not finite, an option is out of its range, or clip_benchmark
            cannot run here. Nothing is written then.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be >= 1, got {batch_size}")
    workers = default_workers() if workers is None else workers
    if workers < 0:
        raise ValueError(f"workers must be >= 0, got {workers}")
    check_installation()
    check_finite(loaded.model, name=loaded.source)
    device = next(loaded.model.parameters()).device
    settings = {
        "device": str(device),
        "amp": device.type == "cuda" if amp is None else amp,
        "batch_size": batch_size,
    }
    record: dict[str, Any] = {
        "model": loaded.name,
        "pretrained": loaded.source,
        "weights_digest": weights_digest(loaded.model),
        "settings": settings,
        "versions": {
            "clip-pgs": clip_pgs.__version__,
            **{package: version(package) for package in _PACKAGES},
        },
    }

    results = []
    was_training = loaded.model.training
    loaded.model.eval()
    try:
        for number, eval_set in enumerate(eval_sets, start=1):
            outcome = _attempt(loaded, eval_set, device, workers, settings, output)
            result = Result(
                suite=eval_set.suite,
                dataset=eval_set.name,
                task=eval_set.task,
                location=eval_set.location,
                date=datetime.now(timezone.utc).isoformat(timespec="seconds"),
                **outcome,
                **record,
            )
            results.append(result)
            _log_result(result, number, len(eval_sets))
            if output is not None:
                write_result(result, Path(output, f"{eval_set.file_stem}.json"))
                _rewrite_csv(Path(output), record["weights_digest"])
    finally:
        loaded.model.train(was_training)
    return results


def _attempt(
    loaded: LoadedModel,
    eval_set: EvalSet,
    device: torch.device,
    workers: int,
    settings: dict[str, Any],
    output: str | Path | None,
) -> dict[str, Any]:
    """Score one data set; turn whatever goes wrong with it into a status and a reason."""
    start = time.perf_counter()
    metrics: dict[str, float | None] = {}
    samples, status, reason = 0, DONE, None
    try:
        metrics, samples = score(
            loaded,
            eval_set,
            device=device,
            batch_size=settings["batch_size"],
            workers=workers,
            amp=settings["amp"],
        )
    except FileNotFoundError as error:
        status, reason = MISSING, str(error)
    # Data sets are other people's files: anything may be wrong with one, and the rest must run.
    except Exception as error:
        first_line = next(iter(str(error).strip().splitlines()), "")
        status, reason = FAILED, f"{type(error).__name__}: {first_line}".rstrip(": ")
        _keep_traceback(eval_set, output)
    seconds = round(time.perf_counter() - start, 2)
    return {
        "status": status,
        "metrics": metrics,
        "samples": samples,
        "error": reason,
        "seconds": seconds,
    }


def _keep_traceback(eval_set: EvalSet, output: str | Path | None) -> None:
    if output is None:
        logger.exception("%s failed", eval_set.name)
        return
    path = Path(output, ERRORS_NAME)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.write(f"{eval_set.suite} {eval_set.name}\n{traceback.format_exc()}\n")


def _log_result(result: Result, number: int, num_sets: int) -> None:
    if result.status == DONE:
        report = f"{result.samples} images in {result.seconds:.1f} s"
    else:
        report = f"{result.status}: {result.error}"
    logger.info("[%d/%d] %s: %s", number, num_sets, result.dataset, report)


def _rewrite_csv(output: Path, digest: str) -> None:
    """Gather every result of these weights, also those of earlier calls."""
    results = [result for result in read_results(output) if result.weights_digest == digest]
    write_csv(results, output / CSV_NAME)
