"""What can be said about a model's weights before it is scored."""

from __future__ import annotations

import hashlib

import torch
from torch import nn


def check_finite(model: nn.Module, *, name: str) -> None:
    """Refuse a model that holds a NaN or an infinity.

    A model of NaN features is not stopped by the metrics: it gets numbers that look plausible.

    Args:
        model: The model to be scored.
        name: What to call it in the message.

    Raises:
        ValueError: If a parameter or buffer holds a value that is not finite.
    """
    for key, tensor in model.state_dict().items():
        if not (tensor.is_floating_point() or tensor.is_complex()):
            continue
        num_bad = tensor.numel() - int(torch.isfinite(tensor).sum())
        if num_bad:
            raise ValueError(
                f"the weights of {name} are not finite: {key} holds {num_bad} NaN or infinite "
                f"values of {tensor.numel()}"
            )


def weights_digest(model: nn.Module) -> str:
    """Return a digest of the weights, the same whatever file they came from.

    Args:
        model: The model to be scored.

    Returns:
        SHA-256, 64 hexadecimal digits, over name, type, shape and bytes of every entry of the
        state dict, in the order of the names.
    """
    digest = hashlib.sha256()
    for key, tensor in sorted(model.state_dict().items()):
        digest.update(f"{key} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        raw_bytes = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        digest.update(memoryview(raw_bytes.numpy()))
    return digest.hexdigest()
