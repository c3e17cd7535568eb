"""The numbers of a report: averages over data sets, means over seeds, and the rows they stand in.

Averages are those of the CLIP-PGS paper (https://arxiv.org/abs/2503.17080). Robustness:
`id_average` is the mean over all sets, ImageNet-1K among them, and `ood_average` the mean without
it. Compositionality: `object` is the mean of SugarCrepe's add_obj, replace_obj and swap_obj,
`attribute` that of add_att, replace_att and swap_att, and `relation` is replace_rel. The paper's
printed averages follow from its cells but for these: the `ood_average` of CLIP is 29.9 (printed
29.0) and of A-CLIP 29.3 (30.3); the `object` average of CLIP is 73.9 (73.7) and of A-CLIP 70.2
(71.6); the `attribute` average of A-CLIP is 68.5 (68.4) and of E-CLIP 67.9 (68.4).

Data sets are of two families: the paper's, and all others, which no published row is about.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from clip_pgs.evaluation.report.gather import Model
from clip_pgs.evaluation.report.published import Paper
from clip_pgs.evaluation.results import DONE, Result, ordered_metrics
from clip_pgs.evaluation.suites import SUITES, Suite, get_suite
from clip_pgs.tables import PUBLISHED, counted, duration, scaled

RUN, CHANCE = "run", "chance"
PAPER_SETS, OTHER_SETS = "paper", "other"
# The sets that others vary, where a result does not say it of itself.
REFERENCE_NAMES = ("imagenet1k", "shape")
# Whom a summary names beside a model: the plain method, the paper's best, and guessing.
COMPARED = ("CLIP", "CLIP-PGS-0.3", "chance")

_CLASS_METRICS = {"acc1": 1, "acc5": 5, "mean_per_class_recall": 1}
_CLASS_METRICS |= {f"lp_{name}": guesses for name, guesses in _CLASS_METRICS.items()}


def suite_of(name: str) -> Suite:
    """Return what a suite declares; one that is not registered here has its name alone.

    Args:
        name: As a result tells it. Nothing is imported, whatever it is.
    """
    if name in SUITES.names():
        return get_suite(name)
    blanks: dict[str, Any] = {"summary": "", "task": "", "types": (), "metrics": {}}
    return Suite(name=name, title=name, unit="percent", main_metrics=(), **blanks)


def ordered_suites(names: Iterable[str]) -> list[str]:
    """Return suites once each, in the report's order."""
    return sorted(dict.fromkeys(names), key=lambda name: suite_of(name).order)


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
class Average:
    """One metric, averaged.

    Attributes:
        suite: Such as "robustness".
        name: "average", over the suite; "id_average", "ood_average", "object", "attribute" or
            "relation".
        metric: Such as "acc1".
        value: Mean over `sets`, in [0, 1].
        sets: The data sets that it covers.
        missing: Those that belong to it but have no such number. Beside published averages such a
            mean says nothing.
    """

    suite: str
    name: str
    metric: str
    value: float
    sets: tuple[str, ...]
    missing: tuple[str, ...] = ()


@dataclass(frozen=True)
class Score:
    """A metric over the runs of a model.

    Attributes:
        mean: In [0, 1].
        spread: Standard deviation of the runs as a sample of all seeds (n - 1); None for one run.
        num_runs: Runs that have the metric.
        sets: The data sets it covers.
        members: Those that belong to it, measured or not.
    """

    mean: float
    spread: float | None = None
    num_runs: int = 1
    sets: tuple[str, ...] = ()
    members: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Entry:
    """A model in the tables and figures of a suite.

    Attributes:
        name: Of the model.
        kind: "published", "run" or "chance".
        scores: Of the model, by place.
        facts: What must be known to read its numbers.
        more: What else is worth knowing.
        printed: Averages as a paper prints them, by suite and name.
        ties: Ties and items of each suite that counts ties, means over the runs.
        num_runs: Seeds.
    """

    name: str
    kind: str
    scores: dict[Place, Score]
    facts: str = ""
    more: str = ""
    printed: dict[tuple[str, str], float] = field(default_factory=dict)
    ties: dict[str, tuple[float, float]] = field(default_factory=dict)
    num_runs: int = 1


