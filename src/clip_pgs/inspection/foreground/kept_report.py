"""The share of the foreground that is kept, as a table and as files."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from clip_pgs.common import write_text
from clip_pgs.inspection.foreground.kept import Kept

FILE_NAMES = ("kept.json", "kept.csv", "kept.png")


def kept_table(rows: Sequence[Kept]) -> str:
    """Return a table with a line per strategy and a column per mask ratio.

    Where a strategy drops another share than asked for, the measured ratio stands in brackets.
    """
    ratios = list(dict.fromkeys(row.mask_ratio for row in rows))
    titles = list(dict.fromkeys(row.masking for row in rows))
    cells = {(row.masking, row.mask_ratio): _cell(row) for row in rows}
    lines = [["mask ratio", *map(str, ratios)]]
    lines += [[title, *(cells[title, ratio] for ratio in ratios)] for title in titles]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "".join(
        "  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)).rstrip()
        + "\n"
        for line in lines
    )


def write_kept(rows: Sequence[Kept], facts: dict[str, Any], folder: Path) -> None:
    """Write `kept.json` (facts and rows) and `kept.csv` (rows).

    Args:
        rows: What was measured.
        facts: How it was measured, as plain types.
        folder: It exists.
    """
    results = [asdict(row) for row in rows]
    write_text(folder / "kept.json", json.dumps({**facts, "results": results}, indent=2) + "\n")
    table = io.StringIO()
    writer = csv.DictWriter(table, [field.name for field in fields(Kept)], lineterminator="\n")
    writer.writeheader()
    writer.writerows(results)
    write_text(folder / "kept.csv", table.getvalue())


def _cell(row: Kept) -> str:
    text = f"{row.kept:.3f} +- {row.spread:.3f}"
    # One patch of 49 is 0.02: a ratio is met by rounding down to whole patches.
    if abs(row.measured_ratio - row.mask_ratio) > 0.02:
        text += f" (drops {row.measured_ratio:.2f})"
    return text
