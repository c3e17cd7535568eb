"""The report's figures: bars per suite, a radar over three axes, accuracy by cost and by epoch.

A model looks the same in all of them. Runs have colors, and published rows shades of gray.
"""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure as Drawing
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.patheffects import withStroke
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

from clip_pgs.evaluation.report.gather import Model, Run
from clip_pgs.evaluation.report.published import Paper
from clip_pgs.evaluation.report.results_table import (
    is_partial,
    metric_label,
    num_members,
    set_label,
    suite_places,
)
from clip_pgs.evaluation.report.scores import (
    AXES,
    CHANCE,
    PAPER_SETS,
    RUN,
    Axis,
    Entry,
    Family,
    Place,
    group_by_sets,
    ordered_suites,
    published_entries,
    suite_of,
)
from clip_pgs.evaluation.results import DONE, ordered_metrics
from clip_pgs.plots import (
    COLORS,
    FAINT,
    GRAYS,
    HATCHES,
    INK,
    LINES,
    MARKERS,
    legend_label,
    picture,
    plot_style,
    quiet_axis,
)
from clip_pgs.tables import PUBLISHED, percent, plain

# Stands in every figure file, so that a later report knows it from the files of others and from
# a copy under another name; the first bytes of a file hold it.
_MARK, _MARK_PLACE = "clip-pgs evaluation report ({name})", 4096
_MAX_BARS_WITH_NUMBERS, _MAX_GROUPS, _MAX_NAMES = 26, 6, 5
_MAX_NAME = 60  # letters of a name
_GROUP_WIDTH, _MAX_BAR_WIDTH = 0.84, 0.36
_ANGLES = [math.pi / 2 - 2 * math.pi * number / len(AXES) for number in range(len(AXES))]
# The lowest value of a radar's axis stands off the center, where all directions meet.
_INNER = 0.25
# What training cost: a fact, its name, and units of it.
_COSTS: tuple[tuple[str, str, dict[str, float]], ...] = (
    (
        "flops",
        "training compute",
        {"FLOP": 1, "GFLOP": 1e9, "TFLOP": 1e12, "PFLOP": 1e15, "EFLOP": 1e18, "ZFLOP": 1e21},
    ),
    (
        "seconds",
        "wall time of training",
        {"seconds": 1, "minutes": 60, "hours": 3600, "days": 86400},
    ),
)


@dataclass(frozen=True)
class Figure:
    """A figure in both its forms.

    Attributes:
        name: Of its files, without ending.
        alt: What it shows, for those who do not see it.
        caption: How to read it.
        svg: As SVG.
        png: As PNG.
    """

    name: str
    alt: str
    caption: str
    svg: bytes
    png: bytes


@dataclass(frozen=True)
class Panel:
    """How scores of a suite grew over training.

    Attributes:
        suite: Its name.
        metric: What grew.
        sets: The data sets that every curve is the mean over.
        num_members: How many data sets any epoch of a run has.
        curves: By model, then by completed epochs: means over its runs, where all were scored.
    """

    suite: str
    metric: str
    sets: tuple[str, ...]
    num_members: int
    curves: dict[str, dict[int, float]]


def is_own_figure(path: Path) -> bool:
    """Say whether a file is a figure that a report drew, now or earlier."""
    if path.suffix not in (".svg", ".png") or not path.is_file() or path.is_symlink():
        return False
    with path.open("rb") as file:
        return _MARK.format(name=path.stem).encode() in file.read(_MARK_PLACE)


