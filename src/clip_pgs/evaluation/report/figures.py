"""The report's figures: bars per suite, a radar over three axes, accuracy by cost and by epoch.

A model looks the same in all of them. Bars of runs have colors and those of published rows shades
of gray; lines of runs are thick and those of published rows thin.
"""

from __future__ import annotations

import math
import re
import statistics
import zlib
from collections.abc import Collection, Sequence
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
from clip_pgs.evaluation.report.scores import AXES, CHANCE, RUN, Entry, Family, Place, Score
from clip_pgs.evaluation.results import DONE, Result, ordered_metrics
from clip_pgs.plots import INK, Figure
from clip_pgs.tables import PREFIXES, PUBLISHED, percent, plain

# Stands in every figure file, so that a later report knows it from the files of others.
MARK = "clip-pgs evaluation report"
_MAX_BARS_WITH_NUMBERS, _MAX_GROUPS = 26, 6
_MAX_NAME = 60  # letters of a name
_GROUP_WIDTH, _MAX_BAR_WIDTH = 0.84, 0.36
_HALO = [withStroke(linewidth=2, foreground="white")]
_ERROR_BAR: dict[str, Any] = {"color": INK, "elinewidth": 0.8}
_MARKS = "Dotted lines are chance, whiskers the standard deviation over seeds."
_LEGEND_ABOVE: dict[str, Any] = {"loc": "outside upper left", "ncols": 4, "columnspacing": 1.4}
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
    """How a row is drawn: fill and hatch of bars; color, marker, line and width of curves."""

    fill: str
    hatch: str
    color: str
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
        line = {"linestyle": self.line, "linewidth": self.width, "marker": self.marker}
        edge = {"markeredgecolor": INK, "markeredgewidth": 0.5, "markersize": 5}
        return {"color": self.color, **line, **edge}


Looks = dict[tuple[str, str], Look]
Line = tuple[str, list[tuple[float, float]]]  # a model's name, and points
Point = tuple[Entry, Score, float]  # a row, what it reached, and its cost


class Panel(NamedTuple):
    """Lines beside each other.

    Attributes:
        title: What they show.
        unit: Of their heights.
        lines: The model and the points of each.
    """

    title: str
    unit: str
    lines: list[Line]


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
    shown = [e.scores[place] for e in entries for place in places if place in e.scores]
    top = max(score.mean + (score.spread or 0) for score in shown)
    with plots.plot_style():
        drawing = Drawing(figsize=(9.2, 2.15 * len(rows) + 0.5), layout="constrained")
        all_axes = drawing.subplots(len(rows), 1, squeeze=False)[:, 0]
        for axes, row in zip(all_axes, rows, strict=True):
            _draw_bars(axes, row, entries, looks)
            labels = [results_table.column_of(place, places).label for place in row]
            axes.set_xticks(range(len(row)), [_short(x).replace(", ", ",\n") for x in labels])
            axes.set(xlim=(-0.6, max(map(len, rows)) - 0.4), ylabel="percent")
            axes.set_ylim(0, min(104.0, 10 * math.ceil(10.5 * top)) or 10)
            if not is_single:
                axes.set_title(_short(results_table.set_label(row[0], places)))
        marks = [_legend_mark(entry, looks[entry.kind, entry.name]) for entry in entries]
        drawing.legend(handles=marks, handlelength=1.6, **_LEGEND_ABOVE)
        return _finish(
            drawing,
            f"{suite}_{family.name}",
            f"Bars: {facts.title} on {family.words}; the table above holds the same numbers.",
            f"The numbers of the table: {facts.unit}. {_MARKS} Averages that leave data sets out "
            "are not drawn.",
        )


