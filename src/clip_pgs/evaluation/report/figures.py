"""The report's figures: bars per suite, a radar over three axes, accuracy by cost and by epoch.

A model looks the same in all of them. Bars of runs have colors and those of published rows shades
of gray; lines of runs are thick and those of published rows thin.
"""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure as Drawing
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.patheffects import withStroke
from matplotlib.ticker import EngFormatter, MaxNLocator

from clip_pgs import plots
from clip_pgs.evaluation.report import results_table, scores
from clip_pgs.evaluation.report.gather import Model
from clip_pgs.evaluation.report.published import Paper
from clip_pgs.evaluation.report.scores import AXES, CHANCE, RUN, Axis, Entry, Family, Place
from clip_pgs.evaluation.results import DONE, Result, ordered_metrics
from clip_pgs.plots import INK, Figure
from clip_pgs.tables import PREFIXES, PUBLISHED, percent, plain

# Stands in every figure file, so that a later report knows it from the files of others and from
# a copy under another name; the first bytes of a file hold it.
_MARK, _MARK_PLACE = "clip-pgs evaluation report ({name})", 4096
_MAX_BARS_WITH_NUMBERS, _MAX_GROUPS, _MAX_NAMES = 26, 6, 5
_MAX_NAME = 60  # letters of a name
_GROUP_WIDTH, _MAX_BAR_WIDTH = 0.84, 0.36
_HALO = [withStroke(linewidth=2, foreground="white")]
_ERROR_BAR: dict[str, Any] = {"color": INK, "elinewidth": 0.8}
_WHISKERS = "Whiskers: the standard deviation over seeds."
_LEGEND_ABOVE: dict[str, Any] = {"loc": "outside upper left", "ncols": 4, "columnspacing": 1.4}
_ANGLES = [math.pi / 2 - 2 * math.pi * number / len(AXES) for number in range(len(AXES))]
# The lowest value of a radar's axis stands off the center, where all directions meet.
_INNER = 0.25
# What training cost: the name of each fact, and units of it.
_TIMES: dict[str, float] = {"seconds": 1, "minutes": 60, "hours": 3600, "days": 86400}
_FLOPS: dict[str, float] = {f"{p}FLOP": 1e3**n for n, p in enumerate(PREFIXES)}
_COSTS: dict[str, tuple[str, dict[str, float]]] = {
    "flops": ("training compute", _FLOPS),
    "seconds": ("wall time of training", _TIMES),
    "flops_per_image": ("inference per image", _FLOPS),
}
_CURVES = {
    "loss": "training loss",
    "clip_val_loss": "validation loss",
    "lr": "learning rate",
    "mask_ratio_mean": "mask ratio",
}


class Look(NamedTuple):
    """How a row is drawn: fill and hatch of bars; marker, line and width of curves."""

    fill: str
    hatch: str
    marker: str
    line: Any
    width: float

    @property
    def bar(self) -> dict[str, Any]:
        """What matplotlib takes for a bar, and for its mark in a legend."""
        return {"facecolor": self.fill, "hatch": self.hatch, "edgecolor": INK, "linewidth": 0.5}

    @property
    def curve(self) -> dict[str, Any]:
        """What matplotlib takes for a line with markers; published ones are thin."""
        color = self.fill
        if color in plots.GRAYS:
            # Grays are too light and too alike for lines.
            color = plots.COLORS[-1 - plots.GRAYS.index(color)]
        line = {"linestyle": self.line, "linewidth": self.width, "marker": self.marker}
        edge = {"markeredgecolor": INK, "markeredgewidth": 0.5, "markersize": 5}
        return {"color": color, **line, **edge}


Looks = dict[tuple[str, str], Look]


class Panel(NamedTuple):
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


def overview_figures(
    models: Sequence[Model], families: Sequence[Family], paper: Paper
) -> list[Figure]:
    """Draw the figures on all suites, as far as there is something to draw."""
    radar, cost = radar_figure(families, paper), cost_figure(models, families)
    drawn = (radar, cost, epochs_figure(models, families), training_figure(models, families))
    return [figure for figure in drawn if figure is not None]


