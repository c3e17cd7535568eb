"""What a study found: numbers of its runs, tables, plots and one page, from what lies there."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from datetime import datetime, timezone
from functools import cached_property
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure as Drawing
from matplotlib.ticker import FuncFormatter

from clip_pgs import plots
from clip_pgs.common import as_plain, changed_values
from clip_pgs.evaluation.report.command import FIGURES_NAME, page_templates
from clip_pgs.evaluation.results import DONE, result_files
from clip_pgs.files import MAX_RUN_FILE_BYTES, read_json_object, write_json, write_text
from clip_pgs.study.plan import (
    CSV_NAME,
    FIRST_COLUMNS,
    HTML_NAME,
    JSON_NAME,
    LAST_COLUMNS,
    MARKDOWN_NAME,
    PROTOCOL_NAME,
    UNMASKED,
    Study,
    difference_name,
    evaluate_formula,
    named_values,
    read_options,
)
from clip_pgs.study.record import Record, Spent, option_changes, read_record, read_spent
from clip_pgs.study.statistics import MIN_SEEDS, Mean, holm, mean_with_interval, sign_flip_p
from clip_pgs.tables import Cell, Table, counted, csv_text, percent, scaled

# Stands in every figure file.
_MARK = "clip-pgs study"
# What a study remembers of its runs, by arm and seed.
Records = Mapping[tuple[str, int], Record]


@dataclass(frozen=True)
class Row:
    """An arm evaluated in one way.

    Attributes:
        arm: Its name.
        evaluation: The way's name.
        values: Metrics in [0, 1] by seed, those seeds alone that have all that is defined: acc5 of
            four classes is not, and then no seed has it.
        spent: What training took, by seed.
        flops_per_image: Operations of encoding an image at inference; None where unknown.
        lacking: Why a seed is left out, by seed.
    """

    arm: str
    evaluation: str
    values: dict[int, dict[str, float]]
    spent: dict[int, Spent]
    flops_per_image: float | None
    lacking: dict[int, str]

    @property
    def name(self) -> str:
        """How tables call it."""
        return f"{self.arm} | {self.evaluation}"

    def mean_of(self, fact: str) -> float | None:
        """Return the mean of "flops" or "seconds" of training over the seeds, None if unknown."""
        values = [getattr(spent, fact) for spent in self.spent.values()]
        known = [value for value in values if value is not None]
        return sum(known) / len(known) if known else None

    @cached_property
    def means(self) -> dict[str, Mean]:
        """Metrics' means over the seeds; none where no seed is there."""
        by_name: dict[str, list[float]] = {}
        for said in self.values.values():
            for name, value in said.items():
                by_name.setdefault(name, []).append(value)
        return {name: mean_with_interval(values) for name, values in by_name.items()}


@dataclass(frozen=True)
class Comparison:
    """A row less a reference on one metric, seed by seed.

    Attributes:
        row: The row's name.
        reference: The reference's name.
        metric: The metric's name.
        differences: By the seeds that both have.
        mean: Their mean.
        p: Of sign flips.
        p_holm: Corrected for the rows that are compared with this reference; None for metrics that
            are not the primary one.
    """

    row: str
    reference: str
    metric: str
    differences: dict[int, float]
    mean: Mean
    p: float
    p_holm: float | None = None


def keep_protocol(study: Study) -> dict[str, Any]:
    """Return what a study's file said at first, and note it as long as there is no run.

    Returns:
        `Study.protocol` of then, as far as it is known, and `before_first_run`: whether it was
        noted before there was a run.

    Raises:
        ValueError: If the note is damaged.
        OSError: If it cannot be written.
    """
    path, results = study.folder / PROTOCOL_NAME, study.folder / JSON_NAME
    is_before = next(study.folder.glob("*/seed_*"), None) is None
    if path.exists() and not is_before:
        return read_json_object(path, what=str(path), max_bytes=MAX_RUN_FILE_BYTES)
    protocol = study.protocol
    if results.exists() and not is_before:
        # An earlier version kept no note, and its results tell these.
        with suppress(ValueError):
            said = read_json_object(results, what=str(results), max_bytes=MAX_RUN_FILE_BYTES)
            protocol |= {
                name: said[name] for name in ("primary", "metrics", "seeds") if name in said
            }
    # As it is when it is read.
    noted = as_plain({"before_first_run": is_before, **protocol})
    write_json(path, noted)
    return noted


