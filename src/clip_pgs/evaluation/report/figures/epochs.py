"""How scores grew over training, from the evaluations that runs made of themselves."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from matplotlib.figure import Figure as MatplotlibFigure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from clip_pgs.evaluation.report.entries import Family
from clip_pgs.evaluation.report.figures.canvas import (
    Figure,
    finish,
    look_of,
    look_of_the_report,
    looks,
    quiet_axis,
)
from clip_pgs.evaluation.report.gather import Run
from clip_pgs.evaluation.report.models import Model
from clip_pgs.evaluation.report.tables import RUN
from clip_pgs.evaluation.results import DONE
from clip_pgs.evaluation.wording import (
    MAIN_METRICS,
    SUITE_TITLES,
    counted,
    metric_label,
)

_MAX_COLUMNS = 2

# The score of a run by completed epochs.
Curve = dict[int, float]


@dataclass(frozen=True)
class Panel:
    """What grew in one suite.

    Attributes:
        suite: Its name.
        sets: The data sets that every curve is the mean over.
        curves: By model: the means over its runs, where all of them were scored.
    """

    suite: str
    sets: tuple[str, ...]
    curves: dict[str, Curve]


def epochs_figure(models: Sequence[Model], families: Sequence[Family]) -> Figure | None:
    """Draw a curve per model and suite, None if no model was scored after two epochs.

    Args:
        models: With what their runs scored in training.
        families: The rows of the report, for the look of each model.
    """
    panels = [panel for suite in SUITE_TITLES if (panel := make_panel(suite, models)) is not None]
    if not panels or not families:
        return None
    entries = families[0].entries
    chosen = looks(entries)
    num_columns = min(_MAX_COLUMNS, len(panels))
    num_rows = -(-len(panels) // num_columns)
    lines: dict[str, Line2D] = {}
    with look_of_the_report():
        drawing = MatplotlibFigure(figsize=(9.2, 2.9 * num_rows), layout="constrained")
        for number, panel in enumerate(panels, start=1):
            axes = drawing.add_subplot(num_rows, num_columns, number)
            quiet_axis(axes)
            for entry in entries:
                curve = panel.curves.get(entry.name)
                if curve and entry.kind == RUN:
                    (lines[entry.name],) = axes.plot(
                        list(curve),
                        [100 * score for score in curve.values()],
                        **look_of(entry, chosen).line_options,
                        clip_on=False,
                    )
            axes.set_title(f"{SUITE_TITLES[panel.suite]}, {counted(len(panel.sets), 'set')}")
            axes.set_xlabel("epochs")
            axes.set_ylabel(f"{metric_label(MAIN_METRICS[panel.suite][0])}, percent")
            axes.set_ylim(bottom=0)
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        drawing.legend(
            list(lines.values()), list(lines), loc="outside upper left", ncols=4, columnspacing=1.4
        )
        return finish(
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
    metric = MAIN_METRICS[suite][0]
    scores = {
        model.name: [_scores(run, suite, metric) for run in model.runs]
        for model in models
        if all(_scores(run, suite, metric) for run in model.runs)
    }
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
    return Panel(suite, sets, curves) if max(map(len, curves.values())) > 1 else None


def _scores(run: Run, suite: str, metric: str) -> dict[int, dict[str, float]]:
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
