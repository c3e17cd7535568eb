"""Models as the report lists them: runs that differ only in their seed are one."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from clip_pgs.evaluation.report.gather import Run


@dataclass(frozen=True)
class Model:
    """Runs with the same recipe and different seeds, or one run.

    Attributes:
        name: What the names of the runs have in common.
        runs: At least one.
    """

    name: str
    runs: tuple[Run, ...]

    @property
    def samples(self) -> float | None:
        """Image-caption pairs seen, mean over the runs."""
        return _mean([run.training.samples for run in self.runs])

    @property
    def flops(self) -> float | None:
        """Floating-point operations of training, mean over the runs."""
        return _mean([run.training.flops for run in self.runs])

    @property
    def seconds(self) -> float | None:
        """Wall time of training, mean over the runs."""
        return _mean([run.training.seconds for run in self.runs])

    @property
    def seeds(self) -> list[int]:
        """The seeds that are known."""
        return [run.training.seed for run in self.runs if run.training.seed is not None]


def group_by_seed(runs: Sequence[Run]) -> list[Model]:
    """Gather runs that differ only in their seed; a run of an unknown recipe stays alone.

    Two runs of the same recipe and the same seed are a repetition and say nothing about the
    spread over seeds, so that they stay apart from one another.

    Args:
        runs: In the order to show them.
    """
    groups: list[list[Run]] = []
    for run in runs:
        for group in groups:
            if _differ_in_seed_alone(run, group):
                group.append(run)
                break
        else:
            groups.append([run])
    names = _without_clash([_common_name([run.name for run in group]) for group in groups])
    return [Model(name, tuple(group)) for name, group in zip(names, groups, strict=True)]


def _differ_in_seed_alone(run: Run, group: Sequence[Run]) -> bool:
    recipe = run.training.recipe
    seeds = [other.training.seed for other in group]
    return bool(recipe) and recipe == group[0].training.recipe and run.training.seed not in seeds


def _common_name(names: Sequence[str]) -> str:
    """Return what names begin with, without what announces the seed: "pgs" of "pgs_seed3"."""
    if len(names) == 1:
        return names[0]
    start = names[0]
    while not all(name.startswith(start) for name in names):
        start = start[:-1]
    if all(name[len(start) :].isdigit() for name in names):
        # Of seeds 10 and 11 the names share a digit.
        start = start.rstrip("0123456789")
    return re.sub(r"[\W_]*(seed)?[\W_]*$", "", start, flags=re.IGNORECASE) or names[0]


def _without_clash(names: Sequence[str]) -> list[str]:
    """Number the names that occur before."""
    return [
        name if name not in names[:place] else f"{name} ({names[:place].count(name) + 1})"
        for place, name in enumerate(names)
    ]


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None