def _protocol_notes(study: Study) -> list[str]:
    """Return what is the primary metric, and how the file differs from what it said at first."""
    first = keep_protocol(study)
    is_before, metrics = first.get("before_first_run") is True, first.get("metrics")
    formula = metrics.get(study.primary) if isinstance(metrics, dict) else None
    is_first = (first.get("primary"), formula) == (study.primary, study.metrics[study.primary])
    named = ", named before the first run," if is_before and is_first else ""
    notes = [
        f"The primary metric{named} is {study.primary}; p is of exact sign flips of the paired "
        "differences, two-sided, and Holm's p corrects it for all rows compared with one "
        "reference. Intervals are 95 %, BCa bootstrap over seeds."
    ]
    changes = changed_values(first, study.protocol)
    if changes:
        since = "first run" if is_before else "first results"
        notes.append(
            f"The study's file was changed after its {since}: {', '.join(changes)}. A p holds of "
            "what was fixed beforehand."
        )
    return notes


def read_rows(study: Study, records: Records) -> list[Row]:
    """Read what there is of a study, row by row."""
    rows = []
    for arm, evaluation in study.rows:
        values: dict[int, dict[str, float]] = {}
        spent: dict[int, Spent] = {}
        flops: list[float] = []
        lacking: dict[int, str] = {}
        for seed in study.seeds:
            # Only what the record has is of these weights and as the study says.
            record = records[arm, seed]
            if evaluation not in record.evaluations:
                is_trained = record.spent is not None
                lacking[seed] = "not evaluated" if is_trained else "not trained to the end"
                if record.failed:
                    lacking[seed] = "failed"
                continue
            folder = study.results(arm, seed, evaluation)
            read = result_files(folder)
            results = [result for _, result in read]
            found = {
                (result.suite, result.dataset, name): value
                for result in results
                if result.status == DONE
                for name, value in result.metrics.items()
            }
            metrics = {name: evaluate_formula(said, found) for name, said in study.metrics.items()}
            known = {name: value for name, value in metrics.items() if value is not None}
            # What is not defined is in a result, as None.
            undefined = {
                n for n, said in study.metrics.items() if {*named_values(said)} <= {*found}
            }
            lacks = metrics.keys() - known.keys() - (undefined - {study.primary})
            if not lacks:
                values[seed] = known
                spent[seed] = record.spent or read_spent(study.run(arm, seed))
            else:
                lacking[seed] = f"no value of {', '.join(n for n in metrics if n in lacks)}"
                damaged = sorted({*folder.glob("[!.]*.json")} - {path for path, _ in read})
                if damaged:
                    names = ", ".join(path.name for path in damaged)
                    lacking[seed] += f", as {names} in {folder.name} is no result"
            flops += [f for r in results if (f := r.flops_per_image) is not None]
        mean_flops = sum(flops) / len(flops) if flops else None
        rows.append(Row(arm, evaluation, values, spent, mean_flops, lacking))
    return rows


def compare(study: Study, rows: Sequence[Row]) -> list[Comparison]:
    """Compare every row with each reference: an arm evaluated in its first way."""
    found = []
    for arm in study.references:
        reference = next(row for row in rows if row.arm == arm)
        others = [
            row for row in rows if row is not reference and row.values.keys() & reference.values
        ]
        for metric in study.metrics:
            compared = []
            for row in others:
                # Of scores that are equal, single precision leaves a difference of 1e-9; + 0.0
                # takes the sign of zero.
                differences = {
                    seed: round(row.values[seed][metric] - reference.values[seed][metric], 7) + 0.0
                    for seed in row.values
                    if metric in row.values[seed] and metric in reference.values.get(seed, ())
                }
                if not differences:
                    continue
                said = list(differences.values())
                mean, p = mean_with_interval(said), sign_flip_p(said)
                names = row.name, reference.name, metric
                compared.append(Comparison(*names, differences, mean, p))
            if metric == study.primary:
                corrected = holm([comparison.p for comparison in compared])
                compared = [
                    replace(comparison, p_holm=p)
                    for comparison, p in zip(compared, corrected, strict=True)
                ]
            found += compared
    return found


