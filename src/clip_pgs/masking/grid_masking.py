"""Regular-grid patch masking (CLIPA, https://arxiv.org/abs/2305.07017).

At a ratio of 0.75 one patch out of every 2 x 2 is kept, as in the paper. Any other ratio takes
the evenly spaced grid with about as many patches; its offset is random in every image.
"""

from __future__ import annotations

import torch
from torch import Tensor

from clip_pgs.masking.fixed_ratio import FixedRatioMasking
from clip_pgs.masking.grid import grid_coordinates, nearest_rectangle
from clip_pgs.masking.ratios import keep_count
from clip_pgs.masking.registry import register_masking
from clip_pgs.masking.sampling import draw_noise, second_draw, select_top
from clip_pgs.masking.types import PatchInputs, PatchSelection


@register_masking("grid")
class GridMasking(FixedRatioMasking):
    """Keep evenly spaced rows and columns of patches, trimmed or filled at random to the count."""

    def forward(
        self, inputs: PatchInputs, *, generator: torch.Generator | None = None
    ) -> PatchSelection:
        """Keep the patches on the grid first, then those with the highest random numbers."""
        noise_BN = draw_noise(inputs, generator)
        num_keep = keep_count(inputs.num_patches, self.mask_ratio)
        row_N, column_N = grid_coordinates(inputs.grid_size, inputs.device)
        rows, columns = nearest_rectangle(inputs.grid_size, num_keep)
        offset_BN = second_draw(noise_BN)
        is_on_grid_BN = _is_kept_line(row_N, rows, inputs.grid_size[0], offset_BN[:, :1])
        is_on_grid_BN &= _is_kept_line(column_N, columns, inputs.grid_size[1], offset_BN[:, -1:])
        return select_top(is_on_grid_BN + noise_BN, num_keep=num_keep)


def _is_kept_line(line_N: Tensor, num_kept: int, num_lines: int, offset_B1: Tensor) -> Tensor:
    """Return whether rows or columns are among the evenly spaced kept ones, shape (B, N)."""
    # Steps of num_kept around a ring of num_lines fall below num_kept at even distances.
    step_BN = line_N * num_kept + (offset_B1 * num_lines).long()
    return step_BN % num_lines < num_kept
