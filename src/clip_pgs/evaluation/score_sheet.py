"""The results of one model: what is kept of earlier calls, what is computed, what is written."""

from __future__ import annotations

import logging
import time
import traceback
from dataclasses import replace
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Any

import clip_pgs
from clip_pgs.common import one_sentence
from clip_pgs.evaluation.datasets.datasets import DamagedDataError, EvalSet
from clip_pgs.evaluation.datasets.presence import require
from clip_pgs.evaluation.features.features import NonFiniteFeaturesError
from clip_pgs.evaluation.identity import Identity
from clip_pgs.evaluation.models.weights import weights_digest
from clip_pgs.evaluation.results import (
    CSV_NAME,
    DONE,
    FAILED,
    MISSING,
    Result,
    read_result,
    read_results,
    write_csv,
    write_result,
)
from clip_pgs.evaluation.scoring import Scorer, Scores

logger = logging.getLogger(__name__)

ERRORS_NAME = "errors.log"
_PACKAGES = (
    "clip-benchmark",
    "open_clip_torch",
    "torch",
    "torchvision",
    "numpy",
    "scikit-learn",
)


class ScoreSheet:
    """The results of one model.

    Args:
        scorer: Computes what is not there yet.
        folder: Where the files are; None keeps none.
        is_forced: Whether to compute again what is there.
    """

    def __init__(self, scorer: Scorer, folder: Path | None, *, is_forced: bool) -> None:
        self._scorer = scorer
        self._folder = folder
        self._is_forced = is_forced
        self._identity = Identity(scorer.loaded, amp=scorer.amp)
        self._record: dict[str, Any] = {
            "model": scorer.loaded.name,
            "pretrained": scorer.loaded.source,
            "weights_digest": weights_digest(scorer.loaded.model),
            "settings": {
                "device": str(scorer.device),
                "amp": scorer.amp,
                "batch_size": scorer.batch_size,
            },
            "versions": {
                "clip-pgs": clip_pgs.__version__,
                **{package: version(package) for package in _PACKAGES},
            },
        }

    def fill_in(self, eval_set: EvalSet) -> tuple[Result, bool]:
        """Return a data set's result, and whether it was computed now.

        Args:
            eval_set: The data set as a suite evaluates it.

        Raises:
            NonFiniteFeaturesError: If the model gives features that are not finite; the result
                tells what else goes wrong.
        """
        start = time.perf_counter()
        scores, status, reason, identity = Scores({}, 0), DONE, None, ""
        try:
            require(eval_set)
            identity = self._identity.of(eval_set)
            kept = None if self._is_forced else self._kept(eval_set, identity)
            if kept is not None:
                return kept, False
            scores = self._scorer.score(eval_set)
        except NonFiniteFeaturesError:
            raise
        except FileNotFoundError as error:
            status, reason = MISSING, str(error)
        # Data sets are other people's files: anything may be wrong with one, and the rest must run.
        # What asks the process to leave is no Exception, and ends the evaluation.
        except Exception as error:
            is_told = isinstance(error, DamagedDataError)
            kind = "" if is_told else f"{type(error).__name__}: "
            status, reason = FAILED, f"{kind}{one_sentence(error)}"
            self._keep_traceback(eval_set)
        result = Result(
            **self._place(eval_set),
            status=status,
            metrics=scores.metrics,
            samples=scores.samples,
            error=reason,
            seconds=round(time.perf_counter() - start, 2),
            details={**scores.details, **_role(eval_set)},
            identity=identity,
            date=datetime.now(timezone.utc).isoformat(timespec="seconds"),
            **self._record,
        )
        return self._write(result, eval_set), True

    def forget_features(self) -> None:
        """Let go of image features in memory."""
        self._scorer.cache.forget()

    def write_csv(self) -> None:
        """Gather every result of these weights, also those of earlier calls, in one table."""
        if self._folder is None or not self._folder.is_dir():
            return
        digest = self._record["weights_digest"]
        results = [r for r in read_results(self._folder) if r.weights_digest == digest]
        try:
            write_csv(results, self._folder / CSV_NAME)
        except OSError as error:
            logger.warning("%s cannot be written: %s", self._folder / CSV_NAME, one_sentence(error))

    def _kept(self, eval_set: EvalSet, identity: str) -> Result | None:
        """Return the result of an earlier call under its present name, if its content is equal."""
        kept = self._read(eval_set)
        if kept is None or kept.status != DONE or not identity or kept.identity != identity:
            return None
        details = {key: value for key, value in kept.details.items() if key != "is_reference"}
        present = replace(
            kept,
            **self._place(eval_set),
            model=self._record["model"],
            pretrained=self._record["pretrained"],
            details={**details, **_role(eval_set)},
        )
        return kept if present == kept else self._write(present, eval_set)

    def _write(self, result: Result, eval_set: EvalSet) -> Result:
        if self._folder is None:
            return result
        earlier = self._read(eval_set)
        if (
            result.status == MISSING
            and earlier is not None
            and earlier.status == DONE
            and earlier.weights_digest == result.weights_digest
        ):
            # A disk that is not mounted today takes no finished number away.
            return result
        try:
            write_result(result, self._path(eval_set))
        except OSError as error:
            reason = f"cannot write the result: {error}"
            return replace(result, status=FAILED, error=reason)
        return result

    def _read(self, eval_set: EvalSet) -> Result | None:
        return None if self._folder is None else read_result(self._path(eval_set))

    def _path(self, eval_set: EvalSet) -> Path:
        assert self._folder is not None
        return self._folder / f"{eval_set.file_stem}.json"

    def _keep_traceback(self, eval_set: EvalSet) -> None:
        if self._folder is None:
            logger.exception("%s failed", eval_set.name)
            return
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            with (self._folder / ERRORS_NAME).open("a", encoding="utf-8") as file:
                file.write(f"{eval_set.suite} {eval_set.name}\n{traceback.format_exc()}\n")
        except OSError:
            logger.exception("%s failed", eval_set.name)

    @staticmethod
    def _place(eval_set: EvalSet) -> dict[str, Any]:
        return {
            "suite": eval_set.suite,
            "dataset": eval_set.name,
            "task": eval_set.task,
            "location": eval_set.location,
        }


def _role(eval_set: EvalSet) -> dict[str, bool]:
    return {"is_reference": True} if eval_set.is_reference else {}
