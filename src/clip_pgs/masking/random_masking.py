"""Uniform random patch masking (FLIP, https://arxiv.org/abs/2212.00794)."""

from __future__ import annotations

import torch

from clip_pgs.masking.fixed_ratio import FixedRatioMasking
from clip_pgs.masking.ratios import keep_count
from clip_pgs.masking.registry import register_masking
from clip_pgs.masking.sampling import draw_noise, select_top
from clip_pgs.masking.types import PatchInputs, PatchSelection


@register_masking("random")
class RandomMasking(FixedRatioMasking):
    """Keep a uniformly random subset of the patches."""

    def forward(
        self, inputs: PatchInputs, *, generator: torch.Generator | None = None
    ) -> PatchSelection:
        """Keep the patches with the highest random numbers."""
        noise_BN = draw_noise(inputs, generator)
        return select_top(noise_BN, num_keep=keep_count(inputs.num_patches, self.mask_ratio))
