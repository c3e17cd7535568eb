"""One table for every place that shows it, the terminal, Markdown and HTML; and CSV.

What stands in a cell may come from other people's files: names of models, data sets and classes,
reasons of failures. Each form shows such a text as it is, on one line; in none it becomes a
terminal's control sequence, a spreadsheet's formula, or markup.
"""

from __future__ import annotations

import csv
import html
import io
import itertools
import re
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from clip_pgs.common import one_sentence

PLUS_MINUS, BLANK = "\N{PLUS-MINUS SIGN}", "\N{EN DASH}"
PUBLISHED = "published"  # the kind of rows that are set in italics

_ASCII = str.maketrans({PLUS_MINUS: "+-", BLANK: "-"})  # for terminals that have no more
PREFIXES = ("", "k", "M", "G", "T", "P", "E", "Z")
_MARKDOWN = re.compile(r"([\\`*_{}\[\]<>|~#!$&])")
# A spreadsheet computes a cell that begins so; one that parts cells at semicolons or tabs, each.
_FORMULA = r"(?=[\s']*[=+\-@\t\uff0b\uff0d\uff1d\uff20])"
_BEFORE_FORMULA = re.compile(rf"(?:^|(?<=[;\t])){_FORMULA}")
_QUOTED_FORMULA = re.compile(rf"(?:^|(?<=[;\t]))'{_FORMULA}")
_NUMBER = re.compile(r"[+-]?\d+(\.\d*)?(e[+-]?\d+)?", re.IGNORECASE)


@dataclass(frozen=True)
class Cell:
    """One cell.

    Attributes:
        value: A number, a text, or None for nothing.
        text: How people read the value; None shows it as it is.
        note: A small addition, such as a spread.
        is_best: Whether it is the best of its kind in its column.
    """

    value: Any
    text: str | None = None
    note: str = ""
    is_best: bool = False

    @property
    def shown(self) -> str:
        """What people read, without the note."""
        if self.text is None and self.value is None:
            return ""
        return plain(self.value if self.text is None else self.text)


@dataclass(frozen=True)
class Column:
    """One column.

    Attributes:
        label: Its heading.
        group: A heading over several columns, or "".
        is_average: Whether it sums up other columns.
    """

    label: str
    group: str = ""
    is_average: bool = False

    @property
    def heading(self) -> str:
        """Both headings on one line."""
        return plain(f"{self.group} {self.label}")


@dataclass(frozen=True)
class Row:
    """One row.

    Attributes:
        cells: The name of the row, then a cell per further column. In a shorter row the last cell
            spans all columns that are left.
        kind: "published" or another; its class in HTML.
        facts: What must be known to read the row, below its name.
    """

    cells: Sequence[Cell]
    kind: str = ""
    facts: str = ""


@dataclass(frozen=True)
class Table:
    """A table.

    Attributes:
        columns: In order; the first holds the names of the rows.
        rows: In order.
        caption: What the table shows, and in which unit.
        notes: Sentences below it.
        facts_label: Heading of the rows' facts where they have a column of their own.
    """

    columns: Sequence[Column]
    rows: Sequence[Row]
    caption: str = ""
    notes: Sequence[str] = ()
    facts_label: str = "facts"

    @classmethod
    def of(cls, header: Sequence[str], rows: Iterable[Sequence[Any]], **parts: Any) -> Table:
        """Make a table of plain values.

        Args:
            header: The headings.
            rows: Values or cells, one for each heading.
            **parts: The table's other attributes.
        """
        cells = [[v if isinstance(v, Cell) else Cell(v) for v in row] for row in rows]
        return cls([Column(label) for label in header], [Row(row) for row in cells], **parts)

    def is_number(self, place: int) -> bool:
        """Say whether a column is set to the right: it holds numbers and no text."""
        full = [row for row in self.rows if len(row.cells) == len(self.columns)]
        kinds = {type(row.cells[place].value) for row in full} - {type(None)}
        return place > 0 and bool(kinds) and str not in kinds

    def text(self) -> str:
        """Return headings and rows in columns, for a terminal."""
        lines = [[column.heading for column in self.columns]]
        lines += [[_with_note(cell) for cell in row.cells] for row in self.rows]
        places = range(len(self.columns))
        widths = [
            max(len(line[place]) for line in lines if place == 0 or len(line) == len(places))
            for place in places
        ]
        forms = [f"{{:{'>' if self.is_number(place) else '<'}{widths[place]}}}" for place in places]
        text = ""
        for line in lines:
            cells = [form.format(cell) for form, cell in zip(forms, line, strict=False)]
            if len(line) < len(places):
                cells[-1] = line[-1]
            text += "  ".join(cells).rstrip() + "\n"
        return text.translate(_ASCII)

    def markdown(self) -> str:
        """Return caption, table and notes as Markdown."""
        lines = [
            [markdown_text(column.heading) for column in self.columns],
            ["---:" if self.is_number(place) else "---" for place in range(len(self.columns))],
            *(self._markdown_cells(row) for row in self.rows),
        ]
        if any(row.facts for row in self.rows):
            facts = [markdown_text(row.facts) for row in self.rows]
            column = [self.facts_label, "---", *facts]
            for line, text in zip(lines, column, strict=True):
                line.insert(1, text)
        caption = [f"*{markdown_text(self.caption)}*"] if self.caption else []
        table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
        return "\n\n".join([*caption, table, *map(markdown_text, self.notes)]) + "\n"

    def html(self) -> str:
        """Return caption, table and notes as HTML, in a region that can be scrolled."""
        kinds = ["number" if self.is_number(n) else "text" for n in range(len(self.columns))]
        groups = itertools.groupby(column.group for column in self.columns[1:])
        runs = [(group, len(list(run))) for group, run in groups]
        return _html_template().render(table=self, kinds=kinds, groups=runs)

    def _markdown_cells(self, row: Row) -> list[str]:
        cells = [
            f"{mark}{markdown_text(cell.shown)}{mark} {markdown_text(cell.note)}".strip()
            for cell in row.cells
            for mark in ["**" if cell.is_best else ""]
        ]
        if row.kind == PUBLISHED:
            cells[0] = f"*{cells[0]}*"
        return cells + [""] * (len(self.columns) - len(cells))