@dataclass(frozen=True)
class Family:
    """All rows on one family of data sets.

    Attributes:
        name: "paper" or "other".
        entries: Published methods (of the paper's sets), models, and chance (of other sets).
        sets: Names of the data sets by suite, in order, done or not.
    """

    name: str
    entries: tuple[Entry, ...]
    sets: dict[str, list[str]]

    @property
    def is_paper(self) -> bool:
        """Whether these are the paper's data sets."""
        return self.name == PAPER_SETS

    @property
    def words(self) -> str:
        """What to call these data sets in a sentence."""
        return "the paper's data sets" if self.is_paper else "data sets that are not the paper's"

    @property
    def suites(self) -> list[str]:
        """The suites in which a model was scored."""
        return ordered_suites(
            place.suite for e in self.entries if e.kind == RUN for place in e.scores
        )

    def rows(self, suite: str) -> list[Entry]:
        """Return the rows that have a score of a suite."""
        return [e for e in self.entries if any(place.suite == suite for place in e.scores)]

    def entry(self, name: str) -> Entry | None:
        """Return the model of a name."""
        return next((e for e in self.entries if e.kind == RUN and e.name == name), None)


@dataclass(frozen=True)
class Axis:
    """One of the three numbers of a summary, the axes of the paper's Figure 1.

    Attributes:
        title: Its name.
        place: The average that it is.
        meaning: What it is, for captions.
    """

    title: str
    place: Place
    meaning: str

    def score(self, entry: Entry) -> Score | None:
        """Return where a row stands, None where it was not measured."""
        return entry.scores.get(self.place)

    def mean_over(self, entry: Entry, sets: Iterable[str]) -> float | None:
        """Return what a row reaches over just these sets, None where it lacks one."""
        suite, _, metric, _ = self.place
        scores = [entry.scores.get(Place(suite, name, metric)) for name in sorted(sets)]
        known = [score.mean for score in scores if score is not None]
        return statistics.fmean(known) if known and len(known) == len(scores) else None


AXES = (
    Axis(
        "Generalization",
        Place("zeroshot-classification", "average", "acc1", is_average=True),
        "mean zero-shot top-1 over the classification sets",
    ),
    Axis(
        "Robustness",
        Place("robustness", "ood_average", "acc1", is_average=True),
        "mean zero-shot top-1 over the shifted sets",
    ),
    Axis(
        "Compositionality",
        Place("compositionality", "average", "acc", is_average=True),
        "mean accuracy over the splits of hard negatives",
    ),
)


def averages(results: Iterable[Result]) -> list[Average]:
    """Average the results of one model.

    Args:
        results: Of any suites, finished or not.

    Returns:
        The averages, suite by suite in the order of the results. One that covers no data set is
        left out, and so are `id_average` and `ood_average` where it is unknown which set is the
        original: the one whose `details` hold `is_reference`, else one of `REFERENCE_NAMES`.

    Raises:
        ValueError: If the results are those of several models, or of one set twice.
    """
    results = list(results)
    keys = {result.model_key for result in results}
    if len(keys) > 1:
        raise ValueError(f"averages are of one model's results, got those of {len(keys)}")
    averaged = []
    for suite in dict.fromkeys(result.suite for result in results):
        members = [result for result in results if result.suite == suite]
        names = [result.dataset for result in members]
        if len(set(names)) < len(names):
            raise ValueError(f"averages of {suite} need each data set once, got {', '.join(names)}")
        done = {result.dataset: result for result in members if result.status == DONE}
        for name, group in _groups(suite, members).items():
            for metric in ordered_metrics(done.values()):
                values = {
                    dataset: value
                    for dataset in group
                    if dataset in done and (value := done[dataset].metrics.get(metric)) is not None
                }
                if values:
                    missing = tuple(dataset for dataset in group if dataset not in values)
                    mean = sum(values.values()) / len(values)
                    averaged.append(Average(suite, name, metric, mean, tuple(values), missing))
    return averaged


