"""Edge strength of every patch: Sobel gradient magnitude, averaged per patch."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from clip_pgs.masking.blocks import in_blocks
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
    return in_blocks(lambda images: _sobel_strength(images, patch_size), pixels)


def _sobel_strength(pixels: Tensor, patch_size: int | tuple[int, int]) -> Tensor:
    gradient_x, gradient_y = sobel_gradients(luminance(pixels))
    magnitude = gradient_x.square_().addcmul_(gradient_y, gradient_y).sqrt_()
    return patch_strength(magnitude, patch_size)


def luminance(pixels: Tensor) -> Tensor:
    """Return how bright each pixel is, shape (B, H, W), float32, without gradient.

    Raises:
        ValueError: If `pixels` is not (B, 3, H, W).
    """
    if pixels.ndim != 4 or pixels.shape[1] != len(_LUMINANCE):
        raise ValueError(f"pixels must have shape (B, 3, H, W), got {tuple(pixels.shape)}")
    red, green, blue = pixels.detach().float().unbind(1)
    brightness = (_LUMINANCE[0] * red).add_(green, alpha=_LUMINANCE[1])
    return brightness.add_(blue, alpha=_LUMINANCE[2])


def sobel_gradients(brightness: Tensor) -> tuple[Tensor, Tensor]:
    """Return the 3x3 Sobel pair (towards the right, downwards) of images (B, H, W)."""
    padded = functional.pad(brightness[:, None], (1, 1, 1, 1), mode="replicate")[:, 0]
    # The kernel is separable, and slices stay float32 where autocast would lower a convolution.
    smooth_rows = torch.add(padded[:, :-2], padded[:, 1:-1], alpha=2).add_(padded[:, 2:])
    smooth_columns = torch.add(padded[:, :, :-2], padded[:, :, 1:-1], alpha=2)
    smooth_columns = smooth_columns.add_(padded[:, :, 2:])
    gradient_x = smooth_rows[:, :, 2:] - smooth_rows[:, :, :-2]
    gradient_y = smooth_columns[:, 2:] - smooth_columns[:, :-2]
    return gradient_x, gradient_y


def patch_strength(strength: Tensor, patch_size: int | tuple[int, int]) -> Tensor:
    """Average a map over each patch and scale it to [0, 1] per image.

    Args:
        strength: One number per pixel. Shape (B, H, W), float32.
        patch_size: Side of a patch in pixels, or (height, width). It must divide H and W.

    Returns:
        Strength of each patch in raster order, shape (B, N). All zeros for a constant map.

    Raises:
        ValueError: If the patch does not divide the image.
    """
    height, width = strength.shape[-2:]
    patch_height, patch_width = sides = patch_sides(patch_size)
    rows, columns = patch_grid((height, width), sides)
    cells = strength.reshape(-1, rows, patch_height, columns, patch_width)
    edges_BN = cells.mean(dim=(2, 4)).flatten(1)
    low_B1, high_B1 = edges_BN.aminmax(dim=1, keepdim=True)
    span_B1 = (high_B1 - low_B1).clamp_min(torch.finfo(edges_BN.dtype).tiny)
    return (edges_BN - low_B1) / span_B1
