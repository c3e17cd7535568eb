"""Results as tables, for the terminal and for a report's page, Markdown and `results.csv`."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any

from clip_pgs import tables
from clip_pgs.evaluation.report import scores
from clip_pgs.evaluation.report.gather import Model, Run
from clip_pgs.evaluation.report.published import Paper
from clip_pgs.evaluation.report.scores import RUN, Average, Entry, Family, Place, Score, suite_of
from clip_pgs.evaluation.results import DONE, Result, ordered_metrics
from clip_pgs.tables import BLANK, PLUS_MINUS, PUBLISHED, Cell, Column, Row, Table, percent

# The headings of a report's results.csv.
CSV_COLUMNS = (
    *("kind", "model", "suite", "sets", "name", "is_average", "metric", "status", "value"),
    *("spread", "runs", "printed", "source", "training_data", "samples_seen", "flops"),
    *("wall_seconds", "masking", "seeds", "reason", "num_sets", "of_sets"),
    *("inference_masking", "flops_per_image", "history"),
)
# Shorter, as a terminal has 80 columns.
_SHORT_LABELS = {"acc": "acc", "acc1": "acc1", "acc5": "acc5", "mean_per_class_recall": "recall"}
_COLUMN_TITLES = {
    ("imagenet1k", "acc1"): "ImageNet-1K zero-shot",
    ("imagenet1k", "linear_probe_acc1"): "ImageNet-1K linear probe",
}
# What the rounding of cells and average explains between them, 0.1 points.
_ROUNDING = 0.001 + 1e-9


def metric_label(suite: str, metric: str) -> str:
    """Return a metric's name for people."""
    return suite_of(suite).metrics.get(metric, metric)


def set_label(place: Place, places: Iterable[Place]) -> str:
    """Return a data set's name without the collection it comes from, or an average's.

    Args:
        place: Of the set or average.
        places: All that stand beside it; where another set's name ends alike, it is given in full.
    """
    if place.is_average:
        return average_label(place.name)
    last = place.name.rsplit("/", 1)[-1]
    names = {other.name for other in places if not other.is_average}
    return last if sum(name.rsplit("/", 1)[-1] == last for name in names) < 2 else place.name


def average_label(name: str) -> str:
    """Return an average's name for people."""
    words = name.replace("_", " ")
    return words.replace("id average", "ID average").replace("ood average", "OOD average")


def spread_text(spread: float | None) -> str:
    """Return a standard deviation in [0, 1] in percent, after a sign; "" for None."""
    return "" if spread is None else f"{PLUS_MINUS} {percent(spread)}"


def reason(result: Result) -> str:
    """Say why a result has no numbers."""
    return result.error or "no reason was written"


def format_table(results: Sequence[Result]) -> str:
    """Render the results of one model for a terminal, a block of lines per suite.

    Args:
        results: Results in the order to show them.

    Returns:
        Text that ends in a newline. Metrics are in percent; the averages of a suite stand below
        its sets, each over those that were done, and say what they lack.

    Raises:
        ValueError: If the results are those of several models.
    """
    shown = []
    for suite in dict.fromkeys(result.suite for result in results):
        members = [result for result in results if result.suite == suite]
        table = results_table(suite, members)
        if len(members) > 1:
            metrics = ordered_metrics(r for r in members if r.status == DONE)
            means = _average_rows(scores.averages(members), metrics, len(table.columns))
            table = replace(table, rows=[*table.rows, *means])
        labels = [column.heading for column in table.columns]
        labels += [row.cells[0].shown for row in table.rows]
        shown.append("\n".join([table.text().rstrip("\n"), *_meanings(suite, labels), ""]))
    return "\n".join(shown)


def _meanings(suite: str, labels: Iterable[str]) -> list[str]:
    """Return what the labels of a suite's table mean that do not say it themselves."""
    shown = list(labels)
    return [
        f"{label}: {meaning}"
        for label, meaning in suite_of(suite).meanings.items()
        if any(text == label or text.startswith(f"{label} (") for text in shown)
    ]


