"""Checkpoints in OpenCLIP's layout: `checkpoints/epoch_N.pt` and `epoch_latest.pt`.

They hold tensors and plain types only, so that `torch.load(weights_only=True)` opens them, and
weights under the plain model's names, whatever wrapped it while training. Under "clip_pgs" lies
the run's record, from which `clip_pgs.training.export` makes an export without the run, under
"masking_state" what a masking learned beside the weights.
"""

from __future__ import annotations

import os
import pickle
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

LATEST_NAME = "epoch_latest.pt"
_EPOCH_NAME = re.compile(r"epoch_(\d+)\.pt")
_WRAPPER_PREFIXES = ("module.", "_orig_mod.")


def pack_checkpoint(
    *,
    epoch: int,
    name: str,
    model: nn.Module,
    record: dict[str, Any],
    optimizer: torch.optim.Optimizer | None = None,
    scaler: torch.amp.GradScaler | None = None,
    masking_state: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Collect a run's state as OpenCLIP names it; what is not there is left out.

    Args:
        epoch: Completed epochs.
        name: The run's name.
        model: The plain model.
        record: Plain types that describe the run; stored under "clip_pgs".
        optimizer: Its optimiser.
        scaler: The loss scaler.
        masking_state: What the masking learned and no weight holds, such as a teacher.
    """
    checkpoint = {
        "epoch": epoch,
        "name": name,
        "state_dict": model.state_dict(),
        "clip_pgs": record,
    }
    if optimizer is not None:
        checkpoint["optimizer"] = optimizer.state_dict()
    if scaler is not None:
        checkpoint["scaler"] = scaler.state_dict()
    if masking_state:
        checkpoint["masking_state"] = masking_state
    return checkpoint


def save_checkpoint(
    checkpoint: dict[str, Any],
    folder: Path,
    *,
    is_numbered: bool = True,
    is_latest: bool = False,
    delete_previous: bool = False,
) -> None:
    """Write a checkpoint, each file under another name first, so that none is ever half there.

    Args:
        checkpoint: From `pack_checkpoint`.
        folder: The run's checkpoint folder.
        is_numbered: Write `epoch_N.pt`.
        is_latest: Write `epoch_latest.pt`.
        delete_previous: Remove the numbered file before this one, once the new ones are there.
    """
    epoch = checkpoint["epoch"]
    names = [f"epoch_{epoch}.pt"] * is_numbered + [LATEST_NAME] * is_latest
    for name in names:
        unfinished = folder / f".{name}.unfinished"
        torch.save(checkpoint, unfinished)
        os.replace(unfinished, folder / name)
    if delete_previous and names:
        older = {n: path for path, n in _numbered(folder).items() if n < epoch}
        if older:
            older[max(older)].unlink()


def load_checkpoint(path: Path | str) -> dict[str, Any]:
    """Read a checkpoint of this trainer or of OpenCLIP's, onto the CPU.

    Returns:
        The checkpoint, or {"state_dict": ...} for a file that holds weights alone. Names of
        weights are the plain model's.

    Raises:
        ValueError: If the file is missing or holds anything but tensors and plain types.
    """
    if not Path(path).is_file():
        raise ValueError(f"checkpoint {str(path)!r} does not exist")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"checkpoint {str(path)!r} cannot be read: {reason}") from error
    if "state_dict" not in checkpoint:
        checkpoint = {"state_dict": checkpoint}
    checkpoint["state_dict"] = _plain_names(checkpoint["state_dict"])
    return checkpoint


def _plain_names(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    for prefix in _WRAPPER_PREFIXES * 2:
        if all(name.startswith(prefix) for name in state_dict):
            state_dict = {name.removeprefix(prefix): t for name, t in state_dict.items()}
    return state_dict


def find_latest(folder: Path) -> Path | None:
    """Return the checkpoint with the most epochs in a folder, or None where there is none."""
    epochs = _numbered(folder)
    latest = folder / LATEST_NAME
    if latest.is_file():
        content = torch.load(latest, map_location="cpu", weights_only=True, mmap=True)
        epochs[latest] = content["epoch"]
    return max(epochs, key=lambda path: epochs[path], default=None)


def _numbered(folder: Path) -> dict[Path, int]:
    matches = {path: _EPOCH_NAME.fullmatch(path.name) for path in folder.glob("epoch_*.pt")}
    return {path: int(match[1]) for path, match in matches.items() if match}


def restore(
    checkpoint: dict[str, Any],
    *,
    model: nn.Module,
    scaler: torch.amp.GradScaler | None = None,
) -> int:
    """Load a checkpoint's weights and loss scaler into a run.

    Args:
        checkpoint: From `load_checkpoint`. Weights alone leave the scaler as it is.
        model: The plain model.
        scaler: The loss scaler, if there is one.

    Returns:
        Completed epochs; 0 for weights alone.
    """
    model.load_state_dict(checkpoint["state_dict"])
    if "epoch" not in checkpoint:
        return 0
    if scaler is not None and "scaler" in checkpoint:
        scaler.load_state_dict(checkpoint["scaler"])
    return checkpoint["epoch"]
