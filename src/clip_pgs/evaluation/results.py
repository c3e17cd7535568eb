"""Results as files, one JSON per data set and one CSV of them all, and where a run keeps them."""

from __future__ import annotations

import io
import json
import logging
import os
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import MISSING as NO_DEFAULT
from dataclasses import Field, asdict, dataclass, field, fields
from pathlib import Path
from types import NoneType
from typing import Any

from clip_pgs import tables
from clip_pgs.common import explained, one_sentence
from clip_pgs.evaluation.datasets import clean_name
from clip_pgs.files import (
    CHECKPOINTS_NAME,
    EVAL_NAME,
    EXPORT_NAME,
    MAX_RUN_FILE_BYTES,
    OPTIONS_NAME,
    list_folder,
    read_json,
    read_within,
    write_json,
    write_text,
)
from clip_pgs.tables import csv_text

logger = logging.getLogger(__name__)

DONE, MISSING, FAILED = STATUSES = "done", "missing", "failed"
CSV_NAME = "results.csv"
RESULTS_NAME = "eval_results"

# Of a table, before and after the metrics.
_FIRST_COLUMNS = ("suite", "dataset", "status", "samples")
_LAST_COLUMNS = (
    *("error", "model", "pretrained", "weights_digest", "seconds", "date"),
    *("inference_masking", "flops_per_image"),
)
_NUMBERS: dict[str, Any] = {"samples": int, "seconds": float, "flops_per_image": float}
_EPOCH = re.compile(r"epoch_(\d+)")
# What earlier versions called a probe's `regularization`.
_FORMER = "regularisation"
# What a report computes with, where the details of a result tell it.
COUNTS = ("items", "ties", "classes", "captions")
# Each result has a copy of it; of a long mixture of shards a record takes some kilobytes.
_MAX_RECORD = 2**20
# How the table of a study begins.
_STUDY_COLUMNS = "arm,evaluation,seed,"
_REQUIRED = {"suite", "dataset", "status", "samples", "model", "weights_digest"}


