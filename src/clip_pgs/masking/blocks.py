"""A batch's images a few at a time, so that intermediate results stay in a processor's cache."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

# About 2 MB of float32, what a core's own cache holds.
_BLOCK = 2**19


def in_blocks(compute: Callable[..., Tensor], *tensors: Tensor | None) -> Tensor:
    """Compute something for each image of a batch by itself.

    Selection reads and writes an image several times for little arithmetic. Where memory is slow,
    that takes several times as long on a whole batch as on a few images; elsewhere, and inside a
    compiled model, the batch stays whole.

    Args:
        compute: Takes tensors of B images and returns one of them, without mixing images.
        *tensors: What it takes, each of shape (B, ...); the first one sets the size of a block.
            None is passed on.

    Returns:
        What `compute` returns for the whole batch.
    """
    first = tensors[0]
    assert first is not None
    if first.device.type != "cpu" or torch.compiler.is_compiling() or first.numel() <= _BLOCK:
        return compute(*tensors)
    num_images = max(1, _BLOCK * len(first) // first.numel())
    blocks = [len(first) * [None] if t is None else t.split(num_images) for t in tensors]
    return torch.cat([compute(*block) for block in zip(*blocks, strict=False)])