def score_runs(runs: Sequence[Sequence[Result]]) -> dict[Place, Score]:
    """Score the runs of one model.

    Args:
        runs: The results of each run on one family of data sets.

    Returns:
        A score for each data set, average and metric that at least one run has. An average is
        taken within each run, over the sets of which all runs with the metric have it, as a mean
        over runs and their spread would otherwise mix data sets.
    """
    # By place, of each run: the value, the sets it covers, and those that belong to it.
    found: dict[Place, list[tuple[float, tuple[str, ...], tuple[str, ...]]]] = {}
    for results in runs:
        for result in results:
            for metric, value in result.metrics.items():
                if result.status == DONE and value is not None:
                    place = Place(result.suite, result.dataset, metric)
                    sets = (result.dataset,)
                    found.setdefault(place, []).append((value, sets, sets))
    for results in _on_shared_sets(runs):
        means = averages(results)
        doubled = {mean.suite for mean in means if mean.name == "id_average"}
        for mean in means:
            if mean.name != "average" or mean.suite not in doubled:
                place = Place(mean.suite, mean.name, mean.metric, is_average=True)
                members = mean.sets + mean.missing
                found.setdefault(place, []).append((mean.value, mean.sets, members))
    scores = {}
    for place, of_runs in found.items():
        values = [value for value, _, _ in of_runs]
        spread = statistics.stdev(values) if len(values) > 1 else None
        belonging = frozenset(name for _, _, members in of_runs for name in members)
        score = Score(statistics.fmean(values), spread, len(values), of_runs[-1][1], belonging)
        scores[place] = score
    return scores


def chance_results(results: Iterable[Result]) -> list[Result]:
    """Return what guessing scores on the same data sets.

    A class is guessed with 1 / classes, one of two captions with 1 / 2, and the image of a caption
    lies within the first k of N images with k / N. One of the c captions of an image lies within
    the first k of T captions with 1 - C(T - c, k) / C(T, k). Results tell T and not each c, for
    which T / N stands: exact where all images have as many captions, else a little too high.

    Args:
        results: Of any models; what is not done is left out.

    Returns:
        One result per suite and data set, with those metrics whose chance level is known. The
        number of classes is what a result's `details` tell, and that of captions, without which
        each image has one.
    """
    guesses: dict[tuple[str, str], Result] = {}
    for result in results:
        key = result.suite, result.dataset
        # The set that others vary decides which averages there are, also where it failed.
        if result.status != DONE and not result.details.get("is_reference"):
            continue
        if key not in guesses or guesses[key].status != DONE:
            guesses[key] = replace(result, metrics={}, weights_digest="", inference_masking="")
        if result.status == DONE:
            known, found = guesses[key].metrics, _chance_metrics(result)
            # A table of results does not tell classes and captions, as another model's files may.
            merged = known | found if result.details else found | known
            guesses[key] = replace(guesses[key], metrics=merged)
    return [guess for guess in guesses.values() if guess.metrics or guess.status != DONE]


def split_families(
    results: Iterable[Result], paper: Paper, names: Mapping[tuple[str, str], str] | None = None
) -> dict[str, list[Result]]:
    """Part the results of one run into the paper's data sets and others.

    A slice of a set of the paper, or another set of its name (the demo world has its own
    `sugar_crepe`), counts as another set; so do the missing and failed sets beside it.

    Args:
        results: Of one run.
        paper: Knows its sets by name and size.
        names: From `paper.set_names` of all runs of a report; None looks at these results alone.

    Returns:
        The results by family; those on the paper's sets under its names for them, each once: a
        second copy, such as `cifar10` beside `vtab/cifar10`, is another set.
    """
    results = list(results)
    names = paper.set_names(results) if names is None else names
    namesakes = {
        result.suite
        for result in results
        if result.status == DONE
        and paper.set_name(result) is None
        and paper.set_name(replace(result, status="")) is not None
    }
    families: dict[str, list[Result]] = {PAPER_SETS: [], OTHER_SETS: []}
    for result in results:
        name = names.get((result.suite, result.dataset))
        is_stray = result.status != DONE and result.suite in namesakes
        # The runs of a report may have scored a whole set and a slice under one name.
        if name is None or is_stray or paper.set_name(result) is None:
            families[OTHER_SETS].append(result)
        else:
            families[PAPER_SETS].append(replace(result, dataset=name))
    return families