def results_table(
    suite: str, results: Sequence[Result], *, runs: Sequence[str] | None = None
) -> Table:
    """Return all metrics of a suite, a row per result; one without numbers says why.

    Args:
        suite: Its name.
        results: In order.
        runs: The run of each result, for a report: it has room for longer words and all details.
            None for a terminal's table of a single model.
    """
    done = [result for result in results if result.status == DONE]
    metrics, fact = ordered_metrics(done), suite_of(suite).fact
    if runs is None:
        labels = [_SHORT_LABELS.get(m.removeprefix("lp_"), metric_label(suite, m)) for m in metrics]
        header = [suite, *labels, *([fact] if fact else []), "samples"] if done else [suite, ""]
    else:
        unit = "pairs" if any("items" in result.details for result in results) else "images"
        header = ["run", "data set", *(metric_label(suite, m) for m in metrics), unit, "details"]
    rows = []
    for number, result in enumerate(results):
        cells = [Cell(name) for name in ([] if runs is None else [runs[number]])]
        cells.append(Cell(result.dataset))
        if result.status != DONE:
            rows.append(Row([*cells, Cell(f"{result.status}: {reason(result)}")]))
            continue
        cells += [_percent_cell(result.metrics.get(metric)) for metric in metrics]
        if runs is None and fact:
            value = result.details.get(fact)
            cells.append(Cell(value, f"{value:.3g}" if isinstance(value, float) else None))
        cells.append(Cell(result.samples, f"{result.samples:,}" if runs else None))
        if runs is not None:
            cells.append(Cell(_details(result)))
        rows.append(Row(cells))
    return Table([Column(label) for label in header], rows, f"{suite_of(suite).title}, percent")


def details_tables(runs: Sequence[Run]) -> list[Table]:
    """Return every metric of every run on every data set, a table per suite."""
    members = [(run.name, result) for run in runs for result in run.results]
    return [
        results_table(
            suite,
            [result for _, result in members if result.suite == suite],
            runs=[name for name, result in members if result.suite == suite],
        )
        for suite in scores.ordered_suites(result.suite for _, result in members)
    ]


def trouble_table(runs: Sequence[Run]) -> Table | None:
    """List what is missing or failed, with the reason; None where everything was done."""
    rows = [
        [run.name, r.suite, r.dataset, r.status, reason(r)]
        for run in runs
        for r in run.results
        if r.status != DONE
    ]
    header = ("model", "suite", "data set", "status", "reason")
    return Table.of(header, rows, caption="Data sets without a result") if rows else None


def provenance_table(runs: Sequence[Run]) -> Table:
    """List weights, dates and versions of each run."""
    rows = []
    for run in runs:
        newest = max(run.results, key=lambda result: result.date)
        facts = [
            ", ".join(f"{name} {value}" for name, value in part.items())
            for part in (newest.settings, newest.versions)
        ]
        seed = "" if run.training.seed is None else str(run.training.seed)
        rows.append([run.name, newest.pretrained, run.weights_digest, seed, newest.date, *facts])
    header = ("run", "weights", "SHA-256 of the weights", "seed", "evaluated (UTC)", "settings")
    return Table.of([*header, "versions"], rows, caption="Where the numbers come from")


def models_table(models: Sequence[Model]) -> Table:
    """List what stands behind each model."""
    header = ("model", "architecture", "training data", "samples seen", "FLOP", "wall time")
    rows = [
        [model.name, *(cell if cell.shown else Cell(None, "unknown") for cell in facts.values())]
        for model in models
        for facts in [_facts(model)]
    ]
    return Table.of(
        [*header, "hardware", "masking", "masking at inference", "FLOP per image", "seeds"],
        rows,
        caption="What stands behind each model",
        notes=[
            "Runs that differ only in their seed are one row; costs are means of a run.",
            *(f"{m.name} {'; '.join(m.training.history)}." for m in models if m.training.history),
        ],
    )


