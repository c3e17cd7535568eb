"""The table of a suite: published rows, then runs, then chance; data sets, then averages."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from clip_pgs.evaluation.report.scores import Place, Score
from clip_pgs.evaluation.report.tables import PUBLISHED, RUN, Cell, Column, Entry, Row, Table
from clip_pgs.evaluation.wording import (
    BLANK,
    MAIN_METRICS,
    PLUS_MINUS,
    average_label,
    metric_label,
    percent,
    set_label,
    spread_text,
)

# What the rounding of cells and average explains between them, 0.1 points.
_ROUNDING = 0.001 + 1e-9


def suite_places(suite: str, entries: Iterable[Entry], *, order: Sequence[str]) -> list[Place]:
    """Return the places that the table of a suite shows: data sets, then averages.

    Args:
        suite: Its name.
        entries: The models; a place is shown if one of them has it.
        order: Names of data sets to start with; others follow as they come.
    """
    metrics = MAIN_METRICS.get(suite, ())
    known = [place for entry in entries for place in entry.scores if place.suite == suite]
    sets = dict.fromkeys([*order, *(place.name for place in known if not place.is_average)])
    means = dict.fromkeys(place.name for place in known if place.is_average)
    wanted = [Place(suite, name, metric) for name in sets for metric in metrics]
    wanted += [Place(suite, name, metric, True) for name in means for metric in metrics]
    existing = set(known)
    # The average of a single set would repeat it.
    return [place for place in wanted if place in existing and (len(sets) > 1 or not place[3])]


def suite_table(
    suite: str, entries: Sequence[Entry], *, caption: str, order: Sequence[str] = ()
) -> Table:
    """Make the table of a suite: published rows, then runs, then chance.

    Args:
        suite: Its name.
        entries: The models, in order.
        caption: What the table is about.
        order: Names of data sets to start with.
    """
    entries = [e for e in entries if any(place.suite == suite for place in e.scores)]
    places = suite_places(suite, entries, order=order)
    bests = {
        (place, kind): max(values)
        for place in places
        for kind in (PUBLISHED, RUN)
        if len(values := _rounded(place, kind, entries)) > 1
    }
    columns: list[Column] = []
    cells: list[list[Cell]] = [[] for _ in entries]
    for place in places:
        columns.append(_column(place))
        members = num_members(place, entries)
        for entry, row in zip(entries, cells, strict=True):
            row.append(_cell(entry, place, bests.get((place, entry.kind)), members))
        if place.is_average and any((suite, place.name) in entry.printed for entry in entries):
            columns.append(Column("as printed", group=columns[-1].group))
            for entry, row in zip(entries, cells, strict=True):
                row.append(Cell(percent(entry.printed.get((suite, place.name))) or BLANK))
    if any(suite in entry.ties for entry in entries):
        columns.append(Column("ties"))
        for entry, row in zip(entries, cells, strict=True):
            row.append(_ties(entry, suite))
    rows = [
        Row(entry.name, row, facts=entry.facts, more=entry.more, kind=entry.kind)
        for entry, row in zip(entries, cells, strict=True)
    ]
    return Table(caption, columns, rows, notes=_notes(suite, entries, places))


def num_members(place: Place, entries: Iterable[Entry]) -> int:
    """Return how many data sets belong to an average, in the row that has the most; else 1."""
    return max(entry.scores[place].num_members for entry in entries if place in entry.scores)


def is_partial(score: Score, members: int) -> bool:
    """Say whether a score is an average that leaves sets out, and so compares with no other."""
    return len(score.sets) < members


def _rounded(place: Place, kind: str, entries: Sequence[Entry]) -> list[float]:
    """Return the numbers of a column as they are printed, so that equal ones tie."""
    members = num_members(place, entries)
    scores = [e.scores[place] for e in entries if e.kind == kind and place in e.scores]
    return [float(percent(score.mean)) for score in scores if not is_partial(score, members)]


def _column(place: Place) -> Column:
    is_single = len(MAIN_METRICS.get(place.suite, ())) == 1
    name = average_label(place.name) if place.is_average else set_label(place.name)
    if is_single:
        return Column(name, is_average=place.is_average)
    return Column(metric_label(place.metric), group=name, is_average=place.is_average)


def _cell(entry: Entry, place: Place, best: float | None, members: int) -> Cell:
    score = entry.scores.get(place)
    if score is None:
        return Cell(BLANK)
    notes = []
    if score.spread is not None:
        notes.append(spread_text(score.spread))
    if score.num_runs < entry.num_runs:
        notes.append(f"({score.num_runs} of {entry.num_runs} seeds)")
    if is_partial(score, members):
        notes.append(f"({len(score.sets)} of {members} sets)")
    text = percent(score.mean)
    is_best = float(text) == best and not is_partial(score, members)
    return Cell(text, note=" ".join(notes), is_best=is_best)


def _ties(entry: Entry, suite: str) -> Cell:
    if suite not in entry.ties:
        return Cell(BLANK)
    ties, items = entry.ties[suite]
    return Cell(f"{ties:.0f}", note=f"of {items:,.0f}")


def _notes(suite: str, entries: Sequence[Entry], places: Sequence[Place]) -> list[str]:
    notes = []
    if any(
        entry.scores[place].spread is not None
        for entry in entries
        for place in places
        if place in entry.scores
    ):
        notes.append(f"{PLUS_MINUS} is the standard deviation over seeds.")
    rivals = {PUBLISHED: "the best published row", RUN: "the best run"}
    best = [
        words for kind, words in rivals.items() if sum(entry.kind == kind for entry in entries) > 1
    ]
    if best:
        notes.append(f"Bold is {' and '.join(best)}.")
    if any(suite in entry.ties for entry in entries):
        notes.append("A tie between the two captions counts as wrong.")
    differing = [
        f"{entry.name}, {average_label(name)}: printed {percent(printed)}, from its cells "
        f"{percent(score.mean)}"
        for entry in entries
        for (of_suite, name), printed in entry.printed.items()
        for place, score in entry.scores.items()
        if of_suite == suite == place.suite and place.is_average and place.name == name
        if abs(printed - score.mean) > _ROUNDING
    ]
    if differing:
        notes.append(
            "Averages are taken from the cells; these differ from what the paper prints: "
            f"{'; '.join(differing)}."
        )
    return notes
