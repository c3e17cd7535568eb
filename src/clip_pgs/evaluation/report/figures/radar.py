"""The radar over the three axes of the paper's Figure 1."""

from __future__ import annotations

import math
from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure as MatplotlibFigure

from clip_pgs.evaluation.published import Paper
from clip_pgs.evaluation.report.entries import Family, published_entries
from clip_pgs.evaluation.report.figures.canvas import (
    FAINT,
    Figure,
    finish,
    label_of,
    look_of,
    look_of_the_report,
    looks,
)
from clip_pgs.evaluation.report.headlines import AXES, axis_score, group_by_sets, mean_over
from clip_pgs.evaluation.report.tables import RUN, Entry
from clip_pgs.evaluation.wording import percent

_ANGLES = [math.pi / 2 - 2 * math.pi * number / len(AXES) for number in range(len(AXES))]
# The lowest value of an axis stands off the centre, where all directions meet.
_INNER = 0.25

_Sets = tuple[frozenset[str], ...]


def radar_figure(families: Sequence[Family], paper: Paper) -> Figure | None:
    """Draw where models stand on the three axes, None if no model was measured on all of them.

    The paper's methods have a panel of their own where no model was scored on their data sets.

    Args:
        families: The rows.
        paper: The published figures.
    """
    panels = [
        (_title(family, sets), family, sets, entries)
        for family in families
        for sets, entries in group_by_sets(family, AXES).items()
    ]
    if not panels:
        return None
    if not any(family.is_paper for _, family, _, _ in panels):
        panels.append(_published_panel(paper))
    num_columns = min(2, len(panels))
    num_rows = math.ceil(len(panels) / num_columns)
    with look_of_the_report():
        drawing = MatplotlibFigure(
            figsize=(4.7 * num_columns, 4.9 * num_rows), layout="constrained"
        )
        for number, (title, family, sets, entries) in enumerate(panels, start=1):
            axes = drawing.add_subplot(num_rows, num_columns, number)
            _draw(axes, family, sets, entries)
            axes.set_title(title, loc="center")
        meanings = "; ".join(f"{axis.title.lower()}: {axis.meaning}" for axis in AXES)
        names = dict.fromkeys(entry.name for panel in panels for entry in panel[3])
        return finish(
            drawing,
            name="radar",
            alt=f"Radar over {', '.join(axis.title.lower() for axis in AXES)}: {', '.join(names)}.",
            caption="Three axes, each with its own scale, written at its ends, in percent. "
            f"{meanings[0].upper()}{meanings[1:]}. "
            "Panels have different data sets and do not compare.",
        )


def _published_panel(paper: Paper) -> tuple[str, Family, _Sets, list[Entry]]:
    entries = published_entries(paper)
    scores = [axis_score(entries[0], axis) for axis in AXES]
    sets = tuple(frozenset(score.sets) for score in scores if score is not None)
    return "Published, for reference", Family("paper", tuple(entries), {}), sets, entries


def _title(family: Family, sets: _Sets) -> str:
    if not family.is_paper:
        return "Other data sets"
    num_sets = sum(map(len, sets))
    # ImageNet-1K itself is no shifted set.
    num_all = sum(len(family.sets[axis.suite]) for axis in AXES) - 1
    return "The paper's data sets" + (f", {num_sets} of {num_all}" if num_sets < num_all else "")


def _draw(axes: Axes, family: Family, sets: _Sets, entries: Sequence[Entry]) -> None:
    values = [_values(entry, sets) for entry in entries]
    limits = [_limits([row[number] for row in values]) for number in range(len(AXES))]
    axes.set_aspect("equal")
    axes.set_axis_off()
    axes.set_xlim(-1.25, 1.25)
    axes.set_ylim(-0.85, 1.3)
    for ring in (_INNER, (1 + _INNER) / 2, 1.0):
        axes.plot(*_triangle([ring] * 3), color=FAINT, linewidth=0.8)
    for axis, angle, (low, high) in zip(AXES, _ANGLES, limits, strict=True):
        x, y = math.cos(angle), math.sin(angle)
        axes.plot([0, x], [0, y], color=FAINT, linewidth=0.8)
        is_top = y > 0
        axes.annotate(
            f"{axis.title}\n{high:g}" if is_top else f"{high:g}\n{axis.title}",
            (x, y),
            xytext=(0, 6 if is_top else -6),
            textcoords="offset points",
            ha="center",
            va="bottom" if is_top else "top",
        )
        axes.annotate(
            f"{low:g}",
            (_INNER * x, _INNER * y),
            xytext=(5, 4) if is_top else (-5 * x, -10),
            textcoords="offset points",
            ha="left" if is_top else "center",
            fontsize=8,
            color="#555555",
        )
    chosen = looks(family.entries)
    for entry, row in zip(entries, values, strict=True):
        radii = [
            _INNER + (1 - _INNER) * (value - low) / (high - low)
            for value, (low, high) in zip(row, limits, strict=True)
        ]
        axes.plot(
            *_triangle(radii),
            **look_of(entry, chosen).line_options,
            label=f"{label_of(entry)}: {', '.join(f'{value:.1f}' for value in row)}",
            zorder=4 if entry.kind == RUN else 3,
        )
    axes.legend(
        loc="upper center",
        bbox_to_anchor=(0.5, 0.0),
        handlelength=3,
        fontsize=8,
        title=", ".join(axis.title.lower() for axis in AXES),
        title_fontsize=8,
    )


def _triangle(radii: Sequence[float]) -> tuple[list[float], list[float]]:
    """Return the closed line through a point on each axis."""
    points = [(r * math.cos(a), r * math.sin(a)) for r, a in zip(radii, _ANGLES, strict=True)]
    return [x for x, _ in [*points, points[0]]], [y for _, y in [*points, points[0]]]


def _values(entry: Entry, sets: _Sets) -> list[float]:
    means = [mean_over(entry, axis, sorted(names)) for axis, names in zip(AXES, sets, strict=True)]
    return [float(percent(mean)) for mean in means]


def _limits(values: Sequence[float]) -> tuple[float, float]:
    """Return round ends of an axis with some room around the values."""
    spread = max(values) - min(values)
    step = 5 if spread > 10 else 1
    low = max(0, step * math.floor((min(values) - 0.1 * spread) / step))
    high = min(100, step * math.ceil((max(values) + 0.1 * spread) / step))
    return low, max(high, low + step)