def _facts(model: Model) -> dict[str, Cell]:
    training, through = model.training, model.inference_masking
    samples, flops, seconds = map(model.mean, ("samples", "flops", "seconds"))
    flops_per_image = model.mean("flops_per_image")
    seeds = [str(seed) for seed in model.seeds]
    return {
        "architecture": Cell(training.architecture),
        "training_data": Cell(training.data),
        "samples_seen": Cell(samples, tables.scaled(samples)),
        "flops": Cell(flops, tables.scaled(flops)),
        "wall_seconds": Cell(seconds, tables.duration(seconds)),
        "hardware": Cell(training.hardware),
        "masking": Cell(training.masking),
        "inference_masking": Cell(through, through or "none"),
        "flops_per_image": Cell(flops_per_image, tables.scaled(flops_per_image)),
        "seeds": Cell(" ".join(seeds), ", ".join(seeds)),
    }


def suite_places(suite: str, entries: Sequence[Entry], *, order: Sequence[str]) -> list[Place]:
    """Return the places that the table of a suite shows: averages, then data sets.

    Args:
        suite: Its name.
        entries: The models; a place is shown if one of them has it.
        order: Names of data sets to start with; others follow as they come.
    """
    metrics = scores.shown_metrics(suite, entries)
    known = [place for entry in entries for place in entry.scores if place.suite == suite]
    sets = dict.fromkeys([*order, *(place.name for place in known if not place.is_average)])
    means = dict.fromkeys(place.name for place in known if place.is_average)
    # The average of a single set would repeat it.
    shown = means if len(sets) > 1 else []
    wanted = [Place(suite, name, metric, True) for name in shown for metric in metrics]
    wanted += [Place(suite, name, metric) for name in sets for metric in metrics]
    existing = set(known)
    return [place for place in wanted if place in existing]


def family_table(suite: str, family: Family, paper: Paper) -> Table:
    """Make the table of a suite on one family of data sets."""
    about = "no published row is about these data sets"
    if family.is_paper:
        about = f"published rows are from {paper.source(suite)}"
    caption, order = f"{suite_of(suite).title}, {suite_of(suite).unit}; {about}", family.sets
    return suite_table(suite, family.rows(suite), caption=caption, order=order.get(suite, []))


def suite_table(
    suite: str, entries: Sequence[Entry], *, caption: str, order: Sequence[str] = ()
) -> Table:
    """Make the table of a suite: published rows, then runs, then chance.

    Args:
        suite: Its name.
        entries: The models that have a score of it, in order.
        caption: What the table is about.
        order: Names of data sets to start with.
    """
    places = suite_places(suite, entries, order=order)
    columns = [Column("model")]
    cells: list[list[Cell]] = [[Cell(entry.name)] for entry in entries]
    for place in places:
        columns.append(column_of(place, places))
        members = num_members(place, entries)
        best = {kind: _best(place, kind, entries) for kind in (PUBLISHED, RUN)}
        for entry, row in zip(entries, cells, strict=True):
            row.append(_score_cell(entry, place, best.get(entry.kind), members))
        if place.is_average and any((suite, place.name) in entry.printed for entry in entries):
            columns.append(Column("as printed", group=columns[-1].group))
            for entry, row in zip(entries, cells, strict=True):
                row.append(_percent_cell(entry.printed.get((suite, place.name))))
    if any(suite in entry.ties for entry in entries):
        columns.append(Column("ties"))
        for entry, row in zip(entries, cells, strict=True):
            ties, items = entry.ties.get(suite, (None, 0))
            row.append(
                Cell(None, BLANK) if ties is None else Cell(ties, f"{ties:.0f}", f"of {items:,.0f}")
            )
    rows = [
        Row(row, kind=entry.kind, facts=entry.facts)
        for entry, row in zip(entries, cells, strict=True)
    ]
    notes = _notes(suite, entries, places)
    notes += [f"{text}." for text in _meanings(suite, (column.heading for column in columns))]
    return Table(columns, rows, caption, notes, facts_label="trained on")