@dataclass(frozen=True, kw_only=True)
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
        details: Whatever explains a number: the regularization of a probe, ties, ...
        model: Short name of the model.
        pretrained: Where its weights came from.
        weights_digest: SHA-256 of the weights; see `weights_digest`.
        identity: SHA-256 of all that the numbers depend on. Empty where unknown.
        data_digest: SHA-256 of the files of the data set, the same on each machine. Empty where
            unknown, as in tables, of sets on a server, and in results of earlier versions.
        settings: Device, precision and batch size.
        versions: Of the packages that the numbers depend on.
        date: When the data set was finished, UTC, ISO 8601.
        language: Of class names and prompts.
        inference_masking: The mask that images were encoded through, such as "pgs 0.5"; "" for
            whole images.
        flops_per_image: Floating-point operations of encoding an image; None where unknown.
        training: What the checkpoint of these weights said of its run; {} where unknown, as in
            tables.
    """

    suite: str
    dataset: str
    status: str
    metrics: dict[str, float | None]
    samples: int
    error: str | None = None
    seconds: float = 0.0
    task: str = ""
    location: str = ""
    model: str
    pretrained: str = ""
    weights_digest: str
    details: dict[str, Any] = field(default_factory=dict)
    identity: str = ""
    data_digest: str = ""
    settings: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    date: str = ""
    language: str = "en"
    inference_masking: str = ""
    flops_per_image: float | None = None
    training: dict[str, Any] = field(default_factory=dict)

    @property
    def model_key(self) -> tuple[str, str]:
        """What tells one scored model from another: the weights, and how images are masked."""
        return self.weights_digest, self.inference_masking


# What a result file holds of each type; all others are dicts.
_KINDS: dict[str, Any] = {
    "str": str,
    "int": int,
    "float": (int, float),
    "str | None": (str, NoneType),
    "float | None": (int, float, NoneType),
}


def plain_record(record: Any) -> dict[str, Any]:
    """Return what a checkpoint says of its run as results keep it, without its measurements.

    Args:
        record: A checkpoint's `clip_pgs`.

    Returns:
        What JSON holds; {} for anything that is no record.
    """
    if not isinstance(record, dict) or "recipe" not in record:
        return {}
    kept = {name: value for name, value in record.items() if name != "metrics"}
    try:
        text = json.dumps(kept, default=str)
    # Of a file that somebody made up.
    except (TypeError, ValueError, RecursionError):
        return {}
    return json.loads(text) if len(text) <= _MAX_RECORD else {}


def write_result(result: Result, path: Path) -> None:
    """Write one result as JSON; an interrupted write leaves no half file."""
    write_json(path, asdict(result))


@contextmanager
def telling_once() -> Iterator[None]:
    """Within, a damaged result or a changed masking is told once, however often it is read."""
    told: set[str] = set()

    def is_new(record: logging.LogRecord) -> bool:
        message = record.getMessage()
        is_known = message in told
        told.add(message)
        return not is_known

    telling = (logger, logging.getLogger("clip_pgs.evaluation.masked_inference"))
    for each in telling:
        each.addFilter(is_new)
    try:
        yield
    finally:
        for each in telling:
            each.removeFilter(is_new)


def read_results(folder: Path) -> list[Result]:
    """Read the results of a folder, in the order of their file names; skip other JSON files.

    A warning tells of a folder that cannot be read.
    """
    return [result for _, result in result_files(folder)]


def result_files(folder: Path) -> list[tuple[Path, Result]]:
    """Return the result files of a folder with what they hold, in the order of their names."""
    try:
        paths = [path for path in list_folder(folder) if path.suffix == ".json"]
    except OSError as error:
        logger.warning("left out %s", one_sentence(error))
        return []
    read = ((path, read_result(path)) for path in paths)
    return [(path, result) for path, result in read if result is not None]


def read_result(path: Path) -> Result | None:
    """Read one result.

    Returns:
        None if the file is not there or is no result; of one that looks like a result and has
        another shape, or numbers that cannot be, a warning tells.
    """
    try:
        if not path.exists():
            return None
        content = read_json(path, what="it", max_bytes=MAX_RUN_FILE_BYTES)
    except (OSError, ValueError) as error:
        logger.warning("left out %s: %s", path, one_sentence(error))
        return None
    if not isinstance(content, dict) or "weights_digest" not in content:
        return None
    names = [column.name for column in fields(Result) if not _holds(content, column)]
    if names:
        logger.warning("left out %s: its %s is not that of a result", path, " and ".join(names))
        return None
    details = content.get("details", {})
    if _FORMER in details:
        details["regularization"] = details.pop(_FORMER)
    result = Result(**{c.name: content[c.name] for c in fields(Result) if c.name in content})
    return result if _is_sound(result, str(path)) else None


def _holds(content: dict[str, Any], column: Field) -> bool:
    if column.name not in content:
        return column.default is not NO_DEFAULT or column.default_factory is not NO_DEFAULT
    value = content[column.name]
    if column.name == "metrics" and isinstance(value, dict):
        return all(_is_a("float | None", share) for share in value.values())
    return _is_a(str(column.type), value)


def _is_a(kind: str, value: Any) -> bool:
    # To Python, true is a number.
    return isinstance(value, _KINDS.get(kind, dict)) and not isinstance(value, bool)


def _is_sound(result: Result, place: str) -> bool:
    """Say whether one can compute with a result, and warn where one cannot."""
    shares = {name: value for name, value in result.metrics.items() if value is not None}
    counts = {name: result.details[name] for name in COUNTS if name in result.details}
    counts["samples"] = result.samples
    if result.flops_per_image is not None:
        counts["flops_per_image"] = result.flops_per_image
    odd = [f"{name} {value}" for name, value in shares.items() if not is_share(value)]
    odd += [f"{name} {value}" for name, value in counts.items() if amount(value) is None]
    if result.status not in STATUSES:
        odd.append(f"status {result.status!r}")
    if odd:
        logger.warning("left out %s: it says %s", one_sentence(place), one_sentence(", ".join(odd)))
    return not odd


def is_share(value: float) -> bool:
    """Return whether a metric's value is in [0, 1], but for what rounding adds."""
    return -1e-6 <= value <= 1 + 1e-6


def amount(value: Any) -> float | None:
    """Return a finite number that is not negative, or None for anything else."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return value if is_number and 0 <= value < 1e40 else None


def write_csv(results: Iterable[Result], path: Path) -> None:
    """Write results as a table, a row each; metrics stay in [0, 1], and empty where undefined."""
    results = list(results)
    metric_names = ordered_metrics(results)
    header = [*_FIRST_COLUMNS, *metric_names, *_LAST_COLUMNS]
    cells = [result.metrics | vars(result) for result in results]
    write_text(path, csv_text(header, [[row.get(name) for name in header] for row in cells]))


def is_table(path: Path) -> bool:
    """Return whether a file is a table as `write_csv` writes it."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        columns = ",".join(_FIRST_COLUMNS).encode()
        return file.read(len(columns)) == columns


