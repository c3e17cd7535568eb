"""Tables as data: what stands where, before Markdown or HTML gives them a form."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from clip_pgs.evaluation.report.scores import Place, Score

PUBLISHED, RUN, CHANCE = "published", "run", "chance"


@dataclass(frozen=True)
class Cell:
    """One cell.

    Attributes:
        text: What it says.
        note: A small addition, such as a spread.
        is_best: Whether it is the best of its kind in its column.
        is_number: Whether it is set as a number, to the right.
    """

    text: str
    note: str = ""
    is_best: bool = False
    is_number: bool = True


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


@dataclass(frozen=True)
class Row:
    """One row.

    Attributes:
        name: Its heading.
        cells: One per column.
        facts: What must be known to read it, below the name.
        more: What else is worth knowing there, where there is room.
        kind: "published", "run" or "chance".
    """

    name: str
    cells: Sequence[Cell]
    facts: str = ""
    more: str = ""
    kind: str = RUN


@dataclass(frozen=True)
class Table:
    """A table.

    Attributes:
        caption: What it shows, and in which unit.
        corner: The heading of the row headings.
        columns: Without the row headings.
        rows: In order.
        notes: Sentences below it.
    """

    caption: str
    columns: Sequence[Column]
    rows: Sequence[Row]
    corner: str = "model"
    notes: Sequence[str] = field(default_factory=list)

    def is_number(self, column: int) -> bool:
        """Say whether a column holds nothing but numbers."""
        return all(row.cells[column].is_number for row in self.rows)

    @property
    def groups(self) -> list[tuple[str, int]]:
        """The headings over the columns with how many columns each spans; [] without any."""
        spans: list[tuple[str, int]] = []
        for column in self.columns:
            if spans and column.group and spans[-1][0] == column.group:
                spans[-1] = (column.group, spans[-1][1] + 1)
            else:
                spans.append((column.group, 1))
        return spans if any(group for group, _ in spans) else []


@dataclass(frozen=True)
class Entry:
    """A model in the tables and figures of a suite.

    Attributes:
        name: Of the model.
        kind: "published", "run" or "chance".
        scores: Of the model, by place.
        facts: What must be known to read its numbers.
        more: What else is worth knowing.
        printed: Averages as a paper prints them, by suite and name.
        ties: Ties and items of each suite that counts ties.
        num_runs: Seeds.
    """

    name: str
    kind: str
    scores: dict[Place, Score]
    facts: str = ""
    more: str = ""
    printed: dict[tuple[str, str], float] = field(default_factory=dict)
    ties: dict[str, tuple[float, float]] = field(default_factory=dict)
    num_runs: int = 1
