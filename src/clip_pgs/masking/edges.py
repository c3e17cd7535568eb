"""Edge strength of every patch: Sobel gradient magnitude, averaged per patch."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from clip_pgs.masking.grid import patch_grid, patch_sides

_LUMINANCE = (0.299, 0.587, 0.114)  # ITU-R BT.601


def sobel_edges(pixels: Tensor, patch_size: int | tuple[int, int]) -> Tensor:
    """Measure how much edge each patch holds.

    The 3x3 Sobel pair runs over the luminance at pixel resolution with replicated borders; the
    gradient magnitude is averaged over each patch and min-max scaled per image.

    Args:
        pixels: Images, normalised or not. Shape (B, 3, H, W), any float dtype.
        patch_size: Side of a patch in pixels, or (height, width). It must divide H and W.

    Returns:
        Edge strength in [0, 1], raster order, shape (B, N), float32. All zeros for an image
        without any gradient.

    Raises:
        ValueError: If `pixels` is not (B, 3, H, W) or the patch does not divide the image.
    """
    if pixels.ndim != 4 or pixels.shape[1] != len(_LUMINANCE):
        raise ValueError(f"pixels must have shape (B, 3, H, W), got {tuple(pixels.shape)}")
    height, width = pixels.shape[-2:]
    patch_height, patch_width = sides = patch_sides(patch_size)
    rows, columns = patch_grid((height, width), sides)

    red, green, blue = pixels.detach().float().unbind(1)
    luminance = _LUMINANCE[0] * red + _LUMINANCE[1] * green + _LUMINANCE[2] * blue
    padded = functional.pad(luminance[:, None], (1, 1, 1, 1), mode="replicate")[:, 0]
    # The kernel is separable, and slices stay float32 where autocast would lower a convolution.
    smooth_rows = padded[:, :-2] + 2 * padded[:, 1:-1] + padded[:, 2:]
    smooth_columns = padded[:, :, :-2] + 2 * padded[:, :, 1:-1] + padded[:, :, 2:]
    gradient_x = smooth_rows[:, :, 2:] - smooth_rows[:, :, :-2]
    gradient_y = smooth_columns[:, 2:] - smooth_columns[:, :-2]
    magnitude = torch.hypot(gradient_x, gradient_y)

    cells = magnitude.reshape(-1, rows, patch_height, columns, patch_width)
    edges_BN = cells.mean(dim=(2, 4)).flatten(1)
    low_B1, high_B1 = edges_BN.aminmax(dim=1, keepdim=True)
    span_B1 = (high_B1 - low_B1).clamp_min(torch.finfo(edges_BN.dtype).tiny)
    return (edges_BN - low_B1) / span_B1