def num_members(place: Place, entries: Iterable[Entry]) -> int:
    """Return how many data sets belong to an average, in one row or another."""
    return len({name for e in entries if place in e.scores for name in e.scores[place].members})


def is_partial(score: Score, place: Place, entries: Iterable[Entry]) -> bool:
    """Say whether a score is an average that leaves sets out, and so compares with no other."""
    return len(score.sets) < num_members(place, entries)


def column_of(place: Place, places: Sequence[Place]) -> Column:
    """Return the heading of a place among all that its suite shows, of one metric or several."""
    name = set_label(place, places)
    if len({other.metric for other in places}) == 1:
        return Column(name, is_average=place.is_average)
    return Column(metric_label(place.suite, place.metric), name, place.is_average)


def reference_tables(paper: Paper, *, without: Collection[str] = ()) -> list[Table]:
    """Return the paper's tables.

    Args:
        paper: The published figures.
        without: Suites whose published rows stand elsewhere in the report.
    """
    published = scores.published_family(paper)
    shown = []
    for suite in scores.ordered_suites(paper.sizes):
        if suite not in without:
            facts, order = suite_of(suite), list(paper.sizes[suite])
            caption = f"{facts.title}, {facts.unit}; published in {paper.source(suite)}"
            entries = published.rows(suite)
            shown.append(suite_table(suite, entries, caption=caption, order=order))
    times = [(m.name, m.relative_time) for m in paper.methods if m.relative_time is not None]
    rows = [Row([Cell(name), Cell(time, f"{time:g}")], PUBLISHED) for name, time in times]
    caption = f"Training time as a multiple of CLIP's; published in {paper.source('cost')}"
    shown.append(Table([Column("model"), Column("relative time")], rows, caption))
    places = dict.fromkeys(place for cells in paper.ablation.values() for place in cells)
    recalls = suite_of("zeroshot-retrieval").metrics
    labels = [_COLUMN_TITLES.get(p, f"{p[0]} {recalls.get(p[1], p[1])}") for p in places]
    rows = [
        Row([Cell(variant), *(_percent_cell(cells.get(place)) for place in places)], PUBLISHED)
        for variant, cells in paper.ablation.items()
    ]
    caption = f"Ablation, percent; published in {paper.source('ablation')}"
    return [*shown, Table([Column(label) for label in ("variant", *labels)], rows, caption)]


def scores_csv(models: Sequence[Model], families: Sequence[Family], paper: Paper) -> str:
    """Return all scores of a report as CSV, numbers in [0, 1].

    Rows have `kind` "published", "run" or "chance", and `sets` "paper" or "other". A model over
    several seeds has the mean as `value` and the standard deviation as `spread`; an average
    covers `num_sets` of the `of_sets` that belong to it. A data set without a result has a row
    with its `status` and `reason`.
    """
    if not any(family.is_paper for family in families):
        families = [*families, scores.published_family(paper)]
    facts = {model.name: _csv_facts(model) for model in models}
    published = {"source": paper.address, "training_data": paper.training}
    rows: list[dict[str, Any]] = []
    for family in families:
        for entry in family.entries:
            about = facts[entry.name] if entry.kind == RUN else {}
            about = published if entry.kind == PUBLISHED else about
            for place, score in entry.scores.items():
                row: dict[str, Any] = {"kind": entry.kind, "model": entry.name, "status": DONE}
                row |= {"sets": family.name, **place._asdict()}
                row |= {"value": score.mean, "spread": score.spread, "runs": score.num_runs}
                row["printed"] = entry.printed.get(place[:2]) if place.is_average else None
                row["num_sets"] = len(score.sets)
                row["of_sets"] = num_members(place, family.entries)
                rows.append({**row, **about})
    for model in models:
        for run in model.runs:
            for result in run.results:
                if result.status != DONE:
                    row = {"kind": RUN, "model": run.name, "status": result.status}
                    row |= {"suite": result.suite, "name": result.dataset, "is_average": 0}
                    rows.append({**row, "reason": reason(result), **facts[model.name]})
    return tables.csv_text(CSV_COLUMNS, [[row.get(name) for name in CSV_COLUMNS] for row in rows])


