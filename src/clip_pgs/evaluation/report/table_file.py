"""The report's numbers for programs: `results.csv`, a row per number, in [0, 1]."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator
from typing import Any

from clip_pgs.evaluation.report.content import Report
from clip_pgs.evaluation.report.entries import Family, published_entries
from clip_pgs.evaluation.report.families import PAPER_SETS
from clip_pgs.evaluation.report.models import Model
from clip_pgs.evaluation.report.tables import PUBLISHED, RUN, Entry
from clip_pgs.evaluation.results import DONE

COLUMNS = (
    "kind",
    "model",
    "suite",
    "sets",
    "name",
    "is_average",
    "metric",
    "status",
    "value",
    "spread",
    "runs",
    "printed",
    "source",
    "training_data",
    "samples_seen",
    "flops",
    "wall_seconds",
    "masking",
    "seeds",
    "reason",
)


def write_table(report: Report) -> str:
    """Return all scores of a report as CSV.

    Rows have `kind` "published", "run" or "chance", and `sets` "paper" or "other". A model over
    several seeds has the mean as `value` and the standard deviation as `spread`. A data set without
    a result has a row with its `status` and `reason`.
    """
    stream = io.StringIO()
    writer = csv.DictWriter(stream, COLUMNS, restval="", lineterminator="\n")
    writer.writeheader()
    models = {model.name: model for model in report.models}
    for family in report.families:
        for entry in family.entries:
            writer.writerows(_scores(entry, family, models, report))
    if not any(family.is_paper for family in report.families):
        published = Family(PAPER_SETS, tuple(published_entries(report.paper)), {})
        for entry in published.entries:
            writer.writerows(_scores(entry, published, models, report))
    for model in report.models:
        writer.writerows(_undone(model))
    return stream.getvalue()


def _scores(
    entry: Entry, family: Family, models: dict[str, Model], report: Report
) -> Iterator[dict[str, Any]]:
    facts = _facts(models[entry.name]) if entry.kind == RUN else {}
    if entry.kind == PUBLISHED:
        facts = {"source": report.paper.address, "training_data": report.paper.training}
    for place, score in entry.scores.items():
        yield {
            "kind": entry.kind,
            "model": entry.name,
            "suite": place.suite,
            "sets": family.name,
            "name": place.name,
            "is_average": int(place.is_average),
            "metric": place.metric,
            "status": DONE,
            "value": score.mean,
            "spread": score.spread,
            "runs": score.num_runs,
            "printed": entry.printed.get(place[:2]) if place.is_average else None,
            **facts,
        }


def _undone(model: Model) -> Iterator[dict[str, Any]]:
    for run in model.runs:
        for result in run.results:
            if result.status != DONE:
                yield {
                    "kind": RUN,
                    "model": run.name,
                    "suite": result.suite,
                    "name": result.dataset,
                    "is_average": 0,
                    "status": result.status,
                    "reason": result.error,
                    **_facts(model),
                }


def _facts(model: Model) -> dict[str, Any]:
    training = model.runs[0].training
    return {
        "source": " ".join(dict.fromkeys(run.results[0].pretrained for run in model.runs)),
        "training_data": training.data,
        "samples_seen": model.samples,
        "flops": model.flops,
        "wall_seconds": model.seconds,
        "masking": training.masking,
        "seeds": " ".join(map(str, model.seeds)),
    }
