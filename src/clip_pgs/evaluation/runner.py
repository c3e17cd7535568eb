"""Evaluate one model over many data sets; one that fails does not stop the others."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from pathlib import Path

from clip_pgs.evaluation.benchmark import check_installation, default_workers
from clip_pgs.evaluation.datasets.datasets import EvalSet
from clip_pgs.evaluation.features.feature_cache import FeatureCache
from clip_pgs.evaluation.features.features import NonFiniteFeaturesError
from clip_pgs.evaluation.models.models import LoadedModel
from clip_pgs.evaluation.models.weights import check_finite
from clip_pgs.evaluation.pace import Pace, format_seconds
from clip_pgs.evaluation.ranks import Ranks
from clip_pgs.evaluation.results import DONE, Result
from clip_pgs.evaluation.score_sheet import ScoreSheet
from clip_pgs.evaluation.scoring import Scorer
from clip_pgs.evaluation.work import divide

logger = logging.getLogger(__name__)

FEATURES_NAME = "features"


def evaluate(
    loaded: LoadedModel,
    eval_sets: Sequence[EvalSet],
    *,
    output: str | Path | None = None,
    batch_size: int = 64,
    workers: int | None = None,
    amp: bool | None = None,
    force: bool = False,
    keep_features: bool = True,
    ranks: Ranks | None = None,
) -> list[Result]:
    """Score a model on data sets.

    A result in `output` of the same model and data is kept, whatever either was called, so that
    an interrupted evaluation continues where it stopped.

    Args:
        loaded: The model; it is scored where it is, in eval mode, and left in its own mode.
        eval_sets: From `load_suite`.
        output: Folder for the result files and `results.csv`, made if need be; None writes none.
        batch_size: Images per step, >= 1.
        workers: Processes that read images; None takes up to 4.
        amp: Whether to use half precision; None means on CUDA only.
        force: Whether to redo what is done.
        keep_features: Whether to keep image features in files, in `output`/features.
        ranks: Processes that share the data sets. Each calls this function with its own copy of
            the model and gets the results of all.

    Returns:
        One result per data set, in the same order, its `status` "done", "missing" or "failed".

    Raises:
        ValueError: If weights or features are not finite, an option is out of its range, or
            clip_benchmark cannot run here.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be >= 1, got {batch_size}")
    workers = default_workers() if workers is None else workers
    if workers < 0:
        raise ValueError(f"workers must be >= 0, got {workers}")
    ranks = ranks or Ranks()
    check_installation()
    check_finite(loaded.model, name=loaded.source)
    device = next(loaded.model.parameters()).device
    amp = device.type == "cuda" if amp is None else amp
    folder = None if output is None else Path(output)
    cache_folder = folder / FEATURES_NAME if folder is not None and keep_features else None
    cache = FeatureCache(loaded, folder=cache_folder)
    scorer = Scorer(loaded, device, batch_size, workers, amp, cache)
    sheet = ScoreSheet(scorer, folder, is_forced=force)

    was_training = loaded.model.training
    loaded.model.eval()
    try:
        share, complaint = _score_share(sheet, eval_sets, ranks)
    finally:
        loaded.model.train(was_training)
    gathered = ranks.gather((share, complaint))
    if ranks.is_main:
        sheet.write_csv()
    for _, complaint in gathered:
        if complaint is not None:
            raise ValueError(complaint)
    results = {number: result for share, _ in gathered for number, result in share.items()}
    return [results[number] for number in range(len(eval_sets))]


def _score_share(
    sheet: ScoreSheet, eval_sets: Sequence[EvalSet], ranks: Ranks
) -> tuple[dict[int, Result], str | None]:
    """Score this rank's data sets.

    Returns:
        The results by the data set's number, and why the model cannot be scored at all, or None.
    """
    pieces = divide(eval_sets, ranks.world_size)[ranks.rank]
    pace = Pace([piece.num_bytes for piece in pieces])
    who = f"rank {ranks.rank} " if ranks.world_size > 1 else ""
    location = ""
    results: dict[int, Result] = {}
    for count, piece in enumerate(pieces, start=1):
        eval_set = eval_sets[piece.number]
        if eval_set.location != location:
            # Pieces of one location follow each other; what they share is of no use afterwards.
            sheet.forget_features()
            location = eval_set.location
        start = time.perf_counter()
        try:
            result, is_new = sheet.fill_in(eval_set)
        except NonFiniteFeaturesError as error:
            # The other ranks wait for this one; it speaks up when they meet.
            return results, str(error)
        results[piece.number] = result
        pace.advance(was_work=is_new and result.status == DONE)
        seconds = time.perf_counter() - start
        outcome = _outcome(result, is_new, seconds, pace.seconds_left())
        place = f"{who}[{count}/{len(pieces)}]"
        logger.info("%s %s %s: %s", place, eval_set.suite, eval_set.name, outcome)
        if ranks.is_main and is_new:
            sheet.write_csv()
    return results, None


def _outcome(result: Result, is_new: bool, seconds: float, seconds_left: float | None) -> str:
    if result.status != DONE:
        return f"{result.status}: {result.error}"
    if not is_new:
        return "done before"
    outcome = f"{result.samples} samples in {seconds:.1f} s"
    if seconds > 0:
        outcome += f", {result.samples / seconds:.0f}/s"
    if seconds_left is not None:
        outcome += f", {format_seconds(seconds_left)} left"
    return outcome
