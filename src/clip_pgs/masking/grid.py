"""How an image divides into patches, and where on that grid they lie."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def patch_sides(patch_size: int | tuple[int, int]) -> tuple[int, int]:
    """Return (height, width) of a patch given as one side or as both.

    Raises:
        ValueError: If a side is below 1.
    """
    height, width = (patch_size, patch_size) if isinstance(patch_size, int) else patch_size
    if height < 1 or width < 1:
        raise ValueError(f"patch_size must be at least 1, got {(height, width)}")
    return height, width


def patch_grid(image_size: tuple[int, int], sides: tuple[int, int]) -> tuple[int, int]:
    """Return how many patches of these sides lie below and beside each other in an image.

    Args:
        image_size: (height, width) in pixels.
        sides: (height, width) of a patch.

    Raises:
        ValueError: If the patch does not divide the image.
    """
    (height, width), (patch_height, patch_width) = image_size, sides
    if height % patch_height or width % patch_width:
        raise ValueError(
            f"patch_size must divide the image: {height} x {width} pixels "
            f"in patches of {patch_height} x {patch_width}"
        )
    return height // patch_height, width // patch_width


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


def grid_coordinates(grid_size: tuple[int, int], device: torch.device) -> tuple[Tensor, Tensor]:
    """Return row and column of every patch in raster order, two of shape (N,), int64."""
    position_N = torch.arange(grid_size[0] * grid_size[1], device=device)
    return position_N // grid_size[1], position_N % grid_size[1]


def is_on_border(grid_size: tuple[int, int], device: torch.device) -> Tensor:
    """Return which patches lie in the outermost rows and columns, shape (N,), bool."""
    row_N, column_N = grid_coordinates(grid_size, device)
    is_outer_row_N = (row_N == 0) | (row_N == grid_size[0] - 1)
    return is_outer_row_N | (column_N == 0) | (column_N == grid_size[1] - 1)


def log_center_weight(
    grid_size: tuple[int, int], device: torch.device, *, sigma: float = 0.2
) -> Tensor:
    """Weigh patches by a Gaussian around the middle of the image, in logarithm.

    Args:
        grid_size: (h, w) of the grid.
        device: Where the result lies.
        sigma: Standard deviation as a share of each side.

    Returns:
        Logarithms at the centres of the patches, at most 0, shape (N,), float32.
    """
    row_N, column_N = grid_coordinates(grid_size, device)
    y_N = (row_N + 0.5) / grid_size[0] - 0.5
    x_N = (column_N + 0.5) / grid_size[1] - 0.5
    return -(y_N.square() + x_N.square()) / (2 * sigma**2)
