"""The cost of each setup as a table, and as plain types."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from clip_pgs.inspection.cost.output import format_table
from clip_pgs.inspection.cost.rows import Row

_HEADINGS = (
    "",
    "tokens",
    "selection",
    "share",
    "forward",
    "backward",
    "update",
    "step",
    "samples/s",
    "GiB",
    "GFLOPs",
    "time",
    "FLOPs",
    "ideal",
    "peak",
)

_COMPILED_HEADINGS = ("breaks", "recompiled")

LEGEND = (
    "tokens: read by the text tower per caption; share: of the step that selection takes; times in "
    "ms; GFLOPs: per sample;\n"
    "time, FLOPs: over the first line's; ideal: time over FLOPs; peak: share of the device's "
)


COMPILED_LEGEND = (
    "breaks: of the graph; recompiled: graphs added by captions of other lengths, after three"
)


def cost_table(rows: Sequence[Row], *, batch_size: int) -> str:
    """Return a table with a line per setup; compiled models have two more columns."""
    is_compiled = any(row.graph_breaks is not None for row in rows)
    headings = (*_HEADINGS, *_COMPILED_HEADINGS) if is_compiled else _HEADINGS
    lines = [
        _cells(row, batch_size)
        + ([str(row.graph_breaks), str(row.recompilations)] if is_compiled else [])
        for row in rows
    ]
    return format_table([headings, *lines])


def cost_content(rows: Sequence[Row], facts: dict[str, Any]) -> dict[str, Any]:
    """Return what `cost.json` holds: how it was measured, and the rows."""
    return {**facts, "results": [asdict(row) for row in rows]}


def _cells(row: Row, batch_size: int) -> list[str]:
    has_selection = row.selection > 0
    return [
        row.title,
        f"{row.text_tokens:.1f}",
        f"{1000 * row.selection:.2f}" if has_selection else "-",
        f"{100 * row.selection_share:.2f} %" if has_selection else "-",
        f"{1000 * row.forward:.1f}",
        f"{1000 * row.backward:.1f}",
        f"{1000 * row.update:.1f}",
        f"{1000 * row.step:.1f}",
        f"{row.samples_per_second:.1f}",
        "-" if row.peak_gib is None else f"{row.peak_gib:.2f}",
        f"{row.flops / batch_size / 1e9:.2f}",
        f"{row.time_over_first:.3f}",
        f"{row.flops_over_first:.3f}",
        f"{row.time_over_ideal:.3f}",
        "-" if row.utilisation is None else f"{100 * row.utilisation:.0f} %",
    ]
