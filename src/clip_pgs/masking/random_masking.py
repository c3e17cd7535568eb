"""Uniform random patch masking (FLIP, https://arxiv.org/abs/2212.00794)."""

from __future__ import annotations

import torch

from clip_pgs.masking.ratios import check_mask_ratio, keep_count
from clip_pgs.masking.registry import register_masking
from clip_pgs.masking.sampling import draw_noise, select_top
from clip_pgs.masking.types import MaskingStrategy, PatchInputs, PatchSelection


@register_masking("random")
class RandomMasking(MaskingStrategy):
    """Keep a uniformly random subset of the patches.

    Args:
        mask_ratio: Share of patches dropped, in [0, 1).

    Raises:
        ValueError: If `mask_ratio` is out of its range.
    """

    def __init__(self, *, mask_ratio: float = 0.5) -> None:
        super().__init__()
        check_mask_ratio(mask_ratio)
        self.mask_ratio = mask_ratio

    def extra_repr(self) -> str:
        """Show the options in the module's printed form."""
        return f"mask_ratio={self.mask_ratio}"

    def forward(
        self, inputs: PatchInputs, *, generator: torch.Generator | None = None
    ) -> PatchSelection:
        """Keep the patches with the highest random numbers."""
        noise_BN = draw_noise(inputs, generator)
        return select_top(noise_BN, num_keep=keep_count(inputs.num_patches, self.mask_ratio))
