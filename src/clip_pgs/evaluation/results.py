"""Results as files: one JSON per data set, and one CSV of them all."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

DONE, MISSING, FAILED = "done", "missing", "failed"
CSV_NAME = "results.csv"

_TEXT_COLUMNS = {"suite", "dataset", "status", "error", "model", "pretrained", "weights_digest"}
_OTHER_COLUMNS = {"samples", "seconds", "date", "task", "location", "language"}
_REQUIRED = {"suite", "dataset", "status", "samples", "model", "weights_digest"}


@dataclass(frozen=True)
class Result:
    """What came of one data set.

    The fields `dataset`, `model`, `pretrained`, `task`, `metrics` and `language` are those of
    clip_benchmark's own result files, so that its tools read these too.

    Attributes:
        suite: Such as "zeroshot-classification".
        dataset: Name of the data set.
        status: "done", "missing" or "failed".
        metrics: clip_benchmark's metrics, in [0, 1]; None where one is not defined.
        samples: Number of images scored.
        error: Why the data set is missing or what failed, or None.
        seconds: Wall time.
        task: clip_benchmark's name of the task.
        location: Folder or URL of the data set.
        details: Whatever explains a number: the regularisation of a probe, ties, ...
        model: Short name of the model.
        pretrained: Where its weights came from.
        weights_digest: SHA-256 of the weights; see `weights_digest`.
        identity: SHA-256 of all that the numbers depend on; see `Identity`. Empty where unknown.
        settings: Device, precision and batch size.
        versions: Of the packages that the numbers depend on.
        date: When the data set was finished, UTC, ISO 8601.
        language: Of class names and prompts.
    """

    suite: str
    dataset: str
    status: str
    metrics: dict[str, float | None]
    samples: int
    error: str | None
    seconds: float
    task: str
    location: str
    model: str
    pretrained: str
    weights_digest: str
    details: dict[str, Any] = field(default_factory=dict)
    identity: str = ""
    settings: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    date: str = ""
    language: str = "en"


def write_result(result: Result, path: Path) -> None:
    """Write one result as JSON; an interrupted write leaves no half file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".part")
    unfinished.write_text(json.dumps(asdict(result), indent=2) + "\n", encoding="utf-8")
    unfinished.replace(path)


def read_results(folder: Path) -> list[Result]:
    """Read the results of a folder, in the order of their file names; skip other JSON files."""
    return [result for _, result in result_files(folder)]


def result_files(folder: Path) -> list[tuple[Path, Result]]:
    """Return the result files of a folder with what they hold, in the order of their names."""
    read = ((path, read_result(path)) for path in sorted(folder.glob("*.json")))
    return [(path, result) for path, result in read if result is not None]


def read_result(path: Path) -> Result | None:
    """Read one result; None if the file is not there or is no result."""
    try:
        content = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError):
        return None
    if not isinstance(content, dict) or "weights_digest" not in content:
        return None
    names = {column.name for column in fields(Result)}
    return Result(**{name: content[name] for name in names & content.keys()})


def write_csv(results: Iterable[Result], path: Path) -> None:
    """Write results as a table, a row each; metrics stay in [0, 1], and empty where undefined."""
    results = list(results)
    metric_names = ordered_metrics(results)
    before = ("suite", "dataset", "status", "samples")
    after = ("error", "model", "pretrained", "weights_digest", "seconds", "date")
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow([*before, *metric_names, *after])
        for result in results:
            metrics = [result.metrics.get(name) for name in metric_names]
            start = [getattr(result, name) for name in before]
            writer.writerow([*start, *metrics, *(getattr(result, name) for name in after)])


def read_csv(path: Path) -> list[Result]:
    """Read what `write_csv` wrote; what only the JSON files tell stays blank.

    Raises:
        ValueError: If the file is no such table, or has no row.
    """
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    if not rows or not rows[0].keys() >= _REQUIRED:
        raise ValueError(
            f"{path} is no table of an evaluation; it needs a row, and the columns "
            f"{', '.join(sorted(_REQUIRED))}"
        )
    metric_names = rows[0].keys() - _TEXT_COLUMNS - _OTHER_COLUMNS
    try:
        return [
            Result(
                suite=row["suite"],
                dataset=row["dataset"],
                status=row["status"],
                metrics={name: float(row[name]) for name in sorted(metric_names) if row[name]},
                samples=int(row["samples"]),
                error=row.get("error") or None,
                seconds=float(row.get("seconds") or 0),
                task=row["suite"].replace("-", "_"),
                location="",
                model=row["model"],
                pretrained=row.get("pretrained") or "",
                weights_digest=row["weights_digest"],
                date=row.get("date") or "",
            )
            for row in rows
        ]
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path} is no table of an evaluation: {error}") from error


def ordered_metrics(results: Iterable[Result]) -> list[str]:
    """Return the metrics of some results: text before image retrieval, R@5 before R@10."""

    def rank(metric: str) -> tuple[bool, str, int]:
        stem, _, k = metric.partition("@")
        return not stem.startswith("text"), stem, int(k or 0)

    return sorted({name for result in results for name in result.metrics}, key=rank)
