"""What a report says, before it is given a form: sentences, tables and figures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timezone

from clip_pgs.evaluation.report.figures import (
    Figure,
    cost_figure,
    epochs_figure,
    radar_figure,
    suite_figure,
)
from clip_pgs.evaluation.report.gather import Model, Run, group_by_seed
from clip_pgs.evaluation.report.published import Paper, read_paper
from clip_pgs.evaluation.report.results_table import (
    details_tables,
    models_table,
    num_members,
    provenance_table,
    reference_tables,
    scores_csv,
    spread_text,
    suite_table,
    trouble_table,
)
from clip_pgs.evaluation.report.scores import (
    AXES,
    COMPARED,
    RUN,
    Axis,
    Entry,
    Family,
    Place,
    key_facts,
    make_families,
    more_facts,
    ordered_suites,
    suite_of,
)
from clip_pgs.evaluation.results import DONE
from clip_pgs.tables import Table, counted, percent


@dataclass(frozen=True)
class Headline:
    """A number of a summary.

    Attributes:
        title: Such as "Robustness".
        standing: What it is over, and how others do on the same sets.
        value: In percent, or "" where it was not measured.
        spread: Its standard deviation over seeds with a sign, or "".
    """

    title: str
    standing: str = "not measured"
    value: str = ""
    spread: str = ""


@dataclass(frozen=True)
class Card:
    """The summary of a model on one family of data sets: what it is, and its three numbers."""

    name: str
    sentence: str
    headlines: list[Headline]


@dataclass(frozen=True)
class Section:
    """The results of a suite on one family of data sets, as a table and the same as bars."""

    title: str
    table: Table
    figure: Figure


@dataclass(frozen=True)
class Report:
    """A report.

    Attributes:
        summary: One sentence on all of it.
        date: When it was made, such as "2026-11-22".
        cards: The summary of each model.
        overview: Figures on all suites.
        models: What stands behind each model.
        sections: Suite by suite.
        trouble: What is missing or failed; None where nothing is.
        reference_title: Heading of the published tables that no run stands beside.
        reference: These tables.
        details: Every number.
        provenance: Weights, dates and versions.
        scores: All of it for programs, as CSV.
    """

    summary: str
    date: str
    cards: list[Card]
    overview: list[Figure]
    models: Table
    sections: list[Section]
    trouble: Table | None
    reference_title: str
    reference: list[Table]
    details: list[Table]
    provenance: Table
    scores: str

    @property
    def figures(self) -> list[Figure]:
        """All figures, in order."""
        return [*self.overview, *(section.figure for section in self.sections)]


def make_report(runs: Sequence[Run]) -> Report:
    """Make a report of some runs.

    Args:
        runs: From `gather_runs`, at least one.
    """
    paper = read_paper()
    models = group_by_seed(runs)
    families = make_families(models, paper)
    beside = {suite for family in families if family.is_paper for suite in family.suites}
    overview = [
        radar_figure(families, paper),
        cost_figure(models, families),
        epochs_figure(models, families),
    ]
    return Report(
        summary=_summary(models, families, paper),
        date=datetime.now(timezone.utc).date().isoformat(),
        cards=[
            _card(model, entry, family)
            for model in models
            for family in families
            if (entry := family.entry(model.name)) is not None and entry.scores
        ],
        overview=[figure for figure in overview if figure is not None],
        models=models_table(models),
        sections=[
            _section(suite, family, paper)
            for suite in ordered_suites(suite for family in families for suite in family.suites)
            for family in families
            if suite in family.suites
        ],
        trouble=trouble_table(runs),
        reference_title=f"Published, for reference: {paper.training}",
        reference=reference_tables(paper, without=beside),
        details=details_tables(runs),
        provenance=provenance_table(runs),
        scores=scores_csv(models, families, paper),
    )


def _section(suite: str, family: Family, paper: Paper) -> Section:
    facts = suite_of(suite)
    title, about = f"{facts.title}, other data sets", "no published row is about these data sets"
    if family.is_paper:
        title = f"{facts.title}, the paper's data sets"
        about = f"published rows are from {paper.source(suite)}"
    caption, order = f"{facts.title}, {facts.unit}; {about}", family.sets.get(suite, [])
    table = suite_table(suite, family.rows(suite), caption=caption, order=order)
    return Section(title, table, suite_figure(suite, family))


def _card(model: Model, entry: Entry, family: Family) -> Card:
    parts = [model.training.architecture, key_facts(model), more_facts(model)]
    sets = "the paper's data sets" if family.is_paper else "data sets that are not the paper's"
    sentence = f"{', '.join(part for part in parts if part)}; scored on {sets}."
    return Card(model.name, sentence, [_headline(entry, axis, family) for axis in AXES])


def _headline(entry: Entry, axis: Axis, family: Family) -> Headline:
    score = axis.score(entry)
    if score is None:
        return Headline(axis.title)
    members = num_members(Place(axis.suite, axis.average, axis.metric, True), family.entries)
    lacking = f"{len(score.sets)} of " if len(score.sets) < members else ""
    others = [
        f"{other.name} {percent(mean)}"
        for other in family.entries
        if other.name in COMPARED and other.kind != RUN
        if (mean := axis.mean_over(other, score.sets)) is not None
    ]
    standing = f"over {lacking}{counted(members, 'set')}"
    standing += f"; {', '.join(others)}" if others else ""
    return Headline(axis.title, standing, percent(score.mean), spread_text(score.spread))


def _summary(models: Sequence[Model], families: Sequence[Family], paper: Paper) -> str:
    runs = [run for model in models for run in model.runs]
    results = [result for run in runs for result in run.results]
    sets = {(result.suite, result.dataset) for result in results}
    subject = counted(len(models), "model")
    if len(runs) > len(models):
        subject += f" ({counted(len(runs), 'run')})"
    suites = counted(len({suite for suite, _ in sets}), "suite")
    parts = [f"{subject} on {counted(len(sets), 'data set')} of {suites}"]
    num_undone = sum(result.status != DONE for result in results)
    if num_undone:
        parts.append(f"{counted(num_undone, 'result')} missing or failed")
    if any(family.is_paper for family in families):
        parts.append(f"published rows were trained on {paper.training}")
    else:
        parts.append(
            "none of the sets is one of the paper's, so that nothing here compares with it"
        )
    return "; ".join(parts) + "."