def read_csv(path: Path) -> list[Result]:
    """Read what `write_csv` wrote; what only the JSON files tell stays blank.

    A warning tells of rows of numbers that cannot be, which are left out.

    Raises:
        ValueError: If the file is no such table, has no row, or two that differ on one set.
    """
    what = f"{path} is no table of an evaluation"
    data = read_within(path, what=str(path), max_bytes=MAX_RUN_FILE_BYTES)
    with explained(what):
        file = io.StringIO(data.decode("utf-8-sig"), newline="")
        headings = file.readline().strip()
        if headings.startswith(_STUDY_COLUMNS):
            raise ValueError(
                f"it is that of a study, whose own report is {path.parent / 'index.html'}; for a "
                f"report of its runs name them, {path.parent / 'ARM/seed_N'}"
            )
        for separator in (";", "\t"):
            if set(headings.replace('"', "").split(separator)) >= _REQUIRED:
                raise ValueError(
                    f"its columns are separated by {separator!r}; save it anew with commas, and "
                    "points in its numbers"
                )
        file.seek(0)
        rows = tables.read_csv(file)
    if not rows or not rows[0].keys() >= _REQUIRED:
        raise ValueError(f"{what}; it needs a row, and the columns {', '.join(sorted(_REQUIRED))}")
    columns = {*_FIRST_COLUMNS, *_LAST_COLUMNS, "task", "location", "language"}
    results = []
    with explained(what, ValueError, LookupError):
        for row in rows:
            filled = {name: text for name, text in row.items() if text or name in _REQUIRED}
            told: dict[str, Any] = {"task": row["suite"].replace("-", "_")}
            told |= {n: _NUMBERS.get(n, str)(text) for n, text in filled.items() if n in columns}
            measured = {n: float(text) for n, text in sorted(filled.items()) if n not in columns}
            results.append(Result(**told, metrics={**measured}))
    by_set: dict[Any, Result] = {}
    for result in results:
        first = by_set.setdefault((*result.model_key, result.suite, result.dataset), result)
        if first != result:
            raise ValueError(
                f"{path} has two rows of {result.model} on {result.dataset} ({result.suite}) that "
                "differ; keep one"
            )
    return [
        result
        for result in by_set.values()
        if _is_sound(result, f"the row of {result.dataset} ({result.suite}) in {path}")
    ]


def ordered_metrics(results: Iterable[Result]) -> list[str]:
    """Return the metrics of some results: text before image retrieval, R@5 before R@10."""

    def rank(metric: str) -> tuple[bool, str, int]:
        stem, _, k = metric.partition("@")
        return not stem.startswith("text"), stem, int(k) if k.isdecimal() else 0

    return sorted({name for result in results for name in result.metrics}, key=rank)


def is_run(folder: Path) -> bool:
    """Say whether a folder is that of a training run; of one that may not be read, none can."""
    # os.path: to pathlib, asking for what may not be looked up is an error.
    return os.path.isfile(folder / OPTIONS_NAME) or os.path.isdir(folder / CHECKPOINTS_NAME)


def run_of_results(folder: Path) -> Path | None:
    """Return the run that a folder of results is, or lies right in; absolute, or None."""
    folder = folder.resolve()
    return next((place for place in (folder, folder.parent) if is_run(place)), None)


def run_of_weights(weights: str) -> Path | None:
    """Return the run that a checkpoint or an export lies in, or None.

    Args:
        weights: Where a result says that its weights came from: a path or a name.
    """
    holders = Path(weights).parents[:2]
    # The parent of a name that is no path is the working directory.
    if len(holders) < 2 or not os.path.isdir(holders[0]):
        return None
    return next((folder for folder in holders if is_run(folder)), None)


def model_name(source: str, *, pretrained: str | None = None) -> str:
    """Return a short name for a source that `load_model` opens.

    Args:
        source: As `load_model` takes it.
        pretrained: The same.
    """
    path = Path(source.removeprefix("local-dir:"))
    if not path.exists():
        last_part = source.rsplit("/", 1)[-1].removeprefix("hf-hub:")
        return f"{last_part}_{pretrained}" if pretrained else last_part
    path = path.resolve()
    if path.is_dir():
        return path.parent.name if path.name == EXPORT_NAME else path.name
    if path.parent.name == CHECKPOINTS_NAME:
        return f"{path.parent.parent.name}_{path.stem}"
    return path.stem


def folder_of_model(source: str, *, pretrained: str | None = None) -> Path:
    """Return where the results of a model go that is no run, from the working directory.

    Args:
        source: As `load_model` takes it.
        pretrained: The same.
    """
    return Path(RESULTS_NAME, clean_name(model_name(source, pretrained=pretrained)))


def epoch_folder(run: Path, epoch: int) -> Path:
    """Return where a run keeps what it scored in training after so many epochs."""
    return run / EVAL_NAME / f"epoch_{epoch}"


def epoch_folders(run: Path) -> dict[int, Path]:
    """Return the folders of what a run scored in training, by epoch and in that order."""
    found = {
        int(name[1]): path
        for path in (run / EVAL_NAME).glob("epoch_*")
        if (name := _EPOCH.fullmatch(path.name)) and path.is_dir()
    }
    return dict(sorted(found.items()))


def is_epoch_folder(folder: Path) -> bool:
    """Say whether a folder is one of those that `epoch_folders` finds in its run."""
    folder = folder.resolve()
    in_run = folder.parent.name == EVAL_NAME and is_run(folder.parent.parent)
    return in_run and _EPOCH.fullmatch(folder.name) is not None
