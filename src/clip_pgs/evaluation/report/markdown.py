"""The report as Markdown."""

from __future__ import annotations

import re

from clip_pgs.evaluation.report.content import Report
from clip_pgs.evaluation.report.tables import PUBLISHED, Cell, Column, Row, Table
from clip_pgs.evaluation.report.templates import environment

_SPECIAL = re.compile(r"([\\`*_{}\[\]<>|~])")


def write_markdown(report: Report) -> str:
    """Return a report as Markdown; its figures are files in `figures/`."""
    templates = environment(autoescape=False)
    templates.filters.update(md=escape, table=format_table)
    text = templates.get_template("report.md.jinja").render(report=report)
    return re.sub(r"\n{3,}", "\n\n", text).rstrip() + "\n"


def escape(text: str) -> str:
    """Return text that Markdown shows as it is, on one line."""
    return _SPECIAL.sub(r"\\\1", " ".join(str(text).split()))


def format_table(table: Table) -> str:
    """Return a table with its caption and notes."""
    has_facts = any(row.facts or row.more for row in table.rows)
    headings = [table.corner, *(["trained on"] if has_facts else [])]
    headings += [_heading(column) for column in table.columns]
    rules = ["---"] * (1 + has_facts)
    rules += ["---:" if table.is_number(number) else "---" for number in range(len(table.columns))]
    lines = [_line([escape(heading) for heading in headings]), _line(rules)]
    lines += [_line(_row(row, has_facts=has_facts)) for row in table.rows]
    parts = [f"*{escape(table.caption)}*", "\n".join(lines), *map(escape, table.notes)]
    return "\n\n".join(parts) + "\n"


def _heading(column: Column) -> str:
    return f"{column.group} {column.label}".strip()


def _row(row: Row, *, has_facts: bool) -> list[str]:
    name = escape(row.name)
    facts = [escape(", ".join(part for part in (row.facts, row.more) if part))]
    return [
        f"*{name}*" if row.kind == PUBLISHED else name,
        *(facts if has_facts else []),
        *map(_cell, row.cells),
    ]


def _cell(cell: Cell) -> str:
    text = f"**{escape(cell.text)}**" if cell.is_best else escape(cell.text)
    return f"{text} {escape(cell.note)}" if cell.note else text


def _line(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"
