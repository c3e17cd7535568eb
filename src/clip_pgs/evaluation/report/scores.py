"""Scores of a model: a mean and, over several seeds, a spread, for every set and every average."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from clip_pgs.evaluation.averages import Average, averages
from clip_pgs.evaluation.results import DONE, MISSING, Result


class Place(NamedTuple):
    """What a score is a score of.

    Attributes:
        suite: Such as "robustness".
        name: A data set, or an average such as "ood_average".
        metric: Such as "acc1".
        is_average: Whether `name` is an average.
    """

    suite: str
    name: str
    metric: str
    is_average: bool = False


@dataclass(frozen=True)
class Score:
    """A metric over the runs of a model.

    Attributes:
        mean: In [0, 1].
        spread: Standard deviation of the runs as a sample of all seeds (n - 1); None for one run.
        num_runs: Runs that have the metric.
        sets: The data sets it covers.
        num_members: How many belong to it, measured or not.
    """

    mean: float
    spread: float | None = None
    num_runs: int = 1
    sets: tuple[str, ...] = ()
    num_members: int = 1


def score_runs(runs: Sequence[Sequence[Result]]) -> dict[Place, Score]:
    """Score the runs of one model.

    Args:
        runs: The results of each run on one family of data sets.

    Returns:
        A score for each data set, average and metric that at least one run has. An average is
        taken within each run, over the sets that all runs of the suite have, as a mean over runs
        and their spread would otherwise mix data sets.
    """
    values: dict[Place, list[float]] = {}
    sets: dict[Place, tuple[str, ...]] = {}
    num_members: dict[Place, int] = {}
    for results in runs:
        for result in results:
            for metric, value in result.metrics.items():
                if result.status == DONE and value is not None:
                    place = Place(result.suite, result.dataset, metric)
                    values.setdefault(place, []).append(value)
                    sets[place] = (result.dataset,)
    for results in _on_shared_sets(runs):
        for average in _distinct(averages(results)):
            place = Place(average.suite, average.name, average.metric, is_average=True)
            values.setdefault(place, []).append(average.value)
            sets[place] = average.sets
            members = len(average.sets) + len(average.missing)
            num_members[place] = max(members, num_members.get(place, 0))
    return {
        place: Score(
            mean=statistics.fmean(of_runs),
            spread=statistics.stdev(of_runs) if len(of_runs) > 1 else None,
            num_runs=len(of_runs),
            sets=sets[place],
            num_members=num_members.get(place, 1),
        )
        for place, of_runs in values.items()
    }


def _on_shared_sets(runs: Sequence[Sequence[Result]]) -> list[list[Result]]:
    """Count a set as missing that another run, which has something of the suite, has not."""
    done = [{(r.suite, r.dataset) for r in results if r.status == DONE} for results in runs]

    def is_shared(result: Result) -> bool:
        of_suite = [places for places in done if any(suite == result.suite for suite, _ in places)]
        return all((result.suite, result.dataset) in places for places in of_suite)

    return [
        [result if is_shared(result) else replace(result, status=MISSING) for result in results]
        for results in runs
    ]


def _distinct(means: Sequence[Average]) -> list[Average]:
    """Leave out the plain average of a suite where `id_average` is the same."""
    doubled = {mean.suite for mean in means if mean.name == "id_average"}
    return [mean for mean in means if mean.name != "average" or mean.suite not in doubled]