def suite_figure(suite: str, family: Family) -> Figure:
    """Draw the results of a suite as bars: a group per data set or average, a bar per model.

    Args:
        suite: Its name.
        family: The rows; those that the suite has no score of are left out.
    """
    entries, looks, facts = family.rows(suite), _looks(family.entries), scores.suite_of(suite)
    places = results_table.suite_places(suite, entries, order=family.sets.get(suite, []))
    is_single = len({place.metric for place in places}) == 1
    if is_single:
        length = math.ceil(len(places) / math.ceil(len(places) / _MAX_GROUPS))
        rows = [places[start : start + length] for start in range(0, len(places), length)]
    else:
        names = dict.fromkeys(place[1::2] for place in places)
        rows = [[place for place in places if place[1::2] == name] for name in names]
    shown = [(place, e.scores[place]) for e in entries for place in places if place in e.scores]
    top = max(score.mean + (score.spread or 0) for _, score in shown)
    lacks = any(results_table.is_partial(score, place, entries) for place, score in shown)
    with plots.plot_style():
        drawing = Drawing(figsize=(9.2, 2.15 * len(rows) + 0.5), layout="constrained")
        all_axes = drawing.subplots(len(rows), 1, squeeze=False)[:, 0]
        for axes, row in zip(all_axes, rows, strict=True):
            _draw_bars(axes, row, entries, looks)
            labels = [results_table.column_of(place, is_single=is_single).label for place in row]
            axes.set_xticks(range(len(row)), [_short(x).replace(", ", ",\n") for x in labels])
            axes.set(xlim=(-0.6, max(map(len, rows)) - 0.4), ylabel="percent")
            axes.set_ylim(0, min(104.0, 10 * math.ceil(10.5 * top)))
            if not is_single:
                axes.set_title(_short(results_table.set_label(row[0])))
        marks = [_legend_mark(entry, looks[entry.kind, entry.name]) for entry in entries]
        drawing.legend(handles=marks, handlelength=1.6, **_LEGEND_ABOVE)
        kind = "the paper's data sets" if family.is_paper else "data sets that are not the paper's"
        left_out = " Averages that leave data sets out are not drawn." if lacks else ""
        chance = " Dotted: chance." if any(entry.kind == CHANCE for entry in entries) else ""
        whiskers = f" {_WHISKERS}" if any(score.spread is not None for _, score in shown) else ""
        return _finish(
            drawing,
            f"{suite}_{family.name}",
            f"Bars: {facts.title} on {kind}; the table above holds the same numbers.",
            f"The numbers of the table: {facts.unit}.{chance}{whiskers}{left_out}",
        )


