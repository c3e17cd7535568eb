"""Results as a table for the terminal, in percent."""

from __future__ import annotations

from collections.abc import Sequence

from clip_pgs.evaluation.results import DONE, Result, ordered_metrics

_LABELS = {
    "mean_per_class_recall": "recall",
    "mean_average_precision": "mAP",
    **{f"text_retrieval_recall@{k}": f"text R@{k}" for k in (1, 5, 10)},
    **{f"image_retrieval_recall@{k}": f"image R@{k}" for k in (1, 5, 10)},
}


def format_table(results: Sequence[Result]) -> str:
    """Render the results of one model, a block of lines per suite.

    Args:
        results: Results in the order to show them.

    Returns:
        Text that ends in a newline. Metrics are in percent; an average stands below the sets of
        a suite, over those that were done.
    """
    suites = list(dict.fromkeys(result.suite for result in results))
    blocks = [_suite_table([r for r in results if r.suite == suite]) for suite in suites]
    return "\n".join(blocks)


def _suite_table(results: Sequence[Result]) -> str:
    done = [result for result in results if result.status == DONE]
    metrics = ordered_metrics(done)
    header = [results[0].suite]
    if done:
        header += [*(_LABELS.get(name, name) for name in metrics), "samples"]
    rows = [
        [result.dataset, *(_percent(result.metrics.get(name)) for name in metrics), result.samples]
        if result.status == DONE
        else [result.dataset, f"{result.status}: {result.error}"]
        for result in results
    ]
    if len(results) > 1 and done:
        means = [_mean([result.metrics.get(name) for result in done]) for name in metrics]
        share = f" of {len(results)}" if len(done) < len(results) else ""
        rows.append([f"average ({len(done)}{share})", *(_percent(mean) for mean in means), ""])
    return _aligned([header, *([str(cell) for cell in row] for row in rows)])


def _aligned(rows: Sequence[Sequence[str]]) -> str:
    """Align full rows in columns; a short row is a name and a remark that spans them."""
    num_columns = len(rows[0])
    full_rows = [row for row in rows if len(row) == num_columns]
    widths = [max(len(row[column]) for row in full_rows) for column in range(num_columns)]
    widths[0] = max(len(row[0]) for row in rows)
    lines = []
    for row in rows:
        cells = row[1:]
        if len(row) == num_columns:
            cells = [cell.rjust(width) for cell, width in zip(cells, widths[1:], strict=True)]
        lines.append("  ".join([row[0].ljust(widths[0]), *cells]).rstrip() + "\n")
    return "".join(lines)


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f}"


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None