def write_results(study: Study, *, command: str) -> tuple[Path, str]:
    """Write `results.json`, `results.csv`, `results.md`, `index.html` and `figures/`.

    Args:
        study: Whose folder it goes to.
        command: The command line that runs the study.

    Returns:
        The page, and what the tables lack, as a sentence; "" if nothing.

    Raises:
        OSError: If a file cannot be written.
    """
    # As runs are done: seed by seed.
    records = {
        (arm, seed): read_record(study.run(arm, seed)) for seed in study.seeds for arm in study.arms
    }
    rows = read_rows(study, records)
    comparisons = compare(study, rows)
    failed = [
        (f"{arm}, seed {seed}", record.failed)
        for (arm, seed), record in records.items()
        if record.failed
    ]
    notes = _notes(study, rows, comparisons, records)
    facts = _facts(study, rows, command)
    tables = [
        *([Table.of(["run", "reason"], failed, caption="Runs that failed.")] if failed else []),
        _means_table(study, rows),
        *(_differences_table(study, name, rows, comparisons) for name in _references(comparisons)),
    ]
    figures = _draw_all(study, rows)

    study.folder.mkdir(parents=True, exist_ok=True)
    plots.write_figures(figures, study.folder / FIGURES_NAME, mark=_MARK)
    content = {
        "study": study.name,
        "about": study.about,
        "facts": facts,
        "primary": study.primary,
        "metrics": study.metrics,
        "seeds": study.seeds,
        "rows": [_row_entry(row) for row in rows],
        "comparisons": [asdict(comparison) for comparison in comparisons],
        "failed": [{"run": run, "reason": reason} for run, reason in failed],
        "notes": notes,
    }
    write_json(study.folder / JSON_NAME, content)
    header, lines = _csv_rows(study, rows, comparisons)
    write_text(study.folder / CSV_NAME, csv_text(header, lines))
    shown = {
        "study": study,
        "notes": notes,
        "facts": facts,
        "tables": tables,
        "seeds_table": _seeds_table(study, rows, comparisons),
        "figures": figures,
    }
    templates = page_templates("clip_pgs.study", "clip_pgs.evaluation.report")
    for name, form in ((MARKDOWN_NAME, "md"), (HTML_NAME, "html")):
        text = templates.get_template(f"study.{form}.jinja").render(shown)
        write_text(study.folder / name, re.sub(r"\n{3,}", "\n\n", text))
    return study.folder / HTML_NAME, _lack(rows)


def _references(comparisons: Iterable[Comparison]) -> list[str]:
    return list(dict.fromkeys(comparison.reference for comparison in comparisons))


def _notes(
    study: Study, rows: Sequence[Row], comparisons: Sequence[Comparison], records: Records
) -> list[str]:
    """Return what must be known to read the tables, as sentences."""
    notes = _protocol_notes(study)
    fewest = min((len(said.differences) for said in comparisons), default=0)
    if comparisons and fewest < MIN_SEEDS:
        notes.append(
            f"Some rows have {counted(fewest, 'paired seed')}: with fewer than {MIN_SEEDS} no p "
            "below 0.05 is possible, and such a row carries no claim."
        )
    notes += filter(None, [_lack(rows)])
    has_rows = any(row.values for row in rows)
    blank = [n for n in study.metrics if has_rows and not any(n in row.means for row in rows)]
    if blank:
        notes.append(f"Blank: {', '.join(blank)}, which is not defined on its data sets.")
    by_run = {(arm, seed): records[arm, seed] for arm in study.arms for seed in study.seeds}
    trained = {run: " then ".join(said.code) for run, said in by_run.items() if said.code}
    evaluated = {
        (f"{arm} | {way}", seed): (done, study.evaluate_arguments(arm, way))
        for (arm, seed), said in by_run.items()
        for way, done in said.evaluations.items()
        if way in study.arms[arm].evaluations
    }
    for part, digests in (
        ("trained by the same code", trained),
        ("evaluated by the same code", {run: done.code for run, (done, _) in evaluated.items()}),
        (
            "evaluated on the same data",
            {run: done.data[:12] for run, (done, _) in evaluated.items() if done.data},
        ),
    ):
        by_digest = _grouped(digests)
        if len(by_digest) > 1:
            most = max(by_digest, key=lambda digest: len(by_digest[digest]))
            others = [f"{one}: {_named(runs)}" for one, runs in by_digest.items() if one != most]
            notes.append(f"Not all runs were {part} ({most}). {'. '.join(others)}.")
    otherwise = [run for run, (done, flags) in evaluated.items() if done.flags != flags]
    if otherwise:
        notes.append(f"Evaluated with other flags than the study's: {_named(otherwise)}.")
    # What was run may be older than the study's file, and nobody asked about it yet.
    options = read_options(study)
    kept, trained_on = {}, {}
    for (arm, seed), said in by_run.items():
        meant = replace(options[arm], seed=seed)
        changes = option_changes(meant, study.run(arm, seed), files=None)
        kept[arm, seed] = ", ".join(dict.fromkeys([*changes, *said.accepted]))
        trained_on[arm, seed] = ", ".join(said.trained_under)
    for what, changed in (
        ("Kept although the study means otherwise", kept),
        ("Trained on otherwise than they began", trained_on),
    ):
        groups = _grouped(changed).items()
        notes += [f"{what} ({changes}): {_named(runs)}." for changes, runs in groups if changes]
    return notes


