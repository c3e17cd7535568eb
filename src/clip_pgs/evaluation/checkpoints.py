"""Checkpoint files of this trainer, of open_clip's, and of others: reading them safely."""

from __future__ import annotations

import zipfile
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

WEIGHT_ENDINGS = (".pt", ".pth", ".bin", ".safetensors")


@dataclass(frozen=True)
class Checkpoint:
    """What a checkpoint file holds.

    Attributes:
        path: The file.
        state_dict: The weights, under the names of the plain model.
        config: The `open_clip_config.json` that this trainer stores with them, or None.
    """

    path: Path
    state_dict: dict[str, Tensor]
    config: dict[str, Any] | None


def read_checkpoint(path: Path) -> Checkpoint:
    """Open a checkpoint; nothing in it is run, and weights are read when they are used.

    Args:
        path: A file of open_clip's trainer or of ours, a bare state dict, or safetensors.

    Raises:
        ValueError: If the file is damaged, holds anything but tensors and plain types, or no
            weights.
    """
    if path.suffix not in WEIGHT_ENDINGS:
        raise ValueError(f"{path} is no checkpoint; they end in {', '.join(WEIGHT_ENDINGS)}")
    content: Any
    try:
        if path.suffix == ".safetensors":
            content = load_file(path)
        else:
            # Files from before torch 1.6 are no zip archives and cannot be mapped.
            is_mappable = zipfile.is_zipfile(path)
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=is_mappable)
    # A damaged file is any of these, by where the damage lies; forbidden contents are the first.
    except (UnpicklingError, RuntimeError, OSError, EOFError, SafetensorError) as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise ValueError(f"cannot read the weights in {path}: {reason}") from error
    state_dict = content.get("state_dict", content) if isinstance(content, dict) else None
    if not state_dict or not all(isinstance(value, Tensor) for value in state_dict.values()):
        raise ValueError(f"{path} holds no state dict")
    record = content.get("clip_pgs")
    config = record.get("open_clip_config") if isinstance(record, dict) else None
    return Checkpoint(path, {_plain_name(key): value for key, value in state_dict.items()}, config)


def load_weights(model: nn.Module, checkpoint: Checkpoint, *, architecture: str) -> None:
    """Copy the weights of a checkpoint into a model.

    Unlike open_clip's own loading it never resizes a position embedding: a wrong image size
    would change the scores in silence.

    Args:
        model: The model to fill.
        checkpoint: From `read_checkpoint`.
        architecture: What to call the model in messages.

    Raises:
        ValueError: If names or shapes of the weights are not those of the model.
    """
    state_dict = dict(checkpoint.state_dict)
    if "logit_bias" in state_dict and getattr(model, "logit_bias", None) is None:
        model.logit_bias = nn.Parameter(torch.zeros_like(state_dict["logit_bias"]))
    own = model.state_dict()
    misfit = f"{checkpoint.path} does not fit {architecture}"
    for key in sorted(own.keys() ^ state_dict.keys()):
        place = "file" if key in state_dict else "model"
        raise ValueError(f"{misfit}: only the {place} has {key}")
    for key, weight in state_dict.items():
        # The logit scale is a scalar or a vector of one, by the version that wrote it.
        if own[key].numel() == weight.numel() == 1:
            state_dict[key] = weight.reshape(own[key].shape)
        elif own[key].shape != weight.shape:
            shapes = f"{tuple(weight.shape)} in the file, {tuple(own[key].shape)} in the model"
            raise ValueError(f"{misfit}: {key} has shape {shapes}")
    model.load_state_dict(state_dict)


def newest_checkpoint(run: Path) -> Path | None:
    """Return the last written checkpoint of a run, or None."""
    checkpoints = [path for path in run.glob("checkpoints/epoch_*.pt") if path.is_file()]
    return max(checkpoints, key=lambda path: path.stat().st_mtime, default=None)


def _plain_name(key: str) -> str:
    """Undo what DistributedDataParallel and torch.compile put before a name."""
    return key.removeprefix("module.").removeprefix("_orig_mod.")