def radar_figure(families: Sequence[Family], paper: Paper) -> Figure | None:
    """Draw where models stand on the three axes, None if no model was measured on all of them.

    The paper's methods have a panel of their own where no model was scored on their data sets.

    Args:
        families: The rows.
        paper: The published figures.
    """
    panels = []
    has_published = False
    for family in families:
        for sets, entries in scores.group_by_sets(family, AXES).items():
            title, num_sets = "Other data sets", sum(map(len, sets))
            if not any(other.is_paper for other in families):
                title = "The data sets of this report"
            if family.is_paper:
                # Of the sets of an axis, ImageNet-1K itself is no shifted one.
                num_all = sum(len(family.sets[axis.place.suite]) for axis in AXES) - 1
                title = "The paper's data sets"
                title += f", {num_sets} of {num_all}" if num_sets < num_all else ""
                has_published = True
            panels.append((title, _looks(family.entries), sets, entries))
    if not panels:
        return None
    if not has_published:
        rows = scores.published_family(paper).entries
        means = [axis.score(rows[0]) for axis in AXES]
        sets = tuple(frozenset(mean.sets) for mean in means if mean is not None)
        panels.append(("Published, for reference", _looks(rows), sets, list(rows)))
    columns = min(2, len(panels))
    lines = math.ceil(len(panels) / columns)
    with plots.plot_style():
        drawing = Drawing(figsize=(4.7 * columns, 4.9 * lines), layout="constrained")
        for number, (title, looks, sets, entries) in enumerate(panels, start=1):
            axes = drawing.add_subplot(lines, columns, number)
            _draw_radar(axes, entries, looks, sets)
            axes.set_title(title, loc="center")
        meanings = "; ".join(f"{axis.title.lower()}: {axis.meaning}" for axis in AXES)
        names = dict.fromkeys(entry.name for panel in panels for entry in panel[3])
        return _finish(
            drawing,
            "radar",
            f"Radar over {', '.join(axis.title.lower() for axis in AXES)}: {', '.join(names)}.",
            "Three axes, each with its own scale, written at its ends, in percent. "
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
        groups = {} if axis is None else scores.group_by_sets(family, [axis])
        for (sets,), entries in groups.items():
            if axis is not None and any(entry in entries for entry in priced):
                rows.append((family, axis, sets, entries))
    if not rows:
        return None
    with plots.plot_style():
        facts = [fact for fact in _COSTS if any(m.mean(fact) is not None for m in models)]
        drawing = Drawing(figsize=(9.2, 2.9 * len(rows)), layout="constrained")
        all_axes = drawing.subplots(len(rows), len(facts), squeeze=False)
        for row_axes, (family, axis, sets, entries) in zip(all_axes, rows, strict=True):
            for axes, fact in zip(row_axes, facts, strict=True):
                costs = {model.name: model.mean(fact) for model in models}
                _draw_costs(axes, entries, _looks(family.entries), axis, costs, *_COSTS[fact])
                for entry in entries:
                    if entry.kind == CHANCE:
                        level = 100 * (axis.mean_over(entry, sets) or 0)
                        axes.axhline(level, color=INK, ls=":", lw=1.2, label="chance")
            kind = "of the paper's" if family.is_paper else "other"
            title = f"{len(sets)} {kind} data sets"
            if not family.is_paper and len(sets) <= _MAX_NAMES:
                title = ", ".join(sorted(_short(name.rsplit("/", 1)[-1]) for name in sets))
            row_axes[0].set_ylabel(f"{axis.title.lower()}, percent")
            row_axes[0].set_title(title)
            marks = row_axes[0].get_legend_handles_labels()
            beside = {"loc": "center left", "bbox_to_anchor": (1.02, 0.5)}
            row_axes[-1].legend(*marks, handlelength=1.4, **beside)
        shown = {axis.title: axis.meaning for _, axis, _, _ in rows}
        meanings = "; ".join(f"{title.lower()}: {meaning}" for title, meaning in shown.items())
        scored = [axis.score(entry) for _, axis, _, entries in rows for entry in entries]
        whiskers = any(score is not None and score.spread is not None for score in scored)
        return _finish(
            drawing,
            "cost",
            "Points: accuracy against compute and time of training and compute of inference.",
            f"Accuracy against cost, measured by each run itself; {meanings}."
            + (f" {_WHISKERS}" if whiskers else ""),
        )


def epochs_figure(models: Sequence[Model], families: Sequence[Family]) -> Figure | None:
    """Draw how scores grew over training, None if no model was scored after two epochs.

    Args:
        models: With what their runs scored in training.
        families: The rows of the report, for the look of each model.
    """
    suites = scores.ordered_suites(result.suite for result in _results_in_training(models))
    panels = [panel for suite in suites if (panel := make_panel(suite, models)) is not None]
    if not panels or not families:
        return None
    looks, lines = _looks(families[0].entries), dict[str, Line2D]()
    columns = min(2, len(panels))
    rows = math.ceil(len(panels) / columns)
    with plots.plot_style():
        drawing = Drawing(figsize=(9.2, 2.9 * rows), layout="constrained")
        for number, panel in enumerate(panels, start=1):
            axes = drawing.add_subplot(rows, columns, number)
            plots.quiet_axis(axes)
            for name, curve in panel.curves.items():
                if curve and (RUN, name) in looks:
                    heights = [100 * score for score in curve.values()]
                    style = looks[RUN, name].curve
                    (lines[name],) = axes.plot(list(curve), heights, **style, clip_on=False)
            of = "" if len(panel.sets) == panel.num_members else f" of {panel.num_members}"
            sets = f"{len(panel.sets)}{of} set{'' if panel.num_members == 1 else 's'}"
            axes.set_title(f"{_short(scores.suite_of(panel.suite).title)}, {sets}")
            label = _short(results_table.metric_label(panel.suite, panel.metric))
            axes.set(xlabel="epochs", ylabel=f"{label}, percent")
            axes.set_ylim(bottom=0)
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        labels = [plots.legend_label(_short(name)) for name in lines]
        drawing.legend(list(lines.values()), labels, **_LEGEND_ABOVE)
        return _finish(
            drawing,
            "epochs",
            "Lines: scores against completed epochs of training, a line per model.",
            "Scores of the evaluations in training, mean over the data sets that all "
            "curves of a panel have, and over seeds.",
        )


def training_figure(models: Sequence[Model], families: Sequence[Family]) -> Figure | None:
    """Draw what the runs measured while they trained, None if none has two points of anything.

    Args:
        models: With their runs.
        families: The rows of the report, for the look of each model.
    """
    shown = [
        name
        for name in _CURVES
        if any(len(run.curve(name)) > 1 for model in models for run in model.runs)
    ]
    if not shown or not families:
        return None
    looks, lines = _looks(families[0].entries), dict[str, Line2D]()
    with plots.plot_style():
        drawing = Drawing(figsize=(9.2, 2.6 * math.ceil(len(shown) / 2)), layout="constrained")
        for number, name in enumerate(shown, start=1):
            axes = drawing.add_subplot(math.ceil(len(shown) / 2), 2, number)
            plots.quiet_axis(axes)
            axes.set(xlabel="samples seen", title=_CURVES[name])
            axes.xaxis.set_major_formatter(EngFormatter())
            for model in models:
                style = {**looks[RUN, model.name].curve, "marker": "", "linewidth": 1.4}
                for run in model.runs:
                    if points := run.curve(name):
                        (lines[model.name],) = axes.plot(*zip(*points, strict=True), **style)
        labels = [plots.legend_label(_short(name)) for name in lines]
        drawing.legend(list(lines.values()), labels, **_LEGEND_ABOVE)
        return _finish(
            drawing,
            "training",
            "Lines: loss, learning rate, mask ratio and validation loss over training, per run.",
            "What each run measured while it trained, a line per run; seeds share a color.",
        )


def make_panel(suite: str, models: Sequence[Model]) -> Panel | None:
    """Gather the curves of a suite, None where none has two points over a common data set.

    Args:
        suite: Its name.
        models: With what their runs scored in training.
    """
    results = [result for result in _results_in_training(models) if result.suite == suite]
    metric = next(iter([*scores.suite_of(suite).main_metrics, *ordered_metrics(results)]), "")
    # By model and run, then by epoch and data set, where anything was scored.
    grown: dict[str, list[dict[int, dict[str, float]]]] = {}
    for model in models:
        for run in model.runs:
            of_run: dict[int, dict[str, float]] = {}
            for epoch, of_epoch in run.epochs.items():
                done = [r for r in of_epoch if r.suite == suite and r.status == DONE]
                for result in done:
                    value = result.metrics.get(metric)
                    if value is not None:
                        of_run.setdefault(epoch, {})[result.dataset] = value
            grown.setdefault(model.name, []).append(of_run)
    grown = {name: runs for name, runs in grown.items() if all(runs)}
    points = [values for runs in grown.values() for run in runs for values in run.values()]
    sets = tuple(name for name in points[0] if all(name in p for p in points)) if points else ()
    if not sets:
        return None
    curves = {
        name: {
            epoch: statistics.fmean(run[epoch][dataset] for run in runs for dataset in sets)
            for epoch in runs[0]
            if all(epoch in run for run in runs)
        }
        for name, runs in grown.items()
    }
    num_members = len({result.dataset for result in results})
    has_line = max(map(len, curves.values())) > 1
    return Panel(suite, metric, sets, num_members, curves) if has_line else None


def _results_in_training(models: Sequence[Model]) -> list[Result]:
    runs = [run for model in models for run in model.runs]
    return [result for run in runs for results in run.epochs.values() for result in results]


def _looks(entries: Sequence[Entry]) -> Looks:
    """Return the look of each row by kind and name; more than six of a kind repeat.

    Args:
        entries: All rows of a family, whether a figure shows them or not.
    """
    looks: Looks = {}
    for entry in entries:
        n = sum(kind == entry.kind for kind, _ in looks) % len(plots.COLORS)
        marker, line = plots.MARKERS[n], plots.LINES[n]
        looks[entry.kind, entry.name] = {
            PUBLISHED: Look(plots.GRAYS[n], "", marker, line, 1.0),
            RUN: Look(plots.COLORS[n], plots.HATCHES[n], marker, line, 2.0),
            CHANCE: Look(INK, "", "_", ":", 1.2),
        }[entry.kind]
    return looks


def _short(name: str) -> str:
    name = plain(name)
    return name if len(name) <= _MAX_NAME else f"{name[:_MAX_NAME]}..."


def _label(entry: Entry) -> str:
    name = plots.legend_label(_short(entry.name))
    return f"{name} (published)" if entry.kind == PUBLISHED else name


def _legend_mark(entry: Entry, look: Look) -> Patch | Line2D:
    if entry.kind == CHANCE:
        return Line2D([], [], color=INK, linestyle=":", linewidth=1.2, label="chance")
    return Patch(**look.bar, label=_label(entry))


def _draw_bars(axes: Axes, row: Sequence[Place], entries: Sequence[Entry], looks: Looks) -> None:
    plots.quiet_axis(axes)
    bars = [entry for entry in entries if entry.kind != CHANCE]
    width = min(_GROUP_WIDTH / len(bars), _MAX_BAR_WIDTH)
    style: dict[str, Any] = {"ha": "center", "fontsize": 7.5, "path_effects": _HALO, "zorder": 5}
    for group, place in enumerate(row):
        for number, entry in enumerate(bars):
            score = entry.scores.get(place)
            if score is None or results_table.is_partial(score, place, entries):
                continue
            x, height = group + (number - (len(bars) - 1) / 2) * width, 100 * score.mean
            axes.bar(x, height, 0.94 * width, **looks[entry.kind, entry.name].bar)
            if score.spread is not None:
                axes.errorbar(x, height, 100 * score.spread, capsize=2, **_ERROR_BAR)
            if len(bars) * len(row) <= _MAX_BARS_WITH_NUMBERS:
                top = (x, height + 100 * (score.spread or 0))
                axes.annotate(percent(score.mean), top, (0, 2), textcoords="offset points", **style)
        for entry in entries:
            if entry.kind == CHANCE and place in entry.scores:
                level, ends = 100 * entry.scores[place].mean, [group - 0.46, group + 0.46]
                # A white ground lets the dots stand out from a dark bar.
                axes.plot(ends, [level, level], "-", color="white", lw=2.0)
                axes.plot(ends, [level, level], ":", color=INK, lw=1.2)


def _draw_radar(
    axes: Axes, entries: Sequence[Entry], looks: Looks, sets: tuple[frozenset[str], ...]
) -> None:
    parts = list(zip(AXES, sets, strict=True))
    values = [[float(percent(axis.mean_over(e, of))) for axis, of in parts] for e in entries]
    limits = [_limits(column) for column in zip(*values, strict=True)]
    axes.set_aspect("equal")
    axes.set_axis_off()
    axes.set(xlim=(-1.25, 1.25), ylim=(-0.85, 1.3))
    small: dict[str, Any] = {"fontsize": 8, "color": "#555555"}
    for ring in (_INNER, (1 + _INNER) / 2, 1.0):
        axes.plot(*_triangle([ring] * 3), color=plots.FAINT, linewidth=0.8)
    for axis, angle, (low, high) in zip(AXES, _ANGLES, limits, strict=True):
        x, y = math.cos(angle), math.sin(angle)
        axes.plot([0, x], [0, y], color=plots.FAINT, linewidth=0.8)
        if y > 0:
            axes.text(x, y + 0.04, f"{axis.title}\n{high:g}", ha="center", va="bottom")
            axes.text(x + 0.04, _INNER * y + 0.03, f"{low:g}", **small)
        else:
            axes.text(x, y - 0.04, f"{high:g}\n{axis.title}", ha="center", va="top")
            axes.text((_INNER - 0.04) * x, _INNER * y - 0.1, f"{low:g}", ha="center", **small)
    for entry, row in zip(entries, values, strict=True):
        places = zip(row, limits, strict=True)
        radii = [
            _INNER + (1 - _INNER) * (value - low) / (high - low) for value, (low, high) in places
        ]
        label = f"{_label(entry)}: {', '.join(f'{value:.1f}' for value in row)}"
        style, zorder = looks[entry.kind, entry.name].curve, 4 if entry.kind == RUN else 3
        axes.plot(*_triangle(radii), **style, label=label, zorder=zorder)
    title = ", ".join(axis.title.lower() for axis in AXES)
    below: dict[str, Any] = {"loc": "upper center", "bbox_to_anchor": (0.5, 0.0), "fontsize": 8}
    axes.legend(handlelength=3, title=title, title_fontsize=8, **below)


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
    looks: Looks,
    axis: Axis,
    costs: dict[str, float | None],
    label: str,
    units: dict[str, float],
) -> None:
    """Draw a point per model whose cost is known."""
    plots.quiet_axis(axes)
    points = [
        (entry, score, cost)
        for entry in entries
        if entry.kind == RUN and (cost := costs[entry.name]) is not None
        if (score := axis.score(entry)) is not None
    ]
    highest = max((cost for _, _, cost in points), default=0.0)
    unit = [name for name, size in units.items() if size == 1 or size <= highest][-1]
    edge: dict[str, Any] = {"markeredgecolor": INK, "markeredgewidth": 0.6, "markersize": 8}
    for entry, score, cost in points:
        place, look = (cost / units[unit], 100 * score.mean), looks[RUN, entry.name]
        if score.spread is not None:
            axes.errorbar(*place, 100 * score.spread, capsize=6, **_ERROR_BAR)
        axes.plot(*place, look.marker, color=look.fill, label=_label(entry), **edge)
    top = max((score.mean + (score.spread or 0) for _, score, _ in points), default=0.0)
    axes.set_ylim(0, 115 * top or 1)
    axes.set_xlabel(f"{label}, {unit}")
    low = min((cost for _, _, cost in points), default=0.0) / units[unit]
    high = highest / units[unit]
    if high > 5 * low > 0:
        axes.set_xscale("log")
        axes.set_xlim(0.6 * low, 1.7 * high)
        plots.log_ticks(axes.xaxis)
    else:
        axes.set_xlim(0, 1.2 * high or 1)


def _finish(drawing: Drawing, name: str, alt: str, caption: str) -> Figure:
    """Save a drawing in both forms, with our mark."""
    name = re.sub(r"[^\w-]+", "-", name, flags=re.ASCII)[-_MAX_NAME:]
    return Figure.of(drawing, name, alt, caption, mark=_MARK.format(name=name))
