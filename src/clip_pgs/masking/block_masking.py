"""Block patch masking (CLIPA, https://arxiv.org/abs/2305.07017).

What stays is one rectangle with the proportions of the image, at a random place.
"""

from __future__ import annotations

import torch

from clip_pgs.masking.fixed_ratio import FixedRatioMasking
from clip_pgs.masking.grid import grid_coordinates, nearest_rectangle
from clip_pgs.masking.ratios import keep_count
from clip_pgs.masking.registry import register_masking
from clip_pgs.masking.sampling import draw_noise, second_draw, select_top
from clip_pgs.masking.types import PatchInputs, PatchSelection


@register_masking("block")
class BlockMasking(FixedRatioMasking):
    """Keep one contiguous block of patches, trimmed or filled at random to the count."""

    def forward(
        self, inputs: PatchInputs, *, generator: torch.Generator | None = None
    ) -> PatchSelection:
        """Keep the patches of the block first, then those with the highest random numbers."""
        noise_BN = draw_noise(inputs, generator)
        num_keep = keep_count(inputs.num_patches, self.mask_ratio)
        rows, columns = nearest_rectangle(inputs.grid_size, num_keep)
        row_N, column_N = grid_coordinates(inputs.grid_size, inputs.device)
        place_BN = second_draw(noise_BN)
        top_B1 = (place_BN[:, :1] * (inputs.grid_size[0] - rows + 1)).long()
        left_B1 = (place_BN[:, -1:] * (inputs.grid_size[1] - columns + 1)).long()
        is_inside_BN = (row_N >= top_B1) & (row_N < top_B1 + rows)
        is_inside_BN &= (column_N >= left_B1) & (column_N < left_B1 + columns)
        return select_top(is_inside_BN + noise_BN, num_keep=num_keep)