def radar_figure(families: Sequence[Family], paper: Paper) -> Figure | None:
    """Draw where models stand on the three axes, None if no model was measured on all of them.

    The paper's methods have a panel of their own where no model was scored on their data sets.

    Args:
        families: The rows.
        paper: The published figures.
    """
    panels = [
        (_title(family, frozenset().union(*sets)), _looks(family.entries), sets, entries)
        for family in families
        for sets, entries in scores.group_by_sets(family, AXES).items()
    ]
    if not panels:
        return None
    if not any(entry.kind == PUBLISHED for panel in panels for entry in panel[3]):
        rows = scores.published_family(paper).entries
        means = [axis.score(rows[0]) for axis in AXES]
        sets = tuple(frozenset(mean.sets) for mean in means if mean is not None)
        panels.append(("Published, for reference", _looks(rows), sets, list(rows)))
    columns = min(2, len(panels))
    lines = math.ceil(len(panels) / columns)
    with plots.plot_style():
        drawing = Drawing(figsize=(4.7 * columns, 4.9 * lines), layout="constrained")
        for number, (title, looks, sets, entries) in enumerate(panels, start=1):
            axes = drawing.add_subplot(lines, columns, number, projection="polar")
            _draw_radar(axes, entries, looks, sets)
            axes.set_title(title, loc="center")
        meanings = "; ".join(f"{axis.title.lower()}: {axis.meaning}" for axis in AXES)
        names = dict.fromkeys(entry.name for panel in panels for entry in panel[3])
        return _finish(
            drawing,
            "radar",
            f"Radar over {', '.join(axis.title.lower() for axis in AXES)}: {', '.join(names)}.",
            "Three axes, each with its own scale, from the middle outwards, in percent. "
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
        names = {model.name for model in models if model.mean("flops") is not None}
        priced = [entry for entry in family.entries if entry.kind == RUN and entry.name in names]
        for axis in [a for a in AXES if any(map(a.score, priced))][:1]:
            for (sets,), entries in scores.group_by_sets(family, [axis]).items():
                if any(entry in entries for entry in priced):
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
                points = [
                    (entry, score, cost)
                    for entry in entries
                    if entry.kind == RUN and (cost := costs[entry.name]) is not None
                    if (score := axis.score(entry)) is not None
                ]
                _draw_costs(axes, points, _looks(family.entries), *_COSTS[fact])
                for entry in entries:
                    if entry.kind == CHANCE:
                        level = 100 * (axis.mean_over(entry, sets) or 0)
                        axes.axhline(level, color=INK, ls=":", lw=1.2, label="chance")
            row_axes[0].set_ylabel(f"{axis.title.lower()}, percent")
            row_axes[0].set_title(_title(family, sets))
            marks = row_axes[0].get_legend_handles_labels()
            beside = {"loc": "center left", "bbox_to_anchor": (1.02, 0.5)}
            row_axes[-1].legend(*marks, handlelength=1.4, **beside)
        shown = {axis.title: axis.meaning for _, axis, _, _ in rows}
        meanings = "; ".join(f"{title.lower()}: {meaning}" for title, meaning in shown.items())
        return _finish(
            drawing,
            "cost",
            "Points: accuracy against compute and time of training and compute of inference.",
            f"Accuracy against cost, measured by each run itself; {meanings}. {_MARKS}",
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
    with plots.plot_style():
        drawing = _draw_lines(panels, _looks(families[0].entries), "epochs", clip_on=False)
        for axes in drawing.axes:
            axes.set_ylim(bottom=0)
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
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
    runs = [(model.name, run) for model in models for run in model.runs]
    panels = [
        Panel(title, "", [(name, run.curve(fact)) for name, run in runs])
        for fact, title in _CURVES.items()
    ]
    panels = [panel for panel in panels if any(len(points) > 1 for _, points in panel.lines)]
    if not panels or not families:
        return None
    with plots.plot_style():
        looks, thin = _looks(families[0].entries), {"marker": "", "linewidth": 1.4}
        drawing = _draw_lines(panels, looks, "samples seen", **thin)
        for axes in drawing.axes:
            axes.xaxis.set_major_formatter(EngFormatter())
        return _finish(
            drawing,
            "training",
            "Lines: loss, learning rate, mask ratio and validation loss over training, per run.",
            "What each run measured while it trained, a line per run; seeds share a color.",
        )


def _draw_lines(panels: Sequence[Panel], looks: Looks, xlabel: str, **style: Any) -> Drawing:
    """Draw panels in two columns; a model looks the same in all of them."""
    columns = min(2, len(panels))
    rows = math.ceil(len(panels) / columns)
    drawing = Drawing(figsize=(9.2, 2.9 * rows), layout="constrained")
    drawn: dict[str, Line2D] = {}
    for number, panel in enumerate(panels, start=1):
        axes = drawing.add_subplot(rows, columns, number)
        plots.quiet_axis(axes)
        axes.set(title=panel.title, xlabel=xlabel, ylabel=panel.unit)
        for name, points in panel.lines:
            if points and (RUN, name) in looks:
                curve = {**looks[RUN, name].curve, **style}
                (drawn[name],) = axes.plot(*zip(*points, strict=True), **curve)
    labels = [plots.legend_label(_short(name)) for name in drawn]
    drawing.legend(list(drawn.values()), labels, **_LEGEND_ABOVE)
    return drawing


def make_panel(suite: str, models: Sequence[Model]) -> Panel | None:
    """Return the scores of a suite in training, None where none was scored twice on common sets.

    A point is the mean over the data sets that every point has, and over the runs of its model,
    where all were scored.

    Args:
        suite: Its name.
        models: With what their runs scored in training.
    """
    results = [result for result in _results_in_training(models) if result.suite == suite]
    metric = next(iter([*scores.suite_of(suite).main_metrics, *ordered_metrics(results)]), "")

    def scored(of_epoch: Sequence[Result]) -> dict[str, float]:
        done = [result for result in of_epoch if result.suite == suite and result.status == DONE]
        values = {result.dataset: result.metrics.get(metric) for result in done}
        return {name: value for name, value in values.items() if value is not None}

    grown = {
        model.name: [
            {epoch: found for epoch, results in run.epochs.items() if (found := scored(results))}
            for run in model.runs
        ]
        for model in models
    }
    grown = {name: runs for name, runs in grown.items() if all(runs)}
    points = [values for runs in grown.values() for run in runs for values in run.values()]
    sets = [name for name in points[0] if all(name in p for p in points)] if points else []
    if not sets:
        return None
    lines: list[Line] = [
        (
            name,
            [
                (epoch, 100 * statistics.fmean(run[epoch][one] for run in runs for one in sets))
                for epoch in runs[0]
                if all(epoch in run for run in runs)
            ],
        )
        for name, runs in grown.items()
    ]
    if max(len(curve) for _, curve in lines) < 2:
        return None
    num_members = len({result.dataset for result in results})
    of = "" if len(sets) == num_members else f" of {num_members}"
    title = f"{_short(scores.suite_of(suite).title)}, {len(sets)}{of} set"
    unit = f"{_short(results_table.metric_label(suite, metric))}, percent"
    return Panel(title if num_members == 1 else f"{title}s", unit, lines)


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
        color, marker, line = plots.COLORS[n], plots.MARKERS[n], plots.LINES[n]
        looks[entry.kind, entry.name] = {
            # Grays are too light and too alike for lines.
            PUBLISHED: Look(plots.GRAYS[n], "", plots.COLORS[-1 - n], marker, line, 1.0),
            RUN: Look(color, plots.HATCHES[n], color, marker, line, 2.0),
            CHANCE: Look(INK, "", INK, "_", ":", 1.2),
        }[entry.kind]
    return looks


def _short(name: str) -> str:
    name = plain(name)
    return name if len(name) <= _MAX_NAME else f"{name[:_MAX_NAME]}..."


def _title(family: Family, sets: Collection[str]) -> str:
    return f"{family.words[0].upper()}{family.words[1:]}: {len(sets)}"


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
    axes: Any, entries: Sequence[Entry], looks: Looks, sets: tuple[frozenset[str], ...]
) -> None:
    """Draw rows on polar axes, each direction with a scale of its own."""
    parts = list(zip(AXES, sets, strict=True))
    values = [[float(percent(axis.mean_over(e, of))) for axis, of in parts] for e in entries]
    limits = [_limits(column) for column in zip(*values, strict=True)]
    around = [2 * math.pi * number / len(AXES) for number in range(len(AXES) + 1)]
    ends = zip(AXES, limits, strict=True)
    names = [f"{axis.title}\n{low:g} to {high:g}" for axis, (low, high) in ends]
    axes.set_theta_zero_location("N")
    axes.set_theta_direction(-1)
    # The lowest value stands off the center, where all directions meet.
    axes.set(ylim=(-1 / 3, 1), yticks=(0, 0.5, 1), yticklabels=())
    axes.set(xticks=around[:-1], xticklabels=names)
    axes.tick_params(pad=20, labelsize=8)
    axes.grid(color=plots.FAINT, linewidth=0.8)
    axes.spines["polar"].set_visible(False)
    for entry, row in zip(entries, values, strict=True):
        places = zip(row, limits, strict=True)
        radii = [(value - low) / (high - low) for value, (low, high) in places]
        label = f"{_label(entry)}: {', '.join(f'{value:.1f}' for value in row)}"
        style, zorder = looks[entry.kind, entry.name].curve, 4 if entry.kind == RUN else 3
        axes.plot(around, [*radii, radii[0]], **style, label=label, zorder=zorder)
    title = ", ".join(axis.title.lower() for axis in AXES)
    below: dict[str, Any] = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.05), "fontsize": 8}
    axes.legend(handlelength=3, title=title, title_fontsize=8, **below)


def _limits(values: Sequence[float]) -> tuple[float, float]:
    """Return round ends of an axis with some room around the values."""
    spread = max(values) - min(values)
    step = 5 if spread > 10 else 1
    low = max(0, step * math.floor((min(values) - 0.1 * spread) / step))
    high = min(100, step * math.ceil((max(values) + 0.1 * spread) / step))
    return low, max(high, low + step)


def _draw_costs(
    axes: Axes, points: Sequence[Point], looks: Looks, label: str, units: dict[str, float]
) -> None:
    plots.quiet_axis(axes)
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
    safe = re.sub(r"[^\w-]+", "-", name, flags=re.ASCII)[-_MAX_NAME:]
    if safe != name:
        # Of two names nothing else may be left.
        safe += f"-{zlib.crc32(name.encode('utf-8', 'surrogatepass')):08x}"
    return Figure.of(drawing, safe, alt, caption, mark=MARK)
