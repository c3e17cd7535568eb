"""Masking that looks at no image: none, random, Gaussian, grid and block.

Sources: FLIP (https://arxiv.org/abs/2212.00794) for `random`, GLIP
(https://arxiv.org/abs/2403.15837) for `gaussian`, CLIPA (https://arxiv.org/abs/2305.07017) for
`grid` and `block`.

Deliberate differences: `random` and `gaussian` round their count as every strategy does, and
`gaussian` takes any grid, which spans [-1, 1] along each side. `grid` and `block` keep exactly the
stated count at any ratio.
"""

from __future__ import annotations

import math

import torch
from torch import Generator, Tensor

from clip_pgs.common import check_choice
from clip_pgs.masking.sampling import (
    draw_noise,
    grid_coordinates,
    gumbel,
    log_center_weight,
    second_draw,
    select_top,
)
from clip_pgs.masking.strategy import (
    MASK_RATIO,
    FixedRatioMasking,
    MaskingStrategy,
    PatchInputs,
    PatchSelection,
    check_range,
    register_masking,
)


@register_masking("none", keeps="all", paper="CLIP, arXiv 2103.00020", random=False)
class NoMasking(MaskingStrategy):
    """Keep every patch."""

    keeps_all = True

    def forward(self, inputs: PatchInputs, *, generator: Generator | None = None) -> PatchSelection:
        """Return every patch of every image, in raster order."""
        index_N = torch.arange(inputs.num_patches, device=inputs.device)
        return PatchSelection(index=index_N.repeat(inputs.batch_size, 1))


@register_masking("random", keeps="uniformly", paper="FLIP, arXiv 2212.00794")
class RandomMasking(FixedRatioMasking):
    """Keep a uniformly random subset of the patches."""

    def forward(self, inputs: PatchInputs, *, generator: Generator | None = None) -> PatchSelection:
        """Keep the patches with the highest random numbers."""
        return select_top(draw_noise(inputs, generator), num_keep=self.num_keep(inputs))


@register_masking(
    "gaussian",
    keeps="near the center, at random",
    paper="GLIP, arXiv 2403.15837",
    variants=({"rule": "weights"}, {"rule": "weights", "sigma": 0.5}),
)
class GaussianMasking(FixedRatioMasking):
    """Keep patches near the middle of the image, by one of two rules.

    GLIP's released code, with which its figures were made, adds a uniform number to the density of
    a Gaussian of covariance 0.2 I on a grid over [-1, 1]^2, 0.796 in the middle, and keeps the
    highest sums. At ratio 0.5 a corner is then kept with 0.30; by "weights" with 0.02.

    Args:
        mask_ratio: Share of patches dropped, in [0, 1).
        rule: "released", as above, or "weights", which draws patches without replacement, with
            the odds of a Gaussian.
        sigma: Standard deviation of that of "weights" as a share of each of the image's sides, in
            [0.001, 1e6]; None is 0.2.

    Raises:
        ValueError: If an option is out of its range, or `sigma` goes with another rule.
    """

    def __init__(
        self, *, mask_ratio: float = MASK_RATIO, rule: str = "released", sigma: float | None = None
    ) -> None:
        super().__init__(mask_ratio=mask_ratio)
        check_choice(rule, ("released", "weights"), name="rule")
        check_range(sigma, name="sigma", low=1e-3, high=1e6, optional=True)
        if sigma is not None and rule != "weights":
            raise ValueError(f"sigma goes with rule=weights, got rule={rule}")
        self.rule = rule
        self.sigma = 0.2 if sigma is None else sigma

    def forward(self, inputs: PatchInputs, *, generator: Generator | None = None) -> PatchSelection:
        """Keep the top of uniform numbers plus a density, or of Gumbel numbers plus log odds."""
        noise_BN = draw_noise(inputs, generator)
        if self.rule == "released":
            keys_BN = noise_BN + _center_density(inputs.grid_size, inputs.device)
        else:
            log_odds_N = log_center_weight(inputs.grid_size, inputs.device, sigma=self.sigma)
            keys_BN = gumbel(noise_BN) + log_odds_N
        return select_top(keys_BN, num_keep=self.num_keep(inputs))


def _center_density(grid_size: tuple[int, int], device: torch.device) -> Tensor:
    """Return GLIP's density at patches that span [-1, 1] along each side, shape (N,)."""
    row_N, column_N = grid_coordinates(grid_size, device)
    # A side of one patch lies in the middle.
    y_N, x_N = (
        2 * line_N / (count - 1) - 1 if count > 1 else torch.zeros_like(line_N)
        for line_N, count in zip((row_N, column_N), grid_size, strict=True)
    )
    variance = 0.2
    return torch.exp(-(y_N**2 + x_N**2) / (2 * variance)) / (2 * math.pi * variance)


@register_masking("grid", keeps="a regular grid", paper="CLIPA, arXiv 2305.07017")
class GridMasking(FixedRatioMasking):
    """Keep evenly spaced rows and columns of patches, trimmed or filled at random to the count.

    At a ratio of 0.75 one patch out of every 2 x 2 is kept, as in the paper. Any other ratio takes
    the evenly spaced grid with about as many patches; its offset is random in every image.
    """

    def forward(self, inputs: PatchInputs, *, generator: Generator | None = None) -> PatchSelection:
        """Keep the patches on the grid first, then those with the highest random numbers."""
        noise_BN = draw_noise(inputs, generator)
        num_keep = self.num_keep(inputs)
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


@register_masking("block", keeps="one rectangle", paper="CLIPA, arXiv 2305.07017")
class BlockMasking(FixedRatioMasking):
    """Keep one block of patches in the image's proportions, trimmed or filled to the count."""

    def forward(self, inputs: PatchInputs, *, generator: Generator | None = None) -> PatchSelection:
        """Keep the patches of the block first, then those with the highest random numbers."""
        noise_BN = draw_noise(inputs, generator)
        num_keep = self.num_keep(inputs)
        rows, columns = nearest_rectangle(inputs.grid_size, num_keep)
        row_N, column_N = grid_coordinates(inputs.grid_size, inputs.device)
        place_BN = second_draw(noise_BN)
        top_B1 = (place_BN[:, :1] * (inputs.grid_size[0] - rows + 1)).long()
        left_B1 = (place_BN[:, -1:] * (inputs.grid_size[1] - columns + 1)).long()
        is_inside_BN = (row_N >= top_B1) & (row_N < top_B1 + rows)
        is_inside_BN &= (column_N >= left_B1) & (column_N < left_B1 + columns)
        return select_top(is_inside_BN + noise_BN, num_keep=num_keep)


def nearest_rectangle(grid_size: tuple[int, int], count: int) -> tuple[int, int]:
    """Return rows and columns of about `count` cells, in the proportions of a grid.

    Args:
        grid_size: (h, w) of the grid around it.
        count: Cells asked for, in [1, h * w].
    """
    short, long = sorted(grid_size)
    across = min(max(round(math.sqrt(count * short / long)), 1), short)
    along = min(max(round(count / across), 1), long)
    return (across, along) if grid_size[0] == short else (along, across)