@cache
def _html_template() -> Any:
    import jinja2

    environment = jinja2.Environment(autoescape=True, keep_trailing_newline=True)
    environment.filters["plain"] = plain
    text = Path(__file__).with_name("table.html.jinja").read_text("utf-8")
    return environment.from_string(text)


def plain(value: object) -> str:
    """Return a text on one line that a terminal can show; see `one_sentence`."""
    text = " ".join(str(value).split())
    return one_sentence(text) if text else ""


def markdown_text(text: str) -> str:
    """Return a text that Markdown shows as it is, on one line."""
    return _MARKDOWN.sub(r"\\\1", plain(text))


def html_text(text: str) -> str:
    """Return a text that HTML shows as it is, on one line."""
    return html.escape(plain(text))


def csv_text(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """Return a table as CSV.

    No spreadsheet computes a text of it: one that begins like a formula gets an apostrophe before
    it, which `read_csv` takes away again. Characters that cannot be printed are escaped.

    Args:
        header: The headings.
        rows: Numbers, texts and None.
    """
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerows(map(_csv_cell, row) for row in (header, *rows))
    return stream.getvalue()


def read_csv(lines: Iterable[str]) -> list[dict[str, str]]:
    """Read what `csv_text` returned: each row's texts by their headings.

    Raises:
        ValueError: If it is no CSV, has a heading twice, or a row that is not as long as they are.
    """
    try:
        table = [[_QUOTED_FORMULA.sub("", cell) for cell in row] for row in csv.reader(lines)]
    except csv.Error as error:
        raise ValueError(str(error)) from error
    for number, row in enumerate(table):
        if row and len(row) != len(table[0]):
            raise ValueError(f"row {number} has {len(row)} cells below {len(table[0])} headings")
    twice = [heading for heading in table[0] if table[0].count(heading) > 1] if table else []
    if twice:
        raise ValueError(f"it has the column {twice[0]!r} twice")
    return [dict(zip(table[0], row, strict=True)) for row in table[1:] if row]


def percent(value: float | None) -> str:
    """Return a share in [0, 1] as percent with one decimal; "" for None."""
    # Halves go up: the mean of cells such as 30.95 is not to depend on its last bit.
    return "" if value is None else f"{100 * value + 1e-9:.1f}"


def scaled(value: float | None, unit: str = "") -> str:
    """Return a number with three digits and a prefix, such as "10.8 T"; "" for None."""
    if value is None:
        return ""
    power = 0
    while abs(value) >= 999.5 and power < len(PREFIXES) - 1:
        value, power = value / 1000, power + 1
    digits = f"{value:.3g}" if power else f"{value:g}"
    return f"{digits} {PREFIXES[power]}{unit}".strip()


def duration(seconds: float | None) -> str:
    """Return a time span in its two largest units, such as "11 min 21 s"; "" for None."""
    if seconds is None:
        return ""
    rest = round(seconds)
    parts: list[str] = []
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60), ("s", 1)):
        count, rest = divmod(rest, size)
        if count or (unit == "s" and not parts):
            parts.append(f"{count} {unit}")
    return " ".join(parts[:2])


def counted(number: int, noun: str) -> str:
    """Return a number with its noun, such as "1 seed" or "2 seeds"."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def _with_note(cell: Cell) -> str:
    return plain(f"{cell.shown} {cell.note}")


def _csv_cell(value: Any) -> Any:
    if not isinstance(value, str) or _NUMBER.fullmatch(value):
        return int(value) if isinstance(value, bool) else value
    text = "".join(
        c
        if c.isprintable() or c == "\t" or unicodedata.category(c) == "Zs"
        else c.encode("unicode_escape").decode()
        for c in value
    )
    return _BEFORE_FORMULA.sub("'", text)