def make_families(models: Sequence[Model], paper: Paper) -> list[Family]:
    """Score models, the published methods and chance on each family of data sets.

    Args:
        models: In the order to show them.
        paper: The published figures.

    Returns:
        The paper's sets and the other sets, each only if a model was scored on one of them.
    """
    names = paper.set_names(r for model in models for run in model.runs for r in run.results)
    split = [[split_families(run.results, paper, names) for run in model.runs] for model in models]
    families = []
    for name in (PAPER_SETS, OTHER_SETS):
        of_models = [[run[name] for run in runs] for runs in split]
        everything = [result for runs in of_models for run in runs for result in run]
        if not any(result.status == DONE for result in everything):
            continue
        rows = [_model_entry(model, runs) for model, runs in zip(models, of_models, strict=True)]
        if name == PAPER_SETS:
            published = published_family(paper)
            families.append(replace(published, entries=(*published.entries, *rows)))
        else:
            chance = Entry("chance", CHANCE, score_runs([chance_results(everything)]))
            families.append(Family(name, (*rows, chance), _set_order(everything, paper)))
    return families


def group_by_sets(
    family: Family, axes: Sequence[Axis]
) -> dict[tuple[frozenset[str], ...], list[Entry]]:
    """Gather the rows that can be compared on some axes: those with the same data sets.

    Args:
        family: The rows.
        axes: All of them must have been measured.

    Returns:
        For the data sets of each axis, the rows: models over just these, and the published methods
        and chance as far as they have them all; in the order of the family.
    """
    groups: dict[tuple[frozenset[str], ...], list[Entry]] = {}
    for entry in family.entries:
        scores = [axis.score(entry) for axis in axes]
        known = [score for score in scores if score is not None]
        if entry.kind == RUN and len(known) == len(axes):
            groups.setdefault(tuple(frozenset(score.sets) for score in known), []).append(entry)
    for key, members in groups.items():
        others = [
            entry
            for entry in family.entries
            if entry.kind != RUN
            and None not in [axis.mean_over(entry, s) for axis, s in zip(axes, key, strict=True)]
        ]
        groups[key] = [entry for entry in family.entries if entry in [*members, *others]]
    return groups


def published_family(paper: Paper) -> Family:
    """Return the rows of a paper's methods on its data sets."""
    facts = f"published, {paper.training.split(',')[0]}"
    entries = [
        Entry(m.name, PUBLISHED, score_runs([m.results]), facts, printed=m.averages)
        for m in paper.methods
    ]
    sets = {suite: list(of_suite) for suite, of_suite in paper.sizes.items()}
    return Family(PAPER_SETS, tuple(entries), sets)


def shown_metrics(suite: str, entries: Iterable[Entry]) -> list[str]:
    """Return the metrics of a suite's tables: the main ones, and all of a set without any."""
    by_set: dict[str, set[str]] = {}
    for entry in entries:
        for place in entry.scores:
            if place.suite == suite and not place.is_average:
                by_set.setdefault(place.name, set()).add(place.metric)
    main = suite_of(suite).main_metrics
    others = {m for metrics in by_set.values() if metrics.isdisjoint(main) for m in metrics}
    known = set().union(*by_set.values())
    return [*(metric for metric in main if metric in known), *sorted(others)]


def _groups(suite: str, members: Sequence[Result]) -> dict[str, list[str]]:
    """Return which data sets each average of a suite covers."""
    names = [result.dataset for result in members]
    groups = {"average": names}
    if suite_of(suite).has_reference:
        references = {result.dataset for result in members if result.details.get("is_reference")}
        references = references or set(names).intersection(REFERENCE_NAMES)
        if references:
            groups["id_average"] = names
            groups["ood_average"] = [name for name in names if name not in references]
    parts = suite_of(suite).parts
    known = {split for splits in parts.values() for split in splits}
    placed = [name.rpartition("/") for name in names]
    folders = dict.fromkeys(folder for folder, _, split in placed if split in known)
    for part, splits in parts.items():
        # With several folders, as a list of one's own may have, each split counts in each.
        groups[part] = [
            f"{folder}/{split}" if folder else split for folder in folders for split in splits
        ]
    return groups


