"""A crop that PGS chooses: what stays is the window whose patches it would mask last (ours).

CLIP-PGS (`pgs.py`) gives each patch a score, the highest of which are masked. Here the scores of
all windows of one size are summed, and the window with the lowest sum stays. A vision transformer
encodes its patches as it does those of any other strategy. A convolutional tower can leave nothing
else out: it takes the window alone, cut out, so that its FLOPs fall with the window's area.
"""

from __future__ import annotations

import torch
from torch import Generator
from torch.nn import functional

from clip_pgs.masking.pgs import PGSMasking
from clip_pgs.masking.sampling import draw_noise
from clip_pgs.masking.strategy import (
    MaskingStrategy,
    PatchInputs,
    PatchSelection,
    check_share,
    register_masking,
)


@register_masking(
    "saliency-crop",
    keeps="the window of lowest scores",
    paper="ours, with the scores of CLIP-PGS, arXiv 2503.17080",
    requires={"tokens"},
    variants=[{"side": 0.75}, {"side": 1.0}],
)
class SaliencyCropMasking(MaskingStrategy):
    """Keep the window of patches with the lowest sum of PGS scores; there is no mask ratio.

    Args:
        side: The window's share of each side of the image, in (0, 1], rounded to patches, at least
            one; 0.5 keeps a quarter of the image.

    Raises:
        ValueError: If `side` is out of its range.
    """

    keeps_window = True

    def __init__(self, *, side: float = 0.5) -> None:
        super().__init__()
        check_share(side, name="side")
        self.side = side
        self.pgs = PGSMasking()

    def forward(self, inputs: PatchInputs, *, generator: Generator | None = None) -> PatchSelection:
        """Score all patches as PGS does, and keep the window with the lowest sum."""
        scores_BN = self.pgs.steps(inputs, draw_noise(inputs, generator)).scores
        columns = inputs.grid_size[1]
        window = (self._length(inputs.grid_size[0]), self._length(columns))
        grid = scores_BN.unflatten(1, (1, *inputs.grid_size))
        mean = functional.avg_pool2d(grid, window, stride=1)
        # Sorted, since the place of one of several minima is nobody's promise.
        first_B1 = mean.flatten(1).sort(dim=1, stable=True).indices[:, :1]
        top_B1, left_B1 = first_B1 // mean.shape[-1], first_B1 % mean.shape[-1]
        row, column = (torch.arange(length, device=inputs.device) for length in window)
        inside_K = (row[:, None] * columns + column).flatten()
        return PatchSelection(top_B1 * columns + left_B1 + inside_K, window=window)

    def _length(self, side: int) -> int:
        return max(1, round(self.side * side))
