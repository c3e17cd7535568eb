"""The summary: where each model stands, in three numbers.

The three are the axes of the paper's Figure 1: generalisation (mean top-1 of zero-shot
classification), robustness (mean top-1 over the sets that are shifted against ImageNet-1K, or
against the demo world's own images) and compositionality (mean accuracy over the splits).
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from clip_pgs.evaluation.report.entries import Family, key_facts, more_facts
from clip_pgs.evaluation.report.models import Model
from clip_pgs.evaluation.report.scores import Place, Score
from clip_pgs.evaluation.report.tables import RUN, Entry
from clip_pgs.evaluation.wording import counted, percent, spread_text


@dataclass(frozen=True)
class Axis:
    """One of the three numbers.

    Attributes:
        title: Its name.
        suite: Where it comes from.
        metric: The metric that is averaged.
        average: Name of the average.
        meaning: What it is, for captions.
    """

    title: str
    suite: str
    metric: str
    average: str
    meaning: str


# Whom a summary names beside a model: the plain method, the paper's best, and guessing.
_COMPARED = ("CLIP", "CLIP-PGS-0.3", "chance")

AXES = (
    Axis(
        "Generalisation",
        "zeroshot-classification",
        "acc1",
        "average",
        "mean zero-shot top-1 over the classification sets",
    ),
    Axis(
        "Robustness",
        "robustness",
        "acc1",
        "ood_average",
        "mean zero-shot top-1 over the shifted sets",
    ),
    Axis(
        "Compositionality",
        "compositionality",
        "acc",
        "average",
        "mean accuracy over the splits of hard negatives",
    ),
)


# The data sets of each axis, and the rows that have them.
SetGroups = dict[tuple[frozenset[str], ...], list[Entry]]


@dataclass(frozen=True)
class Headline:
    """A number of a summary.

    Attributes:
        title: Such as "Robustness".
        value: In percent, or "" where it was not measured.
        spread: Its standard deviation over seeds with a sign, or "".
        standing: What it is over, and how others do on the same sets.
    """

    title: str
    value: str
    spread: str
    standing: str


@dataclass(frozen=True)
class Card:
    """The summary of a model on one family of data sets.

    Attributes:
        name: Of the model.
        sentence: What it is.
        headlines: The three numbers.
    """

    name: str
    sentence: str
    headlines: list[Headline]


def axis_score(entry: Entry, axis: Axis) -> Score | None:
    """Return where a row stands on an axis, None where it was not measured."""
    return entry.scores.get(Place(axis.suite, axis.average, axis.metric, is_average=True))


def mean_over(entry: Entry, axis: Axis, sets: Sequence[str]) -> float | None:
    """Return what a row reaches on an axis over just these sets, None where it lacks one."""
    scores = [entry.scores.get(Place(axis.suite, name, axis.metric)) for name in sets]
    known = [score.mean for score in scores if score is not None]
    return statistics.fmean(known) if known and len(known) == len(sets) else None


def group_by_sets(family: Family, axes: Sequence[Axis]) -> SetGroups:
    """Gather the rows that can be compared on some axes: those with the same data sets.

    Args:
        family: The rows.
        axes: All of them must have been measured.

    Returns:
        For the data sets of each axis, the rows: models over just these, and the published methods
        and chance as far as they have them all.
    """
    groups: SetGroups = {}
    for entry in family.entries:
        scores = [axis_score(entry, axis) for axis in axes]
        if entry.kind == RUN and all(score is not None for score in scores):
            key = tuple(frozenset(score.sets) for score in scores if score is not None)
            groups.setdefault(key, []).append(entry)
    for key, members in groups.items():
        others = [
            entry
            for entry in family.entries
            if entry.kind != RUN
            and all(
                mean_over(entry, axis, sorted(sets)) is not None
                for axis, sets in zip(axes, key, strict=True)
            )
        ]
        members[:] = [entry for entry in family.entries if entry in others or entry in members]
    return groups


def make_cards(models: Sequence[Model], families: Sequence[Family]) -> list[Card]:
    """Summarise each model on each family of data sets that it was scored on."""
    return [
        _card(model, entry, family)
        for model in models
        for family in families
        if (entry := family.entry(model.name)) is not None and entry.scores
    ]


def _card(model: Model, entry: Entry, family: Family) -> Card:
    architecture = model.runs[0].training.architecture
    parts = [architecture, key_facts(model), more_facts(model)]
    place = (
        "on the paper's data sets" if family.is_paper else "on data sets that are not the paper's"
    )
    sentence = f"{', '.join(part for part in parts if part)}; scored {place}."
    return Card(model.name, sentence, [_headline(entry, axis, family) for axis in AXES])


def _headline(entry: Entry, axis: Axis, family: Family) -> Headline:
    score = axis_score(entry, axis)
    if score is None:
        return Headline(axis.title, "", "", "not measured")
    spread = spread_text(score.spread)
    others = [
        f"{other.name} {percent(mean)}"
        for other in family.entries
        if other.name in _COMPARED and other.kind != RUN
        if (mean := mean_over(other, axis, score.sets)) is not None
    ]
    over = f"over {counted(len(score.sets), 'set')}"
    standing = f"{over}; {', '.join(others)}" if others else over
    return Headline(axis.title, percent(score.mean), spread, standing)