def suite_figure(suite: str, family: Family) -> Figure:
    """Draw the results of a suite as bars: a group per data set or average, a bar per model.

    Args:
        suite: Its name.
        family: The rows; those that the suite has no score of are left out.
    """
    entries, looks = family.rows(suite), _looks(family.entries)
    places = suite_places(suite, entries, order=family.sets.get(suite, []))
    is_single = len({place.metric for place in places}) == 1
    names = dict.fromkeys((place.name, place.is_average) for place in places)
    if is_single:
        length = math.ceil(len(places) / math.ceil(len(places) / _MAX_GROUPS))
        rows = [places[start : start + length] for start in range(0, len(places), length)]
    else:
        rows = [[place for place in places if place[1::2] == name] for name in names]
    scores = [entry.scores[place] for entry in entries for place in places if place in entry.scores]
    top = max(score.mean + (score.spread or 0) for score in scores)
    with plot_style():
        drawing = Drawing(figsize=(9.2, 2.15 * len(rows) + 0.5), layout="constrained")
        all_axes = drawing.subplots(len(rows), 1, squeeze=False)[:, 0]
        for axes, row in zip(all_axes, rows, strict=True):
            _draw_bars(axes, row, entries, looks)
            labels = [set_label(p) if is_single else metric_label(suite, p.metric) for p in row]
            axes.set_xticks(range(len(row)), [_short(x).replace(", ", ",\n") for x in labels])
            axes.set_xlim(-0.6, max(map(len, rows)) - 0.4)
            axes.set_ylim(0, min(104.0, 10 * math.ceil(10.5 * top)))
            axes.set_ylabel("percent")
            if not is_single:
                axes.set_title(_short(set_label(row[0])))
        drawing.legend(
            handles=[_legend_mark(entry, looks[entry.kind, entry.name]) for entry in entries],
            loc="outside upper left",
            ncols=4,
            handlelength=1.6,
            columnspacing=1.4,
        )
        lacks = any(
            is_partial(entry.scores[place], num_members(place, entries))
            for place in places
            for entry in entries
            if place in entry.scores
        )
        left_out = " Averages that leave data sets out are not drawn." if lacks else ""
        kind = "the paper's data sets" if family.is_paper else "other data sets"
        title = suite_of(suite).title
        return _finish(
            drawing,
            name=f"{suite}_{family.name}",
            alt=f"Bars: {title} on {kind}; the table above holds the same numbers.",
            caption=f"{title}, {suite_of(suite).unit}, on {kind}.{left_out}",
        )


def radar_figure(families: Sequence[Family], paper: Paper) -> Figure | None:
    """Draw where models stand on the three axes, None if no model was measured on all of them.

    The paper's methods have a panel of their own where no model was scored on their data sets.

    Args:
        families: The rows.
        paper: The published figures.
    """
    panels = []
    for family in families:
        for sets, entries in group_by_sets(family, AXES).items():
            num_sets = sum(map(len, sets))
            # Of the sets of an axis, ImageNet-1K itself is no shifted one.
            num_all = sum(len(family.sets[axis.suite]) for axis in AXES) - 1
            title = "The paper's data sets" if family.is_paper else "Other data sets"
            if family.is_paper and num_sets < num_all:
                title += f", {num_sets} of {num_all}"
            panels.append((title, family, sets, entries))
    if not panels:
        return None
    if not any(family.is_paper for _, family, _, _ in panels):
        rows = published_entries(paper)
        scores = [axis.score(rows[0]) for axis in AXES]
        sets = tuple(frozenset(score.sets) for score in scores if score is not None)
        published = Family(PAPER_SETS, tuple(rows), {})
        panels.append(("Published, for reference", published, sets, rows))
    columns = min(2, len(panels))
    lines = math.ceil(len(panels) / columns)
    with plot_style():
        drawing = Drawing(figsize=(4.7 * columns, 4.9 * lines), layout="constrained")
        for number, (title, family, sets, entries) in enumerate(panels, start=1):
            axes = drawing.add_subplot(lines, columns, number)
            _draw_radar(axes, entries, _looks(family.entries), sets)
            axes.set_title(title, loc="center")
        titles = [axis.title.lower() for axis in AXES]
        meanings = "; ".join(f"{axis.title.lower()}: {axis.meaning}" for axis in AXES)
        names = dict.fromkeys(entry.name for panel in panels for entry in panel[3])
        return _finish(
            drawing,
            name="radar",
            alt=f"Radar over {', '.join(titles)}: {', '.join(names)}.",
            caption="Three axes, each with its own scale, written at its ends, in percent. "
            f"{meanings[0].upper()}{meanings[1:]}. "
            "Panels have different data sets and do not compare.",
        )


