"""What a study remembers of each of its runs, and by which code a run was made.

The run's own `options.json` says with which options and data it was trained; `study.json` beside
it says what that file does not: digests of the code and of the model's config, the flags of each
evaluation, seconds, why it failed, and which changes somebody accepted.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import json
import math
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

import clip_pgs
from clip_pgs.evaluation.report.training_facts import read_training_facts
from clip_pgs.files import (
    EXIT_NAME,
    EXPORT_NAME,
    MAX_RUN_FILE_BYTES,
    read_json_object,
    read_within,
    regular_file,
    write_json,
)
from clip_pgs.training.build import model_digest
from clip_pgs.training.options import TrainOptions
from clip_pgs.training.run_folder import (
    changed_options,
    changed_recipe,
    holds_run,
    read_options_file,
)

RECORD_NAME = "study.json"

# Files and folders of the package that a trained weight, or a score, depends on.
_BELOW = ("common.py", "files.py", "registry.py", "checkpoint_reading.py")
_SHARED = (*_BELOW, "masking", "integrations")
_TRAINING = (*_SHARED, "training", "data", "study/controls.py")
_EVALUATION = (*_SHARED, "evaluation", "data", "study/controls.py")
# Of these, what writes about results, and the demo world's maker, whose files are compared.
_LEFT_OUT = ("evaluation/report", "data/world")
_SHOWN = 12


@dataclass(frozen=True)
class Code:
    """Digests of the code; comments, docstrings and layout do not count.

    Attributes:
        training: Of all that a run's weights depend on.
        evaluation: Of all that its scores depend on.
    """

    training: str
    evaluation: str


@dataclass
class Evaluated:
    """One evaluation of a run that was done.

    Attributes:
        flags: Of each call.
        code: By which code, see `Code`.
        seconds: Wall time.
        data: Digest of the data sets, "" where an earlier version did not note it.
    """

    flags: list[list[str]]
    code: str
    seconds: float
    data: str = ""


@dataclass
class Spent:
    """What training a run took.

    Attributes:
        flops: Floating-point operations over all processes; None where unknown.
        seconds: Wall time, launches that were interrupted included; None where unknown.
        hardware: Such as "1 x NVIDIA H100", "" where unknown.
    """

    flops: float | None
    seconds: float | None
    hardware: str


@dataclass
class Record:
    """What `study.json` holds.

    Attributes:
        version: Of the package when the run was begun.
        code: Digests of the code by which it was trained; one, unless others were accepted.
        model: Digest of the model's config.
        spent: What training took, None before its end.
        evaluations: By name.
        failed: Why training or an evaluation failed at last, "" if none did.
        accepted: How its data, model config and code differ from those that the study meant when
            it was last run, which somebody accepted; its options are compared anew each time.
        trained_under: Changes under which it was trained on, as sentences.
    """

    version: str = ""
    code: list[str] = field(default_factory=list)
    model: str = ""
    spent: Spent | None = None
    evaluations: dict[str, Evaluated] = field(default_factory=dict)
    failed: str = ""
    accepted: list[str] = field(default_factory=list)
    trained_under: list[str] = field(default_factory=list)


def read_record(run: Path) -> Record:
    """Read the record of a run, an empty one where there is none.

    Raises:
        ValueError: If it is damaged.
        PermissionError: If it may not be read.
    """
    path = run / RECORD_NAME
    try:
        if not path.exists():
            return Record()
        content = json.loads(read_within(path, what="it", max_bytes=MAX_RUN_FILE_BYTES))
        content["evaluations"] = {
            name: Evaluated(**said) for name, said in content["evaluations"].items()
        }
        if content.get("spent") is not None:
            content["spent"] = Spent(**content["spent"])
        # An earlier version held more.
        known = {part.name for part in fields(Record)}
        record = Record(**{name: said for name, said in content.items() if name in known})
        _check_types(record)
        return record
    # It may be whole.
    except PermissionError:
        raise
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        said = error if isinstance(error, OSError | ValueError) else "its parts are no record's"
        raise ValueError(
            f"{path} is damaged: {said}; remove that file and go on with --accept-changes, or "
            f"remove the run {run}, which is then made anew"
        ) from None


def _check_types(record: Record) -> None:
    evaluated, spent = record.evaluations.values(), record.spent
    said = (record.code, record.accepted, record.trained_under)
    lists = [*said, *(done.flags for done in evaluated)]
    texts = [record.version, record.model, record.failed, *(text for some in said for text in some)]
    texts += [text for done in evaluated for text in (done.code, done.data)]
    numbers: list[Any] = [done.seconds for done in evaluated]
    if spent is not None:
        texts.append(spent.hardware)
        numbers += [number for number in (spent.flops, spent.seconds) if number is not None]
    kinds: list[tuple[Any, str, list[Any]]] = [(list, "list", lists), (str, "text", texts)]
    for kind, word, values in [*kinds, ((int, float), "number", numbers)]:
        for value in values:
            if not isinstance(value, kind):
                raise ValueError(f"it has {value!r} in the place of a {word}")
    for number in numbers:
        if not 0 <= number < math.inf:
            raise ValueError(f"it has {number!r} in the place of a number of seconds or FLOPs")


def read_spent(run: Path) -> Spent:
    """Read what training a run took, from its record or else from its checkpoint or curves."""
    spent = read_record(run).spent
    if spent is not None:
        return spent
    facts = read_training_facts(run, "")
    return Spent(facts.flops, facts.seconds, facts.hardware)


def write_record(record: Record, run: Path) -> None:
    """Write the record of a run, whole or not at all."""
    write_json(run / RECORD_NAME, asdict(record))


def missing_part(run: Path) -> str:
    """Name what a run that went to its end holds and this one lacks, "" if it has all."""
    try:
        if read_json_object(run / EXIT_NAME, what="it").get("code") != 0:
            return f"an {EXIT_NAME} of a run that is done"
    except ValueError:
        return f"a readable {EXIT_NAME}"
    weights = list((run / EXPORT_NAME).glob("*.safetensors"))
    try:
        for path in weights:
            # It reads the header alone, and compares the file's size with it.
            with safe_open(regular_file(path), framework="pt"):
                pass
    except (OSError, SafetensorError):
        weights = []
    return "" if weights else f"whole weights in its {EXPORT_NAME}"


def read_code() -> Code:
    """Return digests of the package's code as it is on the disk now."""
    package = Path(clip_pgs.__file__).parent
    return Code(_digest_files(package, _TRAINING), _digest_files(package, _EVALUATION))