def _csv_facts(model: Model) -> dict[str, Any]:
    sources = dict.fromkeys(run.results[0].pretrained for run in model.runs)
    facts = {name: cell.value for name, cell in _facts(model).items()}
    history = "; ".join(model.training.history)
    return {"source": " ".join(sources), **facts, "history": history}


def _average_rows(
    means: Sequence[Average], metrics: Sequence[str], num_columns: int
) -> Iterator[Row]:
    by_name: dict[str, dict[str, Average]] = {}
    for mean in means:
        by_name.setdefault(mean.name, {})[mean.metric] = mean
    if "id_average" in by_name:
        # Of robustness the two are the same mean.
        del by_name["average"]
    for name, by_metric in by_name.items():
        # A metric may be undefined on some sets, such as acc5 on fewer than 5 classes.
        widest = max(by_metric.values(), key=lambda average: len(average.sets))
        # The parts of a suite are named by what they are about.
        label = average_label(name)
        label += f"{'' if label.endswith('average') else ' average'} ({_share(widest)})"
        cells = [Cell(label)]
        for metric in metrics:
            mean = by_metric.get(metric, widest)
            note = f"({_share(mean)})" if mean.sets != widest.sets else ""
            cells.append(_percent_cell(mean.value if metric in by_metric else None, note))
        yield Row(cells + [Cell(None)] * (num_columns - len(cells)))


def _share(mean: Average) -> str:
    num_sets, num_missing = len(mean.sets), len(mean.missing)
    return f"{num_sets} of {num_sets + num_missing}" if num_missing else str(num_sets)


def _percent_cell(value: float | None, note: str = "") -> Cell:
    return Cell(value, percent(value) or BLANK, note)


def _details(result: Result) -> str:
    return ", ".join(
        f"{name.replace('_', ' ')} {_plain(value)}"
        for name, value in result.details.items()
        if name != "items" and isinstance(value, (str, int, float))
    )


def _plain(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _best(place: Place, kind: str, entries: Sequence[Entry]) -> float | None:
    """Return the best number of a column as it is printed, so that equal ones tie."""
    known = [e.scores[place] for e in entries if e.kind == kind and place in e.scores]
    whole = [score for score in known if not is_partial(score, place, entries)]
    values = [float(percent(score.mean)) for score in whole]
    return max(values) if len(values) > 1 else None


def _score_cell(entry: Entry, place: Place, best: float | None, members: int) -> Cell:
    score = entry.scores.get(place)
    if score is None:
        return Cell(None, BLANK)
    notes = [] if score.spread is None else [spread_text(score.spread)]
    if score.num_runs < entry.num_runs:
        notes.append(f"({score.num_runs} of {entry.num_runs} seeds)")
    if len(score.sets) < members:
        notes.append(f"({len(score.sets)} of {members} sets)")
    text = percent(score.mean)
    is_best = float(text) == best and len(score.sets) == members
    return Cell(score.mean, text, " ".join(notes), is_best)


def _notes(suite: str, entries: Sequence[Entry], places: Sequence[Place]) -> list[str]:
    notes = []
    shown = [entry.scores[place] for entry in entries for place in places if place in entry.scores]
    if any(score.spread is not None for score in shown):
        notes.append(f"{PLUS_MINUS} is the standard deviation over seeds.")
    rivals = {PUBLISHED: "the best published row", RUN: "the best run"}
    best = [
        words for kind, words in rivals.items() if sum(entry.kind == kind for entry in entries) > 1
    ]
    if best:
        notes.append(f"Bold is {' and '.join(best)}.")
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
