"""What benchmarks put out: tables, and files in a folder."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def make_folder(folder: Path) -> None:
    """Make a folder where there is none.

    Raises:
        ValueError: If it cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"cannot make the folder {folder}: {error.strerror}") from None


def write_json(content: dict[str, Any], path: Path) -> None:
    """Write plain types into a file whose folder exists.

    Raises:
        ValueError: If it cannot be written.
    """
    try:
        path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        raise ValueError(f"cannot write {path}: {error.strerror}") from None


def format_table(lines: Sequence[Sequence[str]]) -> str:
    """Return lines of cells in columns, the first to the left and the others to the right."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "".join(
        "  ".join(
            [line[0].ljust(widths[0])]
            + [cell.rjust(width) for cell, width in zip(line[1:], widths[1:], strict=True)]
        ).rstrip()
        + "\n"
        for line in lines
    )
