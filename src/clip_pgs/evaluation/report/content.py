"""What a report says, before it is given a form: sections of sentences, tables and figures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timezone

from clip_pgs.evaluation.published import Paper, read_paper
from clip_pgs.evaluation.report.appendix import details_tables, provenance_table, trouble_table
from clip_pgs.evaluation.report.entries import Family, make_families
from clip_pgs.evaluation.report.figures import (
    Figure,
    cost_figure,
    epochs_figure,
    radar_figure,
    suite_figure,
)
from clip_pgs.evaluation.report.gather import Run
from clip_pgs.evaluation.report.headlines import Card, make_cards
from clip_pgs.evaluation.report.models import Model, group_by_seed
from clip_pgs.evaluation.report.reference import reference_tables, source
from clip_pgs.evaluation.report.suite_table import suite_table
from clip_pgs.evaluation.report.tables import Cell, Column, Row, Table
from clip_pgs.evaluation.results import DONE
from clip_pgs.evaluation.wording import (
    SUITE_UNITS,
    counted,
    duration,
    scaled,
    suite_title,
)


@dataclass(frozen=True)
class Section:
    """The results of a suite on one family of data sets.

    Attributes:
        title: Its heading.
        anchor: A name for links.
        table: The results.
        figure: The same as bars.
    """

    title: str
    anchor: str
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
        models: The models.
        models_table: What stands behind each of them.
        sections: Suite by suite.
        trouble: What is missing or failed; None where nothing is.
        reference_title: Heading of the published tables that no run stands beside.
        reference: These tables.
        details: Every number.
        provenance: Weights, dates and versions.
        families: The scores behind all of it.
        paper: The published figures.
    """

    summary: str
    date: str
    cards: list[Card]
    overview: list[Figure]
    models: list[Model]
    models_table: Table
    sections: list[Section]
    trouble: Table | None
    reference_title: str
    reference: list[Table]
    details: list[Table]
    provenance: Table
    families: list[Family]
    paper: Paper

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
    sections = [_section(suite, family, paper) for family in families for suite in family.suites]
    order = list(SUITE_UNITS)
    sections.sort(key=lambda section: order.index(section.anchor.split("/")[0]))
    beside = {suite for family in families if family.is_paper for suite in family.suites}
    overview = [
        radar_figure(families, paper),
        cost_figure(models, families),
        epochs_figure(models, families),
    ]
    return Report(
        summary=_summary(models, families, paper),
        date=datetime.now(timezone.utc).date().isoformat(),
        cards=make_cards(models, families),
        overview=[figure for figure in overview if figure is not None],
        models=models,
        models_table=_models_table(models),
        sections=sections,
        trouble=trouble_table(runs),
        reference_title=f"Published, for reference: {paper.training}",
        reference=reference_tables(paper, without=beside),
        details=details_tables(runs),
        provenance=provenance_table(runs),
        families=families,
        paper=paper,
    )


def _section(suite: str, family: Family, paper: Paper) -> Section:
    unit = SUITE_UNITS[suite]
    if family.is_paper:
        title = f"{suite_title(suite)}, the paper's data sets"
        caption = f"{suite_title(suite)}, {unit}; published rows are from {source(paper, suite)}"
    else:
        title = f"{suite_title(suite)}, other data sets"
        caption = f"{suite_title(suite)}, {unit}; no published row is about these data sets"
    return Section(
        title=title,
        anchor=f"{suite}/{family.name}",
        table=suite_table(suite, family.entries, caption=caption, order=family.sets.get(suite, [])),
        figure=suite_figure(suite, family),
    )


def _models_table(models: Sequence[Model]) -> Table:
    headings = (
        ("architecture", False),
        ("training data", False),
        ("samples seen", True),
        ("FLOP", True),
        ("wall time", True),
        ("hardware", False),
        ("masking", False),
        ("seeds", True),
    )
    rows = []
    for model in models:
        training = model.runs[0].training
        texts = (
            training.architecture,
            training.data,
            scaled(model.samples),
            scaled(model.flops),
            duration(model.seconds),
            training.hardware,
            training.masking,
            ", ".join(map(str, model.seeds)),
        )
        cells = [
            Cell(text or "unknown", is_number=is_number)
            for text, (_, is_number) in zip(texts, headings, strict=True)
        ]
        rows.append(Row(model.name, cells))
    notes = []
    if any(len(model.runs) > 1 for model in models):
        notes.append("Runs that differ only in their seed are one row; costs are means of a run.")
    columns = [Column(heading) for heading, _ in headings]
    return Table("What stands behind each model", columns, rows, notes=notes)


def _summary(models: Sequence[Model], families: Sequence[Family], paper: Paper) -> str:
    runs = [run for model in models for run in model.runs]
    results = [result for run in runs for result in run.results]
    sets = {(r.suite, r.dataset) for r in results}
    suites = {r.suite for r in results}
    subject = counted(len(models), "model")
    if len(runs) > len(models):
        subject += f" ({counted(len(runs), 'run')})"
    parts = [f"{subject} on {counted(len(sets), 'data set')} of {counted(len(suites), 'suite')}"]
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
