"""Checkpoint files as evaluation needs them: the weights, and which model they belong to."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from clip_pgs import checkpoint_io
from clip_pgs.checkpoint_io import check_sum, fit_weights


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
        path: A file of open_clip's trainer or of ours, a bare state dict, or safetensors, of any
            name.

    Raises:
        ValueError: If the file is damaged, holds anything but tensors and plain types, or no
            weights.
    """
    content = checkpoint_io.read_checkpoint(path, use_mmap=True)
    record = content.get("clip_pgs")
    config = record.get("open_clip_config") if isinstance(record, dict) else None
    return Checkpoint(path, content["state_dict"], config)


def load_weights(model: nn.Module, checkpoint: Checkpoint, *, architecture: str) -> None:
    """Copy the weights of a checkpoint into a model.

    Unlike open_clip's own loading it never resizes a position embedding: a wrong image size
    would change the scores in silence.

    Args:
        model: The model to fill.
        checkpoint: From `read_checkpoint`.
        architecture: What to call the model in messages.

    Raises:
        ValueError: If names or shapes of the weights are not those of the model, or the file's
            checksum is wrong.
    """
    check_sum(checkpoint.path)
    state_dict = dict(checkpoint.state_dict)
    if "logit_bias" in state_dict and getattr(model, "logit_bias", None) is None:
        model.logit_bias = nn.Parameter(torch.zeros_like(state_dict["logit_bias"]))
    try:
        state_dict = fit_weights(state_dict, model)
    except ValueError as error:
        raise ValueError(f"{checkpoint.path} does not fit {architecture}: {error}") from None
    model.load_state_dict(state_dict)
