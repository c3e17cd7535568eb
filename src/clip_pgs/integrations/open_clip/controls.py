"""What a caller sets and reads between the steps of a masked model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from clip_pgs.integrations.open_clip.towers import image_tower, patch_grid, tower_masking
from clip_pgs.masking import PatchSelection


def set_masking_progress(model: nn.Module, progress: float) -> None:
    """Tell the strategy how far training has come.

    Args:
        model: A masked model, also wrapped by DDP or `torch.compile`.
        progress: Completed share of the masked training steps, in [0, 1].

    Raises:
        ValueError: If the model is not masked or `progress` is out of its range.
    """
    if not 0.0 <= progress <= 1.0:
        raise ValueError(f"progress must be in [0, 1], got {progress}")
    tower_masking(model).progress = float(progress)


def set_mask_ratio(model: nn.Module, mask_ratio: float) -> None:
    """Change the strategy's mask ratio, as a schedule does; `MaskingStrategy` says how.

    Args:
        model: A masked model, also wrapped.
        mask_ratio: Share of patches dropped from now on, in [0, 1).

    Raises:
        ValueError: If the model is not masked, its strategy has no mask ratio, or the ratio is
            out of its range.
    """
    tower_masking(model).strategy.set_mask_ratio(mask_ratio)


def set_masking_noise(model: nn.Module, noise: Tensor | None) -> None:
    """Give the random numbers that the coming forward passes choose patches by.

    With the same noise a forward pass repeats its selection, which is what the second pass of
    gradient accumulation needs.

    Args:
        model: A masked model, also wrapped.
        noise: Uniform numbers in [0, 1) on the model's device, shape (B, N), float32. None goes
            back to drawing from the global stream.

    Raises:
        ValueError: If the model is not masked.
    """
    tower_masking(model).noise = noise


@contextmanager
def force_selection(model: nn.Module, selection: PatchSelection) -> Iterator[None]:
    """Use a given selection in place of the strategy's, inside a `with` block.

    Args:
        model: A masked model, also wrapped.
        selection: Patches to keep in every forward pass.

    Raises:
        ValueError: If the model is not masked.
    """
    masking = tower_masking(model)
    masking.forced_selection = selection
    try:
        yield
    finally:
        masking.forced_selection = None


def last_selection(model: nn.Module) -> PatchSelection | None:
    """Return what the latest masked forward pass kept, None before the first.

    Raises:
        ValueError: If the model is not masked.
    """
    return tower_masking(model).last_selection


def num_patches(model: nn.Module) -> int:
    """Return the number of patches that the image tower cuts an image into.

    Raises:
        ValueError: If the tower is one that cannot be masked.
    """
    return patch_grid(model).num_patches


def patch_size(model: nn.Module) -> tuple[int, int]:
    """Return the (height, width) in pixels of the image tower's patches.

    Raises:
        ValueError: If the tower is one that cannot be masked.
    """
    return patch_grid(model).patch_size


def pixel_dtype(model: nn.Module) -> torch.dtype:
    """Return the dtype that images must have outside autocast.

    Raises:
        ValueError: If the tower is one that cannot be masked.
    """
    tower, kind = image_tower(model)
    return kind.patch_weight(tower).dtype
