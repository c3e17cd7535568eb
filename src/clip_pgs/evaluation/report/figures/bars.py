"""Grouped bars: a group per data set or average, a bar per model."""

from __future__ import annotations

import math
from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure as MatplotlibFigure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.patheffects import withStroke

from clip_pgs.evaluation.report.entries import Family
from clip_pgs.evaluation.report.figures.canvas import (
    INK,
    Figure,
    Look,
    finish,
    label_of,
    look_of,
    look_of_the_report,
    looks,
    quiet_axis,
)
from clip_pgs.evaluation.report.scores import Place
from clip_pgs.evaluation.report.suite_table import is_partial, num_members, suite_places
from clip_pgs.evaluation.report.tables import CHANCE, Entry
from clip_pgs.evaluation.wording import (
    MAIN_METRICS,
    SUITE_UNITS,
    average_label,
    metric_label,
    percent,
    set_label,
    suite_title,
)

_MAX_GROUPS = 6
_MAX_BARS_WITH_NUMBERS = 26
_GROUP_WIDTH, _MAX_BAR_WIDTH = 0.84, 0.36


def suite_figure(suite: str, family: Family) -> Figure:
    """Draw the results of a suite.

    Args:
        suite: Its name.
        family: The rows; those that the suite has no score of are left out.
    """
    entries = [e for e in family.entries if any(place.suite == suite for place in e.scores)]
    places = suite_places(suite, entries, order=family.sets.get(suite, []))
    rows = _rows(suite, places)
    chosen = looks(family.entries)
    top = max(_height(e, place) for e in entries for place in places if place in e.scores)
    with look_of_the_report():
        drawing = MatplotlibFigure(figsize=(9.2, 2.15 * len(rows) + 0.5), layout="constrained")
        all_axes = drawing.subplots(len(rows), 1, squeeze=False)[:, 0]
        for axes, row in zip(all_axes, rows, strict=True):
            _draw_row(axes, row, entries, chosen, num_slots=max(map(len, rows)))
            axes.set_ylim(0, min(104.0, 10 * math.ceil(10.5 * top)))
            axes.set_ylabel("percent")
        drawing.legend(
            handles=[_legend_mark(entry, look_of(entry, chosen)) for entry in entries],
            loc="outside upper left",
            ncols=4,
            handlelength=1.6,
            columnspacing=1.4,
        )
        is_any_partial = any(
            is_partial(entry.scores[place], num_members(place, entries))
            for place in places
            for entry in entries
            if place in entry.scores
        )
        left_out = " Averages that leave data sets out are not drawn." if is_any_partial else ""
        kind = "the paper's data sets" if family.is_paper else "other data sets"
        return finish(
            drawing,
            name=f"{suite}_{family.name}",
            alt=f"Bars: {suite_title(suite)} on {kind}; the table above holds the same numbers.",
            caption=f"{suite_title(suite)}, {SUITE_UNITS[suite]}, on {kind}.{left_out}",
        )


def _rows(suite: str, places: Sequence[Place]) -> list[list[Place]]:
    """Part the groups into rows: a row per data set, or rows of even length."""
    if len(MAIN_METRICS[suite]) > 1:
        names = dict.fromkeys(place.name for place in places)
        return [[place for place in places if place.name == name] for name in names]
    num_rows = math.ceil(len(places) / _MAX_GROUPS)
    length = math.ceil(len(places) / num_rows)
    return [list(places[start : start + length]) for start in range(0, len(places), length)]


def _draw_row(
    axes: Axes,
    row: Sequence[Place],
    entries: Sequence[Entry],
    chosen: dict[str, Look],
    *,
    num_slots: int,
) -> None:
    quiet_axis(axes)
    bars = [entry for entry in entries if entry.kind != CHANCE]
    width = min(_GROUP_WIDTH / len(bars), _MAX_BAR_WIDTH)
    has_numbers = len(bars) * len(row) <= _MAX_BARS_WITH_NUMBERS
    for group, place in enumerate(row):
        members = num_members(place, entries)
        for number, entry in enumerate(bars):
            score = entry.scores.get(place)
            if score is None or is_partial(score, members):
                continue
            x = group + (number - (len(bars) - 1) / 2) * width
            look = look_of(entry, chosen)
            axes.bar(
                x,
                100 * score.mean,
                0.94 * width,
                color=look.fill,
                hatch=look.hatch,
                edgecolor=INK,
                linewidth=0.5,
                yerr=None if score.spread is None else 100 * score.spread,
                error_kw={"elinewidth": 0.8, "capsize": 2, "ecolor": INK},
            )
            if has_numbers:
                axes.annotate(
                    percent(score.mean),
                    (x, 100 * _height(entry, place)),
                    xytext=(0, 2),
                    textcoords="offset points",
                    ha="center",
                    fontsize=7.5,
                    path_effects=[withStroke(linewidth=2, foreground="white")],
                    zorder=5,
                )
        for entry in entries:
            if entry.kind == CHANCE and place in entry.scores:
                level = 100 * entry.scores[place].mean
                ends = [group - 0.46, group + 0.46]
                # A white ground lets the dots stand out from a dark bar.
                axes.plot(ends, [level, level], "-", color="white", lw=2.0)
                axes.plot(ends, [level, level], ":", color=INK, lw=1.2)
    axes.set_xticks(range(len(row)), [_group_label(place) for place in row])
    axes.set_xlim(-0.6, num_slots - 0.4)
    if len(MAIN_METRICS[row[0].suite]) > 1:
        axes.set_title(_name(row[0]))


def _height(entry: Entry, place: Place) -> float:
    """Return where a bar ends, its spread included."""
    score = entry.scores[place]
    return score.mean + (score.spread or 0.0)


def _name(place: Place) -> str:
    return average_label(place.name) if place.is_average else set_label(place.name)


def _group_label(place: Place) -> str:
    if len(MAIN_METRICS[place.suite]) > 1:
        return metric_label(place.metric)
    return _name(place).replace(", ", ",\n")


def _legend_mark(entry: Entry, look: Look) -> Patch | Line2D:
    if entry.kind == CHANCE:
        return Line2D([], [], color=INK, linestyle=":", linewidth=1.2, label="chance")
    return Patch(
        facecolor=look.fill, hatch=look.hatch, edgecolor=INK, linewidth=0.5, label=label_of(entry)
    )
