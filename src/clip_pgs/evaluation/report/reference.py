"""The paper's tables, for suites where no run of the report stands beside them."""

from __future__ import annotations

from collections.abc import Collection

from clip_pgs.evaluation.published import Paper
from clip_pgs.evaluation.report.entries import published_entries
from clip_pgs.evaluation.report.suite_table import suite_table
from clip_pgs.evaluation.report.tables import PUBLISHED, Cell, Column, Row, Table
from clip_pgs.evaluation.wording import (
    SUITE_TITLES,
    SUITE_UNITS,
    metric_label,
    percent,
    suite_title,
)

_COLUMN_TITLES = {
    ("imagenet1k", "acc1"): "ImageNet-1K zero-shot",
    ("imagenet1k", "linear_probe_acc1"): "ImageNet-1K linear probe",
}


def reference_tables(paper: Paper, *, without: Collection[str] = ()) -> list[Table]:
    """Return the paper's tables.

    Args:
        paper: The published figures.
        without: Suites whose published rows stand elsewhere in the report.
    """
    entries = published_entries(paper)
    tables = [
        suite_table(
            suite,
            entries,
            caption=f"{suite_title(suite)}, {SUITE_UNITS[suite]}; "
            f"published in {source(paper, suite)}",
            order=list(paper.sizes[suite]),
        )
        for suite in SUITE_TITLES
        if suite not in without
    ]
    return [*tables, _time_table(paper), _ablation_table(paper)]


def source(paper: Paper, suite: str) -> str:
    """Name the table of the paper that the published rows of a suite come from."""
    return f"{paper.citation} ({paper.address}), table of {paper.tables[suite]}"


def _time_table(paper: Paper) -> Table:
    rows = [
        Row(method.name, [Cell(f"{method.relative_time:g}")], kind=PUBLISHED)
        for method in paper.methods
        if method.relative_time is not None
    ]
    caption = f"Training time as a multiple of CLIP's; published in {source(paper, 'cost')}"
    return Table(caption, [Column("relative time")], rows)


def _ablation_table(paper: Paper) -> Table:
    places = dict.fromkeys(place for cells in paper.ablation.values() for place in cells)
    columns = [
        Column(_COLUMN_TITLES.get((name, metric), f"{name} {metric_label(metric)}"))
        for name, metric in places
    ]
    rows = [
        Row(variant, [Cell(percent(cells.get(place))) for place in places], kind=PUBLISHED)
        for variant, cells in paper.ablation.items()
    ]
    caption = f"Ablation, percent; published in {source(paper, 'ablation')}"
    return Table(caption, columns, rows, corner="variant")
