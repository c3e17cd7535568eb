"""Results as a table for the terminal, in percent."""

from __future__ import annotations

from collections.abc import Sequence

from clip_pgs.evaluation.averages import Average, averages
from clip_pgs.evaluation.results import DONE, Result, ordered_metrics
from clip_pgs.evaluation.wording import average_label, metric_label, percent

# Shorter than in the report, as a terminal has 80 columns.
_LABELS = {"acc": "acc", "acc1": "acc1", "acc5": "acc5", "mean_per_class_recall": "recall"}
# Facts about a number that stand beside it, by their place in `details`.
_FACTS = {"linear-probe": "regularisation", "compositionality": "ties"}


def format_table(results: Sequence[Result]) -> str:
    """Render the results of one model, a block of lines per suite.

    Args:
        results: Results in the order to show them.

    Returns:
        Text that ends in a newline. Metrics are in percent; the averages of a suite stand below
        its sets, each over those that were done.

    Raises:
        ValueError: If the results are those of several models.
    """
    by_suite: dict[str, list[Result]] = {}
    for result in results:
        by_suite.setdefault(result.suite, []).append(result)
    return "\n".join(_suite_table(suite, members) for suite, members in by_suite.items())


def _suite_table(suite: str, results: Sequence[Result]) -> str:
    done = [result for result in results if result.status == DONE]
    metrics = ordered_metrics(done)
    fact = _FACTS.get(suite)
    header = [suite]
    if done:
        header += [*map(_label, metrics), *([fact] if fact else [])]
        header.append("samples")
    rows = [_row(result, metrics, fact) for result in results]
    if len(results) > 1:
        rows += _average_rows(averages(results), metrics, len(header))
    return _aligned([header, *rows])


def _row(result: Result, metrics: Sequence[str], fact: str | None) -> list[str]:
    if result.status != DONE:
        return [result.dataset, f"{result.status}: {result.error}"]
    cells = [result.dataset, *(_percent(result.metrics.get(name)) for name in metrics)]
    if fact:
        value = result.details.get(fact, "")
        cells.append(f"{value:.3g}" if isinstance(value, float) else str(value))
    return [*cells, str(result.samples)]


def _average_rows(
    all_averages: Sequence[Average], metrics: Sequence[str], num_columns: int
) -> list[list[str]]:
    by_name: dict[str, dict[str, Average]] = {}
    for average in all_averages:
        by_name.setdefault(average.name, {})[average.metric] = average
    if "id_average" in by_name:
        # Of robustness the two are the same mean.
        del by_name["average"]
    rows = []
    for name, by_metric in by_name.items():
        # A metric may be undefined on some sets, such as acc5 on fewer than 5 classes.
        widest = max(by_metric.values(), key=lambda average: len(average.sets))
        label = average_label(name)
        # The parts of a suite are named by what they are about.
        label += f"{'' if label.endswith('average') else ' average'} ({_share(widest)})"
        values = [by_metric[metric].value if metric in by_metric else None for metric in metrics]
        row = [label, *(_percent(value) for value in values)]
        rows.append(row + [""] * (num_columns - len(row)))
    return rows


def _share(average: Average) -> str:
    num_sets, num_missing = len(average.sets), len(average.missing)
    return f"{num_sets} of {num_sets + num_missing}" if num_missing else str(num_sets)


def _aligned(rows: Sequence[Sequence[str]]) -> str:
    """Align full rows in columns; a short row is a name and a remark that spans them."""
    num_columns = len(rows[0])
    full_rows = [row for row in rows if len(row) == num_columns]
    widths = [max(len(row[column]) for row in full_rows) for column in range(num_columns)]
    widths[0] = max(len(row[0]) for row in rows)
    lines = []
    for row in rows:
        cells = list(row[1:])
        if len(row) == num_columns:
            cells = [cell.rjust(width) for cell, width in zip(cells, widths[1:], strict=True)]
        lines.append("  ".join([row[0].ljust(widths[0]), *cells]).rstrip() + "\n")
    return "".join(lines)


def _label(metric: str) -> str:
    return _LABELS.get(metric.removeprefix("lp_"), metric_label(metric))


def _percent(value: float | None) -> str:
    return percent(value) or "-"
