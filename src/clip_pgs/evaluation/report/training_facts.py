"""What stands behind a model: its data, masking, length, cost and seed, from its run's own files.

The record inside a checkpoint of this trainer says it all; without one, `options.json` and
`metrics.jsonl` of the run folder say most of it. Any other checkpoint leaves blanks.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from clip_pgs.checkpoint_io import newest_checkpoint, read_checkpoint
from clip_pgs.common import CHECKPOINTS_NAME, OPTIONS_NAME

METRICS_NAME = "metrics.jsonl"


@dataclass(frozen=True)
class TrainingFacts:
    """A training run in facts; what is not known is "" or None.

    Attributes:
        architecture: Such as "ViT-B-16".
        data: The training data as the run names it, whole.
        masking: Strategy and ratio, such as "pgs 0.5" or "none".
        samples: Image-caption pairs seen.
        flops: Floating-point operations over all processes.
        seconds: Wall time.
        hardware: Such as "8 x NVIDIA H200".
        seed: Of the run.
        recipe: Everything that makes it this experiment except for the seed, as one text; runs
            with the same text differ in their seed alone.
    """

    architecture: str = ""
    data: str = ""
    masking: str = ""
    samples: int | None = None
    flops: float | None = None
    seconds: float | None = None
    hardware: str = ""
    seed: int | None = None
    recipe: str = field(default="", repr=False)

    @property
    def short_data(self) -> str:
        """The last two parts of where the data is, without the names of the shards."""
        parts = [part for part in re.split(r"[/\\]", self.data.split("::")[0]) if part]
        if parts and re.search(r"[{*]|\.tar$", parts[-1]):
            parts = parts[:-1] or parts
        return "/".join(parts[-2:])


def read_training_facts(run: Path | None, weights: str) -> TrainingFacts:
    """Read what is known of the training behind some results.

    Args:
        run: The run folder, None if there is none.
        weights: Where the results say that the weights came from: a checkpoint file or a folder.
    """
    checkpoint: Path | None = None
    if Path(weights).suffix == ".pt" and Path(weights).is_file():
        checkpoint = Path(weights)
    elif run is not None:
        checkpoint = newest_checkpoint(run / CHECKPOINTS_NAME)
    record = _read_record(checkpoint) if checkpoint is not None else None
    if record is not None:
        return _from_record(record)
    if run is not None and (run / OPTIONS_NAME).is_file():
        return _from_logs(run)
    return TrainingFacts()


def _read_record(checkpoint: Path) -> dict[str, Any] | None:
    """Return the record of a checkpoint of this trainer; weights are left on the disk."""
    try:
        record = read_checkpoint(checkpoint, use_mmap=True).get("clip_pgs")
    except ValueError:
        return None
    return record if isinstance(record, dict) and "recipe" in record else None


def _from_record(record: dict[str, Any]) -> TrainingFacts:
    cost = record.get("cost", {})
    # A run stopped half way is another experiment than one that went to its end.
    parts = ("model", "masking", "masking_options", "data")
    recipe = record["recipe"]
    same = [{name: record.get(name) for name in parts}, _without_seed(recipe), cost.get("steps")]
    facts = _facts(record, data=record.get("data", {}), spent=cost, seed=recipe.get("seed"))
    hardware = f"{record.get('world_size', 1)} x {record['device']}" if "device" in record else ""
    recipe_text = json.dumps(same, sort_keys=True, default=str)
    return replace(facts, hardware=hardware, recipe=recipe_text)


def _from_logs(run: Path) -> TrainingFacts:
    options = json.loads((run / OPTIONS_NAME).read_text("utf-8"))
    spent = _last_measurement(run / METRICS_NAME)
    same = [_without_seed(options), spent.get("samples")]
    facts = _facts(options, data=options, spent=spent, seed=options.get("seed"))
    return replace(facts, recipe=json.dumps(same, sort_keys=True))


def _facts(
    choices: dict[str, Any], *, data: dict[str, Any], spent: dict[str, Any], seed: int | None
) -> TrainingFacts:
    return TrainingFacts(
        architecture=str(choices.get("model") or ""),
        data=_data_name(data),
        masking=_masking_name(choices),
        samples=spent.get("samples"),
        flops=spent.get("flops"),
        seconds=spent.get("seconds"),
        seed=seed,
    )


def _without_seed(recipe: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in recipe.items() if name != "seed"}


def _last_measurement(path: Path) -> dict[str, Any]:
    """Return the last line that tells what was spent; a killed run can leave half a line."""
    if not path.is_file():
        return {}
    for line in reversed(path.read_text("utf-8").splitlines()):
        try:
            entry = json.loads(line)
        except json.JSONDecodeError:
            continue
        if "samples" in entry:
            return entry
    return {}


def _data_name(options: dict[str, Any]) -> str:
    data = options.get("train_data") or options.get("dataset_type") or ""
    return " + ".join(map(str, data)) if isinstance(data, list) else str(data)


def _masking_name(options: dict[str, Any]) -> str:
    """Name a masking with its ratio, and with every other option that was set."""
    chosen = dict(options.get("masking_options") or {})
    ratio, lowest = chosen.pop("mask_ratio", None), chosen.pop("mask_ratio_min", None)
    parts = [str(options.get("masking") or "")]
    if ratio is not None:
        parts.append(f"{lowest}-{ratio}" if lowest is not None else f"{ratio}")
    return " ".join([*parts, *(f"{name}={value}" for name, value in chosen.items())])
