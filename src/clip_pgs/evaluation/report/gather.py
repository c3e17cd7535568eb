"""Find results: in run folders, evaluation folders, single result files and tables of them."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from clip_pgs.evaluation.report.training_facts import (
    OPTIONS_NAME,
    TrainingFacts,
    read_training_facts,
)
from clip_pgs.evaluation.results import Result, read_result, read_results

_TEXT_COLUMNS = {"suite", "dataset", "status", "error", "model", "pretrained", "weights_digest"}
_OTHER_COLUMNS = {"samples", "seconds", "date", "task", "location", "language"}
_REQUIRED = {"suite", "dataset", "status", "samples", "model", "weights_digest"}


@dataclass(frozen=True)
class Run:
    """One model as it was evaluated: one set of weights.

    Attributes:
        name: Of the model; with the start of the digest where two models share a name.
        results: A result per suite and data set.
        training: What is known of its training.
    """

    name: str
    results: tuple[Result, ...]
    training: TrainingFacts

    @property
    def weights_digest(self) -> str:
        """SHA-256 of the weights."""
        return self.results[0].weights_digest


def gather_runs(sources: Sequence[str | Path]) -> list[Run]:
    """Read results and what is known of the training behind them.

    Args:
        sources: Run folders (their `eval`), folders of result files, folders of such folders,
            result files (JSON) or tables (`results.csv`). Where two hold a result of the same
            weights on the same data set, the later date counts.

    Returns:
        One run per set of weights, in the order of the sources.

    Raises:
        ValueError: If a source does not exist, holds no result or cannot be read.
    """
    found: dict[str, dict[tuple[str, str], Result]] = {}
    folders: dict[str, Path] = {}
    for source in sources:
        for place, results in _read_source(Path(source)):
            for result in results:
                by_set = found.setdefault(result.weights_digest, {})
                earlier = by_set.get((result.suite, result.dataset))
                if earlier is None or earlier.date <= result.date:
                    by_set[result.suite, result.dataset] = result
                folders.setdefault(result.weights_digest, place)
    names = [next(iter(by_set.values())).model for by_set in found.values()]
    runs = []
    for digest, by_set in found.items():
        first = next(iter(by_set.values()))
        name = first.model if names.count(first.model) == 1 else f"{first.model} @{digest[:6]}"
        training = read_training_facts(
            _run_folder(folders[digest], first.pretrained), first.pretrained
        )
        runs.append(Run(name, tuple(by_set.values()), training))
    return runs


def _read_source(source: Path) -> list[tuple[Path, list[Result]]]:
    """Return the results of a source, with the folder that each part lies in."""
    if source.is_file():
        results = _read_csv(source) if source.suffix == ".csv" else _read_json(source)
        return [(source.parent, results)]
    if not source.is_dir():
        raise ValueError(f"there are no results at {source}: it does not exist")
    inside = sorted(path for path in source.iterdir() if path.is_dir() and path.name != "eval")
    places = [
        source,
        source / "eval",
        *(place for path in inside for place in (path, path / "eval")),
    ]
    parts = [(place, _read_folder(place)) for place in places if place.is_dir()]
    parts = [(place, results) for place, results in parts if results]
    if not parts:
        raise ValueError(f"{source} holds no results; evaluate first, `bash clip-test.sh RUN`")
    return parts


def _read_folder(folder: Path) -> list[Result]:
    try:
        results = read_results(folder)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{folder} holds a damaged result file: {error}") from error
    if _run_folder(folder, "") is None:
        return results
    # A run that was trained anew leaves the results of its old weights until they are redone.
    newest = max(results, key=lambda result: result.date, default=None)
    return [r for r in results if newest is not None and r.weights_digest == newest.weights_digest]


def _read_json(path: Path) -> list[Result]:
    try:
        result = read_result(path)
    except TypeError:
        result = None
    if result is None:
        raise ValueError(f"{path} is no result of an evaluation")
    return [result]


def _read_csv(path: Path) -> list[Result]:
    """Read a table of results; what only the JSON files tell stays blank."""
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


def _run_folder(place: Path, weights: str) -> Path | None:
    """Return the run that results belong to, by where they lie, else by their weights."""
    candidates = [place, place.parent, Path(weights).parent, Path(weights).parent.parent]
    for folder in candidates:
        if (folder / OPTIONS_NAME).is_file() or (folder / "checkpoints").is_dir():
            return folder
    return None