def _lack(rows: Sequence[Row]) -> str:
    """Say which runs are not in the tables and why, "" if all are."""
    reasons = {(row.name, seed): why for row in rows for seed, why in row.lacking.items()}
    parts = [f"{_named(runs)} ({why})" for why, runs in _grouped(reasons).items()]
    return f"Not in the tables: {'; '.join(parts)}." if parts else ""


_Run = tuple[str, int]  # an arm, or one of its evaluations, and a seed


def _grouped(said: Mapping[_Run, str]) -> dict[str, list[_Run]]:
    """Return the runs of which the same is said."""
    groups: dict[str, list[_Run]] = {}
    for run, text in said.items():
        groups.setdefault(text, []).append(run)
    return groups


def _named(runs: Iterable[_Run]) -> str:
    """Name runs, those of an arm together."""
    seeds: dict[str, list[str]] = {}
    for arm, seed in runs:
        seeds.setdefault(arm, []).append(str(seed))
    return "; ".join(
        f"{arm}, {'seed' if len(some) == 1 else 'seeds'} {', '.join(some)}"
        for arm, some in seeds.items()
    )


def _facts(study: Study, rows: Sequence[Row], command: str) -> dict[str, str]:
    runs = {(row.arm, seed): spent for row in rows for seed, spent in row.spent.items()}
    hardware = sorted({spent.hardware for spent in runs.values() if spent.hardware})
    seconds = sum(spent.seconds or 0.0 for spent in runs.values())
    return {
        "command": command,
        "date": datetime.now(timezone.utc).date().isoformat(),
        "hardware": ", ".join(hardware) or "unknown",
        "minutes of training in all": f"{seconds / 60:.0f}",
        "arms": ", ".join(f"{arm.name} ({json.dumps(arm.train)})" for arm in study.arms.values()),
    }


def _row_entry(row: Row) -> dict[str, Any]:
    return {
        "arm": row.arm,
        "evaluation": row.evaluation,
        "seeds": row.values,
        "means": {name: asdict(mean) for name, mean in row.means.items()},
        "training_flops": row.mean_of("flops"),
        "training_seconds": row.mean_of("seconds"),
        "flops_per_image": row.flops_per_image,
    }


def _shown(mean: Mean | None, *, is_difference: bool = False) -> Cell:
    """Return a mean with its interval, in percent."""
    if mean is None:
        return Cell(None)
    sign = "+" if is_difference and mean.mean > 0 else ""
    interval = ""
    if mean.low is not None and mean.high is not None:
        interval = f"[{percent(mean.low)}, {percent(mean.high)}]"
    return Cell(mean.mean, f"{sign}{percent(mean.mean)}", interval)


def _means_table(study: Study, rows: Sequence[Row]) -> Table:
    header = ["arm | evaluation", "seeds", "training FLOPs", "FLOPs per image", "minutes"]
    lines = [
        [
            row.name,
            len(row.values),
            Cell(row.mean_of("flops"), scaled(row.mean_of("flops"))),
            Cell(row.flops_per_image, scaled(row.flops_per_image)),
            Cell(seconds, "" if seconds is None else f"{seconds / 60:.1f}"),
            *(_shown(row.means.get(name)) for name in study.metrics),
        ]
        for row in rows
        for seconds in [row.mean_of("seconds")]
    ]
    return Table.of(
        [*header, *study.metrics],
        lines,
        caption="Means over seeds with 95 % intervals, in percent; FLOPs and minutes per run.",
    )


def _ratio(value: float | None, reference: float | None) -> Cell:
    ratio = value / reference if value is not None and reference else None
    return Cell(ratio, None if ratio is None else f"{ratio:.2f}")


