"""What guessing would score: the reference for sets that no published row is about."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from clip_pgs.evaluation.results import DONE, Result

_CLASS_METRICS = {"acc1": 1, "acc5": 5, "mean_per_class_recall": 1}
_CLASS_METRICS |= {f"lp_{name}": guesses for name, guesses in _CLASS_METRICS.items()}


def chance_results(results: Iterable[Result]) -> list[Result]:
    """Return what guessing scores on the same data sets.

    A class is guessed with 1 / classes, one of two captions with 1 / 2, and the partner among N
    images (or the captions of N images) lies within the first k with k / N. That is exact
    for retrieval with one caption per image, and nearly so with several.

    Args:
        results: Of any models; what is not done is left out.

    Returns:
        One result per suite and data set, with those metrics whose chance level is known. The
        number of classes is what a result's `details` tell.
    """
    guesses: dict[tuple[str, str], Result] = {}
    for result in results:
        if result.status == DONE:
            guess = replace(result, metrics={}, weights_digest="")
            guess = guesses.setdefault((result.suite, result.dataset), guess)
            # A table of results does not tell the classes, and the next model's files may.
            guess.metrics.update(_chance_metrics(result))
    return [guess for guess in guesses.values() if guess.metrics]


def _chance_metrics(result: Result) -> dict[str, float | None]:
    metrics: dict[str, float | None] = {}
    num_classes = result.details.get("classes")
    for name, value in result.metrics.items():
        if value is None:
            continue
        if "_retrieval_recall@" in name and result.samples:
            metrics[name] = min(1.0, int(name.rpartition("@")[2]) / result.samples)
        elif name == "acc":
            metrics[name] = 0.5
        elif name in _CLASS_METRICS and num_classes:
            metrics[name] = min(1.0, _CLASS_METRICS[name] / num_classes)
    return metrics