def _digest_files(package: Path, names: tuple[str, ...]) -> str:
    digest = hashlib.sha256()
    left_out = [package / name for name in _LEFT_OUT]
    for name in names:
        place = package / name
        for path in sorted(place.rglob("*.py")) if place.is_dir() else [place]:
            if not any(folder in path.parents for folder in left_out):
                digest.update(f"\n{path.relative_to(package).as_posix()}\n".encode())
                digest.update(_meaning(path.read_text(encoding="utf-8")).encode())
    return digest.hexdigest()[:_SHOWN]


@functools.cache
def _meaning(source: str) -> str:
    """Return a module without comments, docstrings and layout; cached, as that takes a while."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if isinstance(body, list):
            kept = [part for part in body if not _is_text(part)]
            node.body = kept or [ast.Pass()]  # type: ignore[attr-defined]
    return ast.unparse(tree)


def _is_text(statement: ast.stmt) -> bool:
    if not isinstance(statement, ast.Expr) or not isinstance(statement.value, ast.Constant):
        return False
    return isinstance(statement.value.value, str)


def option_changes(options: TrainOptions, run: Path, *, files: list[str] | None) -> list[str]:
    """Say how the options of a run differ from those that its study means; see `differences`."""
    if not holds_run(run):
        return []
    saved, damage = read_options_file(run)
    changes = changed_options(options, saved, files=files) + changed_recipe(options, saved)
    # A power cut can have left a run that was only begun without them; it is trained again.
    if damage is not None and read_record(run).spent is not None:
        changes.append(damage)
    return changes


def differences(
    options: TrainOptions, run: Path, code: Code, *, files: list[str] | None
) -> list[str]:
    """Say how a run that was begun or finished differs from the one that its study means.

    Args:
        options: What the study means, the seed included.
        run: The run's folder.
        code: The code as it is now.
        files: The training data, file by file; None leaves it out.

    Returns:
        Differences such as "lr 0.1 -> 0.2", none where nothing was begun.

    Raises:
        ValueError: If the run's record is damaged.
    """
    if not holds_run(run):
        return []
    record, changes = read_record(run), option_changes(options, run, files=files)
    if record.model != model_digest(options):
        changes.append(f"model config {record.model or 'unknown'} -> {model_digest(options)}")
    if code.training not in record.code:
        known = ", ".join(record.code) or "unknown"
        changes.append(f"code {known} -> {code.training}")
    return changes
