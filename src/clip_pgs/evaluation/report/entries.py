"""The rows of the report: published methods, models and chance, each with its scores."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from clip_pgs.evaluation.published import Paper
from clip_pgs.evaluation.report.chance import chance_results
from clip_pgs.evaluation.report.families import OTHER_SETS, PAPER_SETS, split_families
from clip_pgs.evaluation.report.models import Model
from clip_pgs.evaluation.report.scores import score_runs
from clip_pgs.evaluation.report.tables import CHANCE, PUBLISHED, RUN, Entry
from clip_pgs.evaluation.results import DONE, Result
from clip_pgs.evaluation.wording import SUITE_TITLES, counted, duration, scaled


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
    def suites(self) -> list[str]:
        """The suites in which a model was scored."""
        scored = {place.suite for e in self.entries if e.kind == RUN for place in e.scores}
        return [suite for suite in SUITE_TITLES if suite in scored]

    def entry(self, name: str) -> Entry | None:
        """Return the model of a name."""
        return next((e for e in self.entries if e.kind == RUN and e.name == name), None)


def make_families(models: Sequence[Model], paper: Paper) -> list[Family]:
    """Score models, the published methods and chance on each family of data sets.

    Args:
        models: In the order to show them.
        paper: The published figures.

    Returns:
        The paper's sets and the other sets, each only if a model was scored on one of them.
    """
    split = {
        model.name: [split_families(run.results, paper) for run in model.runs] for model in models
    }
    families = []
    for name in (PAPER_SETS, OTHER_SETS):
        of_models = {model.name: [run[name] for run in split[model.name]] for model in models}
        everything = [r for runs in of_models.values() for run in runs for r in run]
        if not any(result.status == DONE for result in everything):
            continue
        entries = published_entries(paper) if name == PAPER_SETS else []
        entries += [_model_entry(model, of_models[model.name]) for model in models]
        if name == OTHER_SETS:
            chance = score_runs([chance_results(everything)])
            entries.append(Entry("chance", CHANCE, chance))
            sets = _set_order(everything, paper)
        else:
            sets = {suite: list(of_suite) for suite, of_suite in paper.sizes.items()}
        families.append(Family(name, tuple(entries), sets))
    return families


def published_entries(paper: Paper) -> list[Entry]:
    """Return the rows of a paper's methods."""
    return [
        Entry(
            name=method.name,
            kind=PUBLISHED,
            scores=score_runs([method.results]),
            facts=f"published, {paper.training.split(',')[0]}",
            printed=method.averages,
        )
        for method in paper.methods
    ]


def key_facts(model: Model) -> str:
    """Return what must be known to read a model's numbers: its data, and how much of it."""
    data = model.runs[0].training.short_data or "training unknown"
    return data if model.samples is None else f"{data}, {scaled(model.samples)} samples seen"


def more_facts(model: Model) -> str:
    """Return what else stands behind a model: its cost, masking and seeds."""
    training = model.runs[0].training
    parts = [
        scaled(model.flops, "FLOP"),
        duration(model.seconds),
        f"masking {training.masking}" if training.masking else "",
        counted(len(model.runs), "seed") if model.seeds else "",
    ]
    return ", ".join(part for part in parts if part)


def _model_entry(model: Model, runs: Sequence[Sequence[Result]]) -> Entry:
    ties: dict[str, list[tuple[int, int]]] = {}
    for run in runs:
        of_run: dict[str, tuple[int, int]] = {}
        for result in run:
            if result.status == DONE and "ties" in result.details:
                num_ties, num_items = of_run.get(result.suite, (0, 0))
                items = result.details.get("items", result.samples)
                of_run[result.suite] = (num_ties + result.details["ties"], num_items + items)
        for suite, counts in of_run.items():
            ties.setdefault(suite, []).append(counts)
    return Entry(
        name=model.name,
        kind=RUN,
        scores=score_runs(runs),
        facts=key_facts(model),
        more=more_facts(model),
        ties={
            suite: (
                sum(t for t, _ in counts) / len(counts),
                sum(n for _, n in counts) / len(counts),
            )
            for suite, counts in ties.items()
        },
        num_runs=len(model.runs),
    )


def _set_order(results: Sequence[Result], paper: Paper) -> dict[str, list[str]]:
    """Return the sets of each suite: a reference set first, namesakes in the paper's order."""
    references = {(r.suite, r.dataset) for r in results if r.details.get("is_reference")}
    sets: dict[str, list[str]] = {}
    for suite, dataset in dict.fromkeys((result.suite, result.dataset) for result in results):
        sets.setdefault(suite, []).append(dataset)
    for suite, names in sets.items():
        order = list(paper.sizes.get(suite, ()))
        places = {name: place for place, name in enumerate(order)}
        names.sort(key=lambda name: places.get(name.rsplit("/", 1)[-1], len(places)))
        names.sort(key=lambda name: (suite, name) not in references)
    return sets
