"""Centred patch masking (GLIP, https://arxiv.org/abs/2403.15837).

Patches are kept with odds that fall off from the middle of the image as a Gaussian does. GLIP's
standard deviation is a share of the side; on an image that is not square each side has its own.
"""

from __future__ import annotations

import torch

from clip_pgs.masking.fixed_ratio import FixedRatioMasking
from clip_pgs.masking.grid import log_center_weight
from clip_pgs.masking.ratios import check_range, keep_count
from clip_pgs.masking.registry import register_masking
from clip_pgs.masking.sampling import draw_noise, gumbel, select_top
from clip_pgs.masking.types import PatchInputs, PatchSelection


@register_masking("gaussian")
class GaussianMasking(FixedRatioMasking):
    """Keep patches drawn without replacement, with odds of a centred Gaussian.

    Args:
        mask_ratio: Share of patches dropped, in [0, 1).
        sigma: Standard deviation of the Gaussian as a share of the image's side, in
            [0.001, 1e6].

    Raises:
        ValueError: If an option is out of its range.
    """

    def __init__(self, *, mask_ratio: float = 0.5, sigma: float = 0.2) -> None:
        super().__init__(mask_ratio=mask_ratio)
        check_range(sigma, name="sigma", low=1e-3, high=1e6)
        self.sigma = sigma

    def extra_repr(self) -> str:
        """Show the options in the module's printed form."""
        return f"{super().extra_repr()}, sigma={self.sigma}"

    def forward(
        self, inputs: PatchInputs, *, generator: torch.Generator | None = None
    ) -> PatchSelection:
        """Keep the top of Gumbel numbers shifted by the log of the odds."""
        log_odds_N = log_center_weight(inputs.grid_size, inputs.device, sigma=self.sigma)
        keys_BN = gumbel(draw_noise(inputs, generator)) + log_odds_N
        return select_top(keys_BN, num_keep=keep_count(inputs.num_patches, self.mask_ratio))
