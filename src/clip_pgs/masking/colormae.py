"""Filtered noise (ColorMAE, https://arxiv.org/abs/2407.13036): masks in blobs, blind to the image.

White noise over the grid of patches is filtered by Gaussians, and the patches with the highest
numbers stay. In the paper's words "red" noise passes low frequencies, "blue" high ones, "green" a
band, "purple" all but that band; green was its best for masked autoencoders.

Deliberate differences: the paper cuts windows out of filtered noise made beforehand, of 3,072 of
its pixels a side, whose files do not state their filters; here each mask is filtered when it is
drawn, with a filter that goes around the edges, so that every patch is kept as often. The width of
the filter is an option of ours.
"""

from __future__ import annotations

import torch
from torch import Generator, Tensor

from clip_pgs.common import check_choice
from clip_pgs.masking.sampling import draw_noise, full_precision, select_top
from clip_pgs.masking.strategy import (
    MASK_RATIO,
    FixedRatioMasking,
    PatchInputs,
    PatchSelection,
    check_range,
    register_masking,
)

COLORS = ("green", "red", "blue", "purple")


@register_masking(
    "colormae",
    keeps="where filtered noise is high",
    paper="ColorMAE, arXiv 2407.13036",
    variants=({"color": "red"}, {"color": "blue"}, {"color": "purple", "sigma": 1.5}),
)
class ColorMaeMasking(FixedRatioMasking):
    """Keep the patches where filtered noise is highest.

    Args:
        mask_ratio: Share of patches dropped, in [0, 1).
        color: The frequencies that stay in the noise: green (a band), red (low), blue (high) or
            purple (all but a band).
        sigma: Standard deviation of the Gaussian filter in patches, in [0.1, 100]; a band lies
            between it and its double.

    Raises:
        ValueError: If an option is out of its range.
    """

    def __init__(
        self, *, mask_ratio: float = MASK_RATIO, color: str = "green", sigma: float = 0.75
    ) -> None:
        super().__init__(mask_ratio=mask_ratio)
        check_choice(color, COLORS, name="color")
        check_range(sigma, name="sigma", low=0.1, high=100)
        self.color = color
        self.sigma = sigma

    def forward(self, inputs: PatchInputs, *, generator: Generator | None = None) -> PatchSelection:
        """Filter one random number per patch, and keep the highest."""
        noise_BN = draw_noise(inputs, generator).float()
        white_BHW = noise_BN.unflatten(1, inputs.grid_size)
        with full_precision(noise_BN):
            filtered_BHW = _blur(white_BHW, self.sigma)
            if self.color in ("green", "purple"):
                filtered_BHW = filtered_BHW - _blur(white_BHW, 2 * self.sigma)
            if self.color in ("blue", "purple"):
                filtered_BHW = white_BHW - filtered_BHW
        return select_top(filtered_BHW.flatten(1), num_keep=self.num_keep(inputs))


def _blur(images_BHW: Tensor, sigma: float) -> Tensor:
    """Convolve with a Gaussian that goes around the edges."""
    rows_HH, columns_WW = (
        _circular_gaussian(size, sigma, images_BHW.device) for size in images_BHW.shape[1:]
    )
    return rows_HH @ images_BHW @ columns_WW


def _circular_gaussian(size: int, sigma: float, device: torch.device) -> Tensor:
    """Return the weights with which lines of a ring are averaged, symmetric, shape (size, size)."""
    place = torch.arange(size, device=device)
    distance = (place[:, None] - place).abs().float()
    distance = torch.minimum(distance, size - distance)
    weights = torch.exp(-0.5 * (distance / sigma) ** 2)
    return weights / weights.sum(dim=1, keepdim=True)