def cost_figure(models: Sequence[Model], families: Sequence[Family]) -> Figure | None:
    """Draw accuracy against compute and time, None if no run says what it cost.

    Args:
        models: With what they cost.
        families: Their scores; each family is a row of panels.
    """
    rows = []
    for family in families:
        priced = [family.entry(model.name) for model in models if model.mean("flops") is not None]
        axis = next((a for a in AXES if any(e is not None and a.score(e) for e in priced)), None)
        groups = {} if axis is None else group_by_sets(family, [axis])
        rows += [
            (family, axis, sets, entries)
            for (sets,), entries in groups.items()
            if axis is not None and any(entry in entries for entry in priced)
        ]
    if not rows:
        return None
    with plot_style():
        drawing = Drawing(figsize=(9.2, 2.9 * len(rows)), layout="constrained")
        all_axes = drawing.subplots(len(rows), len(_COSTS), squeeze=False)
        for row_axes, (family, axis, sets, entries) in zip(all_axes, rows, strict=True):
            for axes, (fact, label, units) in zip(row_axes, _COSTS, strict=True):
                costs = {model.name: model.mean(fact) for model in models}
                unit = _draw_costs(axes, entries, _looks(family.entries), axis, costs, units)
                chance = [axis.mean_over(entry, sets) for entry in entries if entry.kind == CHANCE]
                if chance and chance[0] is not None:
                    axes.axhline(100 * chance[0], color=INK, ls=":", lw=1.2, label="chance")
                axes.set_xlabel(f"{label}, {unit}")
            row_axes[0].set_ylabel(f"{axis.title.lower()}, percent")
            row_axes[0].set_title(_sets_title(family, sets))
            handles, labels = row_axes[0].get_legend_handles_labels()
            row_axes[-1].legend(
                handles, labels, loc="center left", bbox_to_anchor=(1.02, 0.5), handlelength=1.4
            )
        shown = {axis.title: axis.meaning for _, axis, _, _ in rows}
        meanings = "; ".join(f"{title.lower()}: {meaning}" for title, meaning in shown.items())
        return _finish(
            drawing,
            name="cost",
            alt="Points: accuracy against the compute and the time of training, a point per model.",
            caption=f"Accuracy against cost, measured by each run itself; {meanings}. Bars are the "
            "standard deviation over seeds.",
        )


def epochs_figure(models: Sequence[Model], families: Sequence[Family]) -> Figure | None:
    """Draw how scores grew over training, None if no model was scored after two epochs.

    Args:
        models: With what their runs scored in training.
        families: The rows of the report, for the look of each model.
    """
    scored = [r for m in models for run in m.runs for of in run.epochs.values() for r in of]
    suites = ordered_suites(result.suite for result in scored)
    panels = [panel for suite in suites if (panel := make_panel(suite, models)) is not None]
    if not panels or not families:
        return None
    looks = _looks(families[0].entries)
    columns = min(2, len(panels))
    rows = math.ceil(len(panels) / columns)
    lines: dict[str, Line2D] = {}
    with plot_style():
        drawing = Drawing(figsize=(9.2, 2.9 * rows), layout="constrained")
        for number, panel in enumerate(panels, start=1):
            axes = drawing.add_subplot(rows, columns, number)
            quiet_axis(axes)
            for name, curve in panel.curves.items():
                if curve and (RUN, name) in looks:
                    heights = [100 * score for score in curve.values()]
                    style = _line_style(looks[RUN, name])
                    (lines[name],) = axes.plot(list(curve), heights, **style, clip_on=False)
            of = "" if len(panel.sets) == panel.num_members else f" of {panel.num_members}"
            sets = f"{len(panel.sets)}{of} set{'' if panel.num_members == 1 else 's'}"
            axes.set_title(f"{_short(suite_of(panel.suite).title)}, {sets}")
            axes.set_xlabel("epochs")
            axes.set_ylabel(f"{_short(metric_label(panel.suite, panel.metric))}, percent")
            axes.set_ylim(bottom=0)
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        labels = [legend_label(_short(name)) for name in lines]
        drawing.legend(
            list(lines.values()), labels, loc="outside upper left", ncols=4, columnspacing=1.4
        )
        return _finish(
            drawing,
            name="epochs",
            alt="Lines: scores against completed epochs of training, a line per model.",
            caption="Scores of the evaluations in training, mean over the data sets that all "
            "curves of a panel have, and over seeds.",
        )


