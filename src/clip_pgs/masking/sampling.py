"""Which patches are masked, and the random numbers behind them."""

from __future__ import annotations

import torch
from torch import Tensor

from clip_pgs.masking.types import PatchInputs, PatchSelection


def draw_noise(inputs: PatchInputs, generator: torch.Generator | None) -> Tensor:
    """Return one uniform number per patch, in [0, 1), shape (B, N), float32.

    `inputs.noise` is returned where given, and nothing is drawn.
    """
    if inputs.noise is not None:
        return inputs.noise
    size = (inputs.batch_size, inputs.num_patches)
    return torch.rand(size, generator=generator, device=inputs.device, dtype=torch.float32)


def second_draw(noise: Tensor) -> Tensor:
    """Derive further uniform numbers in [0, 1) from given ones, of the same shape.

    They are the low 16 of a random number's 24 bits, so that they have next to no correlation
    with its size (1 / 256) and none with its neighbours.
    """
    return (noise * 256).frac()


def gumbel(noise: Tensor) -> Tensor:
    """Turn uniform numbers in [0, 1) into standard Gumbel ones of the same shape."""
    # log(0) would be -inf; the smallest normal float32 stands for 0.
    return -(-noise.clamp_min(torch.finfo(noise.dtype).tiny).log()).log()


def select_top(scores: Tensor, *, num_keep: int) -> PatchSelection:
    """Keep the `num_keep` patches with the highest scores; ties go to the lower index.

    Args:
        scores: Shape (B, N).
        num_keep: Patches kept per image, in [1, N].
    """
    order_BN = scores.sort(dim=1, descending=True, stable=True).indices
    return PatchSelection(index=order_BN[:, :num_keep].sort(dim=1).values)


def mask_top(scores: Tensor, *, num_mask: int) -> PatchSelection:
    """Mask the `num_mask` patches with the highest scores; ties go to the lower index.

    Args:
        scores: Shape (B, N).
        num_mask: Patches masked per image, in [0, N - 1].
    """
    order_BN = scores.sort(dim=1, descending=True, stable=True).indices
    return PatchSelection(index=order_BN[:, num_mask:].sort(dim=1).values)


def mask_top_counts(scores: Tensor, *, num_mask: Tensor, num_mask_min: int) -> PatchSelection:
    """Mask, in each image, its own number of the highest scores; ties go to the lower index.

    Args:
        scores: Shape (B, N).
        num_mask: Patches masked in each image, at least `num_mask_min`. Shape (B,), int64.
        num_mask_min: Lower bound of `num_mask`; it alone sets the number of slots.

    Returns:
        Selection with K = N - num_mask_min slots and `valid`.
    """
    num_patches = scores.shape[1]
    order_BN = scores.sort(dim=1, descending=True, stable=True).indices
    position_N = torch.arange(num_patches, device=scores.device)
    # A masked patch gets a position past the end, so that sorting puts kept ones first.
    position_BN = torch.where(position_N < num_mask[:, None], num_patches, order_BN)
    slots_BK = position_BN.sort(dim=1).values[:, : num_patches - num_mask_min]
    valid_BK = slots_BK < num_patches
    last_B = valid_BK.sum(dim=1, keepdim=True) - 1
    index_BK = torch.where(valid_BK, slots_BK, slots_BK.gather(1, last_B))
    return PatchSelection(index=index_BK, valid=valid_BK)
