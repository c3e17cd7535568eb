"""Where measurements go: JSON lines, TensorBoard, Weights & Biases."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from clip_pgs.common import append_line, write_text
from clip_pgs.training.options import TrainOptions

_logger = logging.getLogger(__name__)


class Sink(Protocol):
    """Takes measurements of rank 0."""

    def train(self, values: Mapping[str, float], *, epoch: int, step: int) -> None:
        """Take a training window's values, by OpenCLIP's names without "train/"."""

    def validation(
        self, values: Mapping[str, float], *, epoch: int, cost: Mapping[str, float]
    ) -> None:
        """Take a validation's values after `epoch` epochs.

        Args:
            values: By OpenCLIP's names without "val/".
            epoch: Completed epochs.
            cost: What was spent so far: "steps", "samples", "flops", "seconds".
        """

    def picture(self, name: str, pixels: Tensor, *, step: int) -> None:
        """Take a picture of shape (3, H, W) in [0, 1]."""

    def close(self) -> None:
        """Write out what is left."""


class JsonLines:
    """One JSON object per measurement, for programs: `metrics.jsonl`.

    Args:
        path: The file; lines of steps that a resumed run is about to repeat are dropped.
        first_step: The step this launch starts at.
    """

    def __init__(self, path: Path, *, first_step: int) -> None:
        self._path = path
        keep_lines_before(path, first_step)

    def train(self, values: Mapping[str, float], *, epoch: int, step: int) -> None:
        """Append a line of kind "train"."""
        self._append({"kind": "train", "epoch": epoch, "step": step, **values})

    def validation(
        self, values: Mapping[str, float], *, epoch: int, cost: Mapping[str, float]
    ) -> None:
        """Append a line of kind "val"; its step is the last one taken."""
        entry = {"kind": "val", "epoch": epoch, "step": int(cost["steps"]) - 1}
        spent = {name: cost[name] for name in ("samples", "flops", "seconds")}
        self._append({**entry, **spent, **values})

    def picture(self, name: str, pixels: Tensor, *, step: int) -> None:
        """Leave pictures to the others."""

    def close(self) -> None:
        """Nothing is left: every line was written at once."""

    def _append(self, entry: dict[str, Any]) -> None:
        append_line(self._path, json.dumps(entry))


def keep_lines_before(path: Path, step: int) -> list[dict[str, Any]]:
    """Drop the lines of a file that a resumed run is about to repeat, and what is no line.

    Args:
        path: JSON objects with a "step", one a line; it need not be there.
        step: The first step that is repeated.

    Returns:
        The lines that are left.

    Raises:
        OSError: If the file cannot be read or written; it is as it was.
    """
    if not path.is_file():
        return []
    lines = path.read_bytes().splitlines()
    entries = [_read_line(line) for line in lines]
    kept = [entry for entry in entries if entry is not None and entry["step"] < step]
    if entries.count(None):
        # A killed run can leave half a line, a damaged disk anything.
        _logger.warning("%s: dropped %d lines that are none", path, entries.count(None))
    if len(kept) < len(lines):
        write_text(path, "".join(f"{json.dumps(entry)}\n" for entry in kept))
    return kept


def _read_line(line: bytes) -> dict[str, Any] | None:
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError):
        return None
    is_line = isinstance(entry, dict) and isinstance(entry.get("step"), (int, float))
    return entry if is_line else None


class TensorBoard:
    """OpenCLIP's tags, and validation curves against samples and FLOPs.

    Args:
        folder: Where event files go.
        first_step: The step this launch starts at; later points of an earlier launch disappear.
    """

    def __init__(self, folder: Path, *, first_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        purge_step = first_step if first_step > 0 else None
        self._writer = SummaryWriter(str(folder), purge_step=purge_step)

    def train(self, values: Mapping[str, float], *, epoch: int, step: int) -> None:
        """Write `train/...` against steps."""
        for name, value in values.items():
            self._writer.add_scalar(f"train/{name}", value, step)

    def validation(
        self, values: Mapping[str, float], *, epoch: int, cost: Mapping[str, float]
    ) -> None:
        """Write `val/...` against epochs, as OpenCLIP does, samples and 10**9 operations."""
        for name, value in values.items():
            self._writer.add_scalar(f"val/{name}", value, epoch)
            self._writer.add_scalar(f"val_by_samples/{name}", value, int(cost["samples"]))
            self._writer.add_scalar(f"val_by_gflops/{name}", value, int(cost["flops"] / 1e9))

    def picture(self, name: str, pixels: Tensor, *, step: int) -> None:
        """Write a picture."""
        self._writer.add_image(name, pixels, step)

    def close(self) -> None:
        """Write out what is left."""
        self._writer.close()


class WeightsAndBiases:
    """OpenCLIP's names in one Weights & Biases run.

    Args:
        args: Options; the run's name is its id.
        params_file: `params.txt`, stored with the run.
    """

    def __init__(self, args: TrainOptions, params_file: Path) -> None:
        import wandb

        self._wandb = wandb
        self._run = wandb.init(
            project=args.wandb_project_name,
            name=args.name,
            id=args.name,
            notes=args.wandb_notes,
            resume="auto" if args.resume else None,
            config=args.values(),
        )
        wandb.save(str(params_file))

    def train(self, values: Mapping[str, float], *, epoch: int, step: int) -> None:
        """Log `train/...` at a step."""
        self._run.log({f"train/{k}": v for k, v in values.items()} | {"step": step}, step=step)

    def validation(
        self, values: Mapping[str, float], *, epoch: int, cost: Mapping[str, float]
    ) -> None:
        """Log `val/...` with the epoch and the cost, any of which can be the curve's x axis."""
        entry = {f"val/{name}": value for name, value in values.items()}
        self._run.log(entry | {"epoch": epoch, **cost}, step=int(cost["steps"]))

    def picture(self, name: str, pixels: Tensor, *, step: int) -> None:
        """Log a picture."""
        self._run.log({name: self._wandb.Image(pixels)}, step=step)

    def close(self) -> None:
        """Finish the run."""
        self._run.finish()