def _on_shared_sets(runs: Sequence[Sequence[Result]]) -> list[list[Result]]:
    """Leave out a metric of a set which another run, that has the metric elsewhere, lacks there."""
    known = [
        {
            Place(result.suite, result.dataset, metric)
            for result in results
            if result.status == DONE
            for metric, value in result.metrics.items()
            if value is not None
        }
        for results in runs
    ]
    measured = [{(place.suite, place.metric) for place in places} for places in known]

    def is_shared(place: Place) -> bool:
        of_metric = (place.suite, place.metric)
        pairs = zip(known, measured, strict=True)
        return all(place in places for places, metrics in pairs if of_metric in metrics)

    return [
        [
            replace(
                result,
                metrics={
                    metric: value
                    for metric, value in result.metrics.items()
                    if is_shared(Place(result.suite, result.dataset, metric))
                },
            )
            for result in results
        ]
        for results in runs
    ]


def _chance_metrics(result: Result) -> dict[str, float | None]:
    metrics: dict[str, float | None] = {}
    num_classes = result.details.get("classes")
    for name, value in result.metrics.items():
        if value is None:
            continue
        wanted, _, k = name.partition("_retrieval_recall@")
        if k.isdecimal() and result.samples:
            num_captions = result.details.get("captions", 0) if wanted == "text" else 0
            total = max(num_captions, result.samples)
            metrics[name] = _chance_to_find(total / result.samples, total, int(k))
        elif name == "acc":
            metrics[name] = 0.5
        elif name in _CLASS_METRICS and num_classes:
            metrics[name] = min(1.0, _CLASS_METRICS[name] / num_classes)
    return metrics


def _chance_to_find(partners: float, total: int, k: int) -> float:
    """Return how probably one of the partners, on average so many, is among k of all."""
    others = total - partners
    if k > others:
        return 1.0
    # C(others, k) / C(total, k), for a number of partners that need not be whole.
    ways = math.lgamma(others + 1) - math.lgamma(others - k + 1)
    ways += math.lgamma(total - k + 1) - math.lgamma(total + 1)
    return max(0.0, -math.expm1(min(0.0, ways)))


def _model_entry(model: Model, runs: Sequence[Sequence[Result]]) -> Entry:
    ties = {}
    tied = [r for run in runs for r in run if r.status == DONE and "ties" in r.details]
    for suite in dict.fromkeys(result.suite for result in tied):
        of_suite = [result for result in tied if result.suite == suite]
        num_runs = len({result.weights_digest for result in of_suite})
        num_ties = sum(result.details["ties"] for result in of_suite)
        num_items = sum(result.details.get("items", result.samples) for result in of_suite)
        ties[suite] = (num_ties / num_runs, num_items / num_runs)
    data, masking = model.training.short_data or "training unknown", model.training.masking
    samples, flops, seconds = map(model.mean, ("samples", "flops", "seconds"))
    more = [
        scaled(flops, "FLOP"),
        duration(seconds),
        f"masking {masking}" if masking else "",
        f"evaluated through {model.inference_masking}" if model.inference_masking else "",
        counted(len(model.runs), "seed") if model.seeds else "",
        *model.training.history,
    ]
    return Entry(
        name=model.name,
        kind=RUN,
        scores=score_runs(runs),
        facts=data if samples is None else f"{data}, {scaled(samples)} samples seen",
        more=", ".join(filter(None, more)),
        ties=ties,
        num_runs=len(model.runs),
    )


def _set_order(results: Sequence[Result], paper: Paper) -> dict[str, list[str]]:
    """Return the sets of each suite: a reference set first, namesakes in the paper's order."""
    references = {(r.suite, r.dataset) for r in results if r.details.get("is_reference")}
    sets: dict[str, list[str]] = {}
    for suite, dataset in dict.fromkeys((result.suite, result.dataset) for result in results):
        sets.setdefault(suite, []).append(dataset)
    for suite, names in sets.items():
        places = {name: place for place, name in enumerate(paper.sizes.get(suite, ()))}
        names.sort(key=lambda name: places.get(name.rsplit("/", 1)[-1], len(places)))
        names.sort(key=lambda name: (suite, name) not in references)
    return sets
