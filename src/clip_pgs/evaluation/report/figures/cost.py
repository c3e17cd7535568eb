"""Accuracy against what training cost, from each run's own logs."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure as MatplotlibFigure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from clip_pgs.evaluation.report.entries import Family
from clip_pgs.evaluation.report.figures.canvas import (
    INK,
    Figure,
    Look,
    finish,
    look_of,
    look_of_the_report,
    looks,
    quiet_axis,
)
from clip_pgs.evaluation.report.headlines import (
    AXES,
    Axis,
    axis_score,
    group_by_sets,
    mean_over,
)
from clip_pgs.evaluation.report.models import Model
from clip_pgs.evaluation.report.tables import CHANCE, RUN, Entry
from clip_pgs.evaluation.wording import set_label

_MAX_NAMES = 5
_COSTS: tuple[tuple[str, Callable[[Model], float | None], dict[str, float]], ...] = (
    (
        "training compute",
        lambda model: model.flops,
        {"FLOP": 1, "GFLOP": 1e9, "TFLOP": 1e12, "PFLOP": 1e15, "EFLOP": 1e18, "ZFLOP": 1e21},
    ),
    (
        "wall time of training",
        lambda model: model.seconds,
        {"seconds": 1, "minutes": 60, "hours": 3600, "days": 86400},
    ),
)


def cost_figure(models: Sequence[Model], families: Sequence[Family]) -> Figure | None:
    """Draw accuracy against compute and time, None if no run says what it cost.

    Args:
        models: With what they cost.
        families: Their scores; each family is a row of panels.
    """
    rows = [
        (family, axis, sets, entries)
        for family in families
        if (axis := _axis(models, family)) is not None
        for (sets,), entries in group_by_sets(family, [axis]).items()
        if any(model.flops is not None and family.entry(model.name) in entries for model in models)
    ]
    if not rows:
        return None
    with look_of_the_report():
        drawing = MatplotlibFigure(figsize=(9.2, 2.9 * len(rows)), layout="constrained")
        all_axes = drawing.subplots(len(rows), len(_COSTS), squeeze=False)
        for row_axes, (family, axis, sets, entries) in zip(all_axes, rows, strict=True):
            for axes, (label, cost, units) in zip(row_axes, _COSTS, strict=True):
                priced = [
                    (entry, price)
                    for entry in entries
                    for model in models
                    if entry.kind == RUN
                    if model.name == entry.name and (price := cost(model)) is not None
                ]
                chance = [e for e in entries if e.kind == CHANCE]
                level = mean_over(chance[0], axis, sorted(sets)) if chance else None
                unit = _draw(axes, priced, looks(family.entries), axis, units=units, chance=level)
                axes.set_xlabel(f"{label}, {unit}")
            row_axes[0].set_ylabel(f"{axis.title.lower()}, percent")
            row_axes[0].set_title(_title(family, sets))
            handles, labels = row_axes[0].get_legend_handles_labels()
            row_axes[-1].legend(
                handles, labels, loc="center left", bbox_to_anchor=(1.02, 0.5), handlelength=1.4
            )
        shown = {axis.title: axis.meaning for _, axis, _, _ in rows}
        meanings = "; ".join(f"{title.lower()}: {meaning}" for title, meaning in shown.items())
        return finish(
            drawing,
            name="cost",
            alt="Points: accuracy against the compute and the time of training, a point per model.",
            caption=f"Accuracy against cost, measured by each run itself; {meanings}. Bars are the "
            "standard deviation over seeds.",
        )


def _title(family: Family, sets: frozenset[str]) -> str:
    if family.is_paper:
        return f"{len(sets)} of the paper's data sets"
    if len(sets) <= _MAX_NAMES:
        return ", ".join(sorted(map(set_label, sets)))
    return f"{len(sets)} other data sets"


def _axis(models: Sequence[Model], family: Family) -> Axis | None:
    """Return the first axis on which a model with a known cost was measured."""
    priced = [family.entry(model.name) for model in models if model.flops is not None]
    for axis in AXES:
        if any(entry is not None and axis_score(entry, axis) is not None for entry in priced):
            return axis
    return None


def _draw(
    axes: Axes,
    points: Sequence[tuple[Entry, float]],
    chosen: dict[str, Look],
    axis: Axis,
    *,
    units: dict[str, float],
    chance: float | None,
) -> str:
    """Draw a panel and return the unit of its x axis."""
    quiet_axis(axes)
    lowest = min((price for _, price in points), default=0.0)
    highest = max((price for _, price in points), default=0.0)
    unit = [name for name, size in units.items() if size == 1 or size <= highest][-1]
    top = 0.0
    for entry, price in points:
        score = axis_score(entry, axis)
        if score is None:
            continue
        look = look_of(entry, chosen)
        place = (price / units[unit], 100 * score.mean)
        if score.spread is not None:
            axes.errorbar(*place, yerr=100 * score.spread, color=INK, elinewidth=0.8, capsize=6)
        axes.plot(
            *place,
            look.marker,
            color=look.fill,
            markeredgecolor=INK,
            markeredgewidth=0.6,
            markersize=8,
            label=entry.name,
        )
        top = max(top, 100 * (score.mean + (score.spread or 0)))
    if chance is not None:
        axes.axhline(100 * chance, color=INK, linestyle=":", linewidth=1.2, label="chance")
    axes.set_ylim(0, 1.15 * top)
    if highest > 5 * lowest:
        axes.set_xscale("log")
        axes.set_xlim(0.6 * lowest / units[unit], 1.7 * highest / units[unit])
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5), numticks=8))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
    else:
        axes.set_xlim(0, 1.2 * highest / units[unit])
    return unit