def _differences_table(
    study: Study, reference: str, rows: Sequence[Row], comparisons: Sequence[Comparison]
) -> Table:
    by_name = {row.name: row for row in rows}
    own = [said for said in comparisons if said.reference == reference]
    metrics = [study.primary, *(name for name in study.metrics if name != study.primary)]
    lines, remarks = [], []
    for name in dict.fromkeys(said.row for said in own):
        by_metric = {said.metric: said for said in own if said.row == name}
        primary = by_metric[study.primary]
        cells: list[Any] = [
            name,
            len(primary.differences),
            _ratio(by_name[name].mean_of("flops"), by_name[reference].mean_of("flops")),
            _ratio(by_name[name].flops_per_image, by_name[reference].flops_per_image),
        ]
        for metric in metrics:
            if metric not in by_metric:
                cells += [None, None]
                continue
            said = by_metric[metric]
            cells += [_shown(said.mean, is_difference=True), Cell(said.p, f"{said.p:.3f}")]
            if metric == study.primary:
                cells.append(Cell(said.p_holm, f"{said.p_holm:.3f}"))
        for remark in dict.fromkeys(said.mean.remark for said in by_metric.values()):
            told = [n for n in metrics if n in by_metric and by_metric[n].mean.remark == remark]
            which = "" if len(told) == len(by_metric) else f", {', '.join(told)}"
            if remark:
                remarks.append(f"{name}{which}: {remark}.")
        lines.append(cells)
    header = ["arm | evaluation", "pairs", "training FLOPs", "FLOPs per image"]
    for metric in metrics:
        header += [metric, "p"] + (["p (Holm)"] if metric == study.primary else [])
    return Table.of(
        header,
        lines,
        caption=f"Difference to {reference}, paired by seed: mean with 95 % interval, in points; "
        "FLOPs as multiples of its own.",
        notes=remarks,
    )


def _csv_rows(
    study: Study, rows: Sequence[Row], comparisons: Sequence[Comparison]
) -> tuple[list[str], list[list[Any]]]:
    """Return a line per row and seed: metrics, and their differences to each reference."""
    references = _references(comparisons)
    header = [*FIRST_COLUMNS, *study.metrics]
    header += [difference_name(metric, name) for name in references for metric in study.metrics]
    header += LAST_COLUMNS
    found = {(said.row, said.reference, said.metric): said.differences for said in comparisons}
    lines = []
    for row in rows:
        for seed, values in row.values.items():
            line = [row.arm, row.evaluation, seed, *(values.get(name) for name in study.metrics)]
            line += [
                found.get((row.name, name, metric), {}).get(seed)
                for name in references
                for metric in study.metrics
            ]
            spent = row.spent[seed]
            lines.append([*line, spent.flops, spent.seconds, row.flops_per_image])
    return header, lines


def _seeds_table(study: Study, rows: Sequence[Row], comparisons: Sequence[Comparison]) -> Table:
    header, lines = _csv_rows(study, rows, comparisons)
    shown, first = header[: -len(LAST_COLUMNS)], len(FIRST_COLUMNS)
    cells = [
        [*line[:first], *(Cell(value, percent(value)) for value in line[first : len(shown)])]
        for line in lines
    ]
    return Table.of(shown, cells, caption="Every run: metrics and differences, in percent.")


def _draw_all(study: Study, rows: Sequence[Row]) -> list[plots.Figure]:
    """Return name, description, SVG and PNG of each plot that there is something to draw of."""
    axes = (
        ("training_flops", "training FLOPs", {row.name: row.mean_of("flops") for row in rows}),
        ("inference_flops", "FLOPs per image", {row.name: row.flops_per_image for row in rows}),
    )
    drawn = []
    for name, label, costs in axes:
        points = [
            (row, cost, mean)
            for row in rows
            if (cost := costs[row.name]) and (mean := row.means.get(study.primary)) is not None
        ]
        if points:
            alt = f"{study.primary} against {label}, mean and 95 % interval over seeds"
            drawn.append(_draw(study, f"{study.primary}_by_{name}", alt, label, points))
    return drawn


def _draw(
    study: Study, name: str, alt: str, label: str, points: Sequence[tuple[Row, float, Mean]]
) -> plots.Figure:
    arms = list(dict.fromkeys(row.arm for row, *_ in points))
    with plots.plot_style():
        drawing = Drawing(figsize=(6.2, 3.6), layout="constrained")
        axes = drawing.subplots()
        plots.quiet_axis(axes)
        for row, cost, mean in points:
            look = plots.look_of(arms.index(row.arm))
            is_first = row.evaluation == next(iter(study.arms[row.arm].evaluations))
            if mean.low is not None and mean.high is not None:
                ends = [100 * mean.low, 100 * mean.high]
                axes.plot([cost, cost], ends, color=look["color"], marker="_", linewidth=1)
            axes.plot(
                cost,
                100 * mean.mean,
                **{**look, "linestyle": "none"},
                markerfacecolor=look["color"] if is_first else "white",
                label=plots.legend_label(row.arm if row.evaluation == UNMASKED else row.name),
            )
        # Equal costs are the usual case: the last arm's mark and bars stay inside.
        axes.set_xlim(0, 1.1 * max((cost for _, cost, _ in points), default=0.0) or 1)
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: scaled(value)))
        axes.set_xlabel(label)
        axes.set_ylabel(f"{study.primary}, percent")
        drawing.legend(loc="outside right upper")
        return plots.Figure.of(drawing, name, alt, alt, mark=_MARK)
