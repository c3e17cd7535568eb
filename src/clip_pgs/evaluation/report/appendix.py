"""What stands at the end of a report: what went wrong, every number, and where they come from."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from clip_pgs.evaluation.report.gather import Run
from clip_pgs.evaluation.report.tables import Cell, Column, Row, Table
from clip_pgs.evaluation.results import DONE, Result, ordered_metrics
from clip_pgs.evaluation.wording import (
    SUITE_TITLES,
    metric_label,
    percent,
    suite_title,
)


def trouble_table(runs: Sequence[Run]) -> Table | None:
    """List what is missing or failed, with the reason; None where everything was done."""
    rows = [
        Row(run.name, [_text(r.suite), _text(r.dataset), _text(r.status), _text(r.error or "")])
        for run in runs
        for r in run.results
        if r.status != DONE
    ]
    if not rows:
        return None
    columns = [Column("suite"), Column("data set"), Column("status"), Column("reason")]
    return Table("Data sets without a result", columns, rows)


def details_tables(runs: Sequence[Run]) -> list[Table]:
    """Return every metric of every run on every data set, a table per suite."""
    suites = dict.fromkeys([*SUITE_TITLES, *(r.suite for run in runs for r in run.results)])
    tables = [_details_table(suite, runs) for suite in suites]
    return [table for table in tables if table.rows]


def provenance_table(runs: Sequence[Run]) -> Table:
    """List weights, dates and versions of each run."""
    rows = []
    for run in runs:
        newest = max(run.results, key=lambda result: result.date)
        versions = ", ".join(f"{name} {version}" for name, version in newest.versions.items())
        settings = ", ".join(f"{name} {value}" for name, value in newest.settings.items())
        seed = "" if run.training.seed is None else str(run.training.seed)
        texts = [newest.pretrained, run.weights_digest, seed, newest.date, settings, versions]
        rows.append(Row(run.name, [_text(text) for text in texts]))
    headings = ("weights", "SHA-256 of the weights", "seed", "evaluated (UTC)", "settings")
    columns = [*(Column(heading) for heading in headings), Column("versions")]
    return Table("Where the numbers come from", columns, rows, corner="run")


def _details_table(suite: str, runs: Sequence[Run]) -> Table:
    results = [(run.name, r) for run in runs for r in run.results if r.suite == suite]
    metrics = ordered_metrics(result for _, result in results)
    is_pairs = any("items" in result.details for _, result in results)
    columns = [Column("data set"), *(Column(metric_label(metric)) for metric in metrics)]
    columns += [Column("pairs" if is_pairs else "images"), Column("details")]
    rows = [Row(name, _details_cells(result, metrics)) for name, result in results]
    return Table(f"{suite_title(suite)}, percent", columns, rows, corner="run")


def _details_cells(result: Result, metrics: Sequence[str]) -> list[Cell]:
    cells = [_text(result.dataset)]
    cells += [Cell(percent(result.metrics.get(metric))) for metric in metrics]
    if result.status != DONE:
        return [*cells, Cell(""), _text(result.status)]
    facts = ", ".join(
        f"{name.replace('_', ' ')} {_plain(value)}"
        for name, value in result.details.items()
        if name != "items" and isinstance(value, (str, int, float))
    )
    return [*cells, Cell(f"{result.samples:,}"), _text(facts)]


def _plain(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _text(text: str) -> Cell:
    return Cell(text, is_number=False)