def make_panel(suite: str, models: Sequence[Model]) -> Panel | None:
    """Gather the curves of a suite, None where none has two points over a common data set.

    Args:
        suite: Its name.
        models: With what their runs scored in training.
    """
    results = [r for m in models for run in m.runs for of in run.epochs.values() for r in of]
    results = [result for result in results if result.suite == suite]
    metric = next(iter([*suite_of(suite).main_metrics, *ordered_metrics(results)]), "")
    scores = {model.name: [_grown(run, suite, metric) for run in model.runs] for model in models}
    scores = {name: runs for name, runs in scores.items() if all(runs)}
    points = [of_epoch for runs in scores.values() for run in runs for of_epoch in run.values()]
    shared = set.intersection(*map(set, points)) if points else set()
    sets = tuple(name for name in points[0] if name in shared) if points else ()
    if not sets:
        return None
    curves = {
        name: {
            epoch: statistics.fmean(run[epoch][dataset] for run in runs for dataset in sets)
            for epoch in runs[0]
            if all(epoch in run for run in runs)
        }
        for name, runs in scores.items()
    }
    num_members = len({result.dataset for result in results})
    has_line = max(map(len, curves.values())) > 1
    return Panel(suite, metric, sets, num_members, curves) if has_line else None


def _grown(run: Run, suite: str, metric: str) -> dict[int, dict[str, float]]:
    """Return a metric by epoch and data set, of those epochs that have any."""
    by_epoch = {
        epoch: {
            result.dataset: value
            for result in results
            if result.suite == suite and result.status == DONE
            if (value := result.metrics.get(metric)) is not None
        }
        for epoch, results in run.epochs.items()
    }
    return {epoch: values for epoch, values in by_epoch.items() if values}


# How each row is drawn: what matplotlib takes for fill, hatch, marker, line and its width.
_Look = tuple[str, str, str, Any, float]


def _looks(entries: Sequence[Entry]) -> dict[tuple[str, str], _Look]:
    """Return the look of each row by kind and name; more than six of a kind repeat.

    Args:
        entries: All rows of a family, whether a figure shows them or not.
    """
    looks: dict[tuple[str, str], _Look] = {}
    for entry in entries:
        n = sum(kind == entry.kind for kind, _ in looks) % len(COLORS)
        looks[entry.kind, entry.name] = {
            PUBLISHED: (GRAYS[n], "", MARKERS[n], LINES[n], 1.0),
            RUN: (COLORS[n], HATCHES[n], MARKERS[n], LINES[n], 2.0),
            CHANCE: (INK, "", "_", ":", 1.2),
        }[entry.kind]
    return looks


def _line_style(look: _Look) -> dict[str, Any]:
    fill, _, marker, line, width = look
    return {
        # Never too light for white paper.
        "color": "#707070" if fill in GRAYS else fill,
        "linestyle": line,
        "linewidth": width,
        "marker": marker,
        "markersize": 5,
        "markeredgecolor": INK,
        "markeredgewidth": 0.5,
    }


def _short(name: str) -> str:
    name = plain(name)
    return name if len(name) <= _MAX_NAME else f"{name[:_MAX_NAME]}..."


def _label(entry: Entry) -> str:
    name = legend_label(_short(entry.name))
    return f"{name} (published)" if entry.kind == PUBLISHED else name


def _legend_mark(entry: Entry, look: _Look) -> Patch | Line2D:
    if entry.kind == CHANCE:
        return Line2D([], [], color=INK, linestyle=":", linewidth=1.2, label="chance")
    fill, hatch = look[:2]
    return Patch(facecolor=fill, hatch=hatch, edgecolor=INK, linewidth=0.5, label=_label(entry))


def _draw_bars(
    axes: Axes,
    row: Sequence[Place],
    entries: Sequence[Entry],
    looks: dict[tuple[str, str], _Look],
) -> None:
    quiet_axis(axes)
    bars = [entry for entry in entries if entry.kind != CHANCE]
    width = min(_GROUP_WIDTH / len(bars), _MAX_BAR_WIDTH)
    has_numbers = len(bars) * len(row) <= _MAX_BARS_WITH_NUMBERS
    for group, place in enumerate(row):
        for number, entry in enumerate(bars):
            score = entry.scores.get(place)
            if score is None or is_partial(score, num_members(place, entries)):
                continue
            x = group + (number - (len(bars) - 1) / 2) * width
            fill, hatch = looks[entry.kind, entry.name][:2]
            axes.bar(
                x,
                100 * score.mean,
                0.94 * width,
                color=fill,
                hatch=hatch,
                edgecolor=INK,
                linewidth=0.5,
                yerr=None if score.spread is None else 100 * score.spread,
                error_kw={"elinewidth": 0.8, "capsize": 2, "ecolor": INK},
            )
            if has_numbers:
                axes.annotate(
                    percent(score.mean),
                    (x, 100 * (score.mean + (score.spread or 0))),
                    xytext=(0, 2),
                    textcoords="offset points",
                    ha="center",
                    fontsize=7.5,
                    path_effects=[withStroke(linewidth=2, foreground="white")],
                    zorder=5,
                )
        for entry in entries:
            if entry.kind == CHANCE and place in entry.scores:
                level, ends = 100 * entry.scores[place].mean, [group - 0.46, group + 0.46]
                # A white ground lets the dots stand out from a dark bar.
                axes.plot(ends, [level, level], "-", color="white", lw=2.0)
                axes.plot(ends, [level, level], ":", color=INK, lw=1.2)


