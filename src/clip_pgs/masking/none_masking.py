"""No masking: plain CLIP (https://arxiv.org/abs/2103.00020)."""

from __future__ import annotations

import torch

from clip_pgs.masking.registry import register_masking
from clip_pgs.masking.types import MaskingStrategy, PatchInputs, PatchSelection


@register_masking("none")
class NoMasking(MaskingStrategy):
    """Keep every patch."""

    keeps_all = True

    def forward(
        self, inputs: PatchInputs, *, generator: torch.Generator | None = None
    ) -> PatchSelection:
        """Return every patch of every image, in raster order."""
        index_N = torch.arange(inputs.num_patches, device=inputs.device)
        return PatchSelection(index=index_N.repeat(inputs.batch_size, 1))