def _draw_radar(
    axes: Axes,
    entries: Sequence[Entry],
    looks: dict[tuple[str, str], _Look],
    sets: tuple[frozenset[str], ...],
) -> None:
    values = [
        [
            float(percent(axis.mean_over(entry, names)))
            for axis, names in zip(AXES, sets, strict=True)
        ]
        for entry in entries
    ]
    limits = [_limits(column) for column in zip(*values, strict=True)]
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
    for entry, row in zip(entries, values, strict=True):
        radii = [
            _INNER + (1 - _INNER) * (value - low) / (high - low)
            for value, (low, high) in zip(row, limits, strict=True)
        ]
        axes.plot(
            *_triangle(radii),
            **_line_style(looks[entry.kind, entry.name]),
            label=f"{_label(entry)}: {', '.join(f'{value:.1f}' for value in row)}",
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


def _limits(values: Sequence[float]) -> tuple[float, float]:
    """Return round ends of an axis with some room around the values."""
    spread = max(values) - min(values)
    step = 5 if spread > 10 else 1
    low = max(0, step * math.floor((min(values) - 0.1 * spread) / step))
    high = min(100, step * math.ceil((max(values) + 0.1 * spread) / step))
    return low, max(high, low + step)


def _draw_costs(
    axes: Axes,
    entries: Sequence[Entry],
    looks: dict[tuple[str, str], _Look],
    axis: Axis,
    costs: dict[str, float | None],
    units: dict[str, float],
) -> str:
    """Draw a point per model whose cost is known, and return the unit of the x axis."""
    quiet_axis(axes)
    points = [
        (entry, score, cost)
        for entry in entries
        if entry.kind == RUN and (cost := costs[entry.name]) is not None
        if (score := axis.score(entry)) is not None
    ]
    lowest = min((cost for _, _, cost in points), default=0.0)
    highest = max((cost for _, _, cost in points), default=0.0)
    unit = [name for name, size in units.items() if size == 1 or size <= highest][-1]
    for entry, score, cost in points:
        fill, _, marker, _, _ = looks[entry.kind, entry.name]
        place = (cost / units[unit], 100 * score.mean)
        if score.spread is not None:
            axes.errorbar(*place, yerr=100 * score.spread, color=INK, elinewidth=0.8, capsize=6)
        axes.plot(
            *place,
            marker,
            color=fill,
            markeredgecolor=INK,
            markeredgewidth=0.6,
            markersize=8,
            label=_label(entry),
        )
    top = max((score.mean + (score.spread or 0) for _, score, _ in points), default=0.0)
    axes.set_ylim(0, 115 * top or 1)
    if highest > 5 * lowest > 0:
        axes.set_xscale("log")
        axes.set_xlim(0.6 * lowest / units[unit], 1.7 * highest / units[unit])
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5), numticks=8))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
    else:
        axes.set_xlim(0, 1.2 * highest / units[unit] or 1)
    return unit


def _sets_title(family: Family, sets: frozenset[str]) -> str:
    if family.is_paper:
        return f"{len(sets)} of the paper's data sets"
    if len(sets) <= _MAX_NAMES:
        return ", ".join(sorted(_short(name.rsplit("/", 1)[-1]) for name in sets))
    return f"{len(sets)} other data sets"


def _finish(drawing: Drawing, *, name: str, alt: str, caption: str) -> Figure:
    """Save a drawing in both forms, with our mark."""
    name = re.sub(r"[^\w-]+", "-", name, flags=re.ASCII)[-_MAX_NAME:]
    mark = _MARK.format(name=name)
    forms = (picture(drawing, form, mark=mark) for form in ("svg", "png"))
    return Figure(name, alt, caption, *forms)
