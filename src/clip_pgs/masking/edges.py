"""Edge strength of every patch: Sobel gradient magnitude, averaged per patch; Canny beside it."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional

from clip_pgs.masking.sampling import in_blocks
from clip_pgs.masking.strategy import check_pixels, patch_grid, patch_sides

_LUMINANCE = (0.299, 0.587, 0.114)  # ITU-R BT.601


def sobel_edges(pixels: Tensor, patch_size: int | tuple[int, int]) -> Tensor:
    """Measure how much edge each patch holds.

    The 3x3 Sobel pair runs over the luminance at pixel resolution with replicated borders; the
    gradient magnitude is averaged over each patch and min-max scaled per image.

    Args:
        pixels: Images, normalized or not, in any scale that float32 holds. Shape (B, 3, H, W), any
            float dtype.
        patch_size: Side of a patch in pixels, or (height, width). It must divide H and W.

    Returns:
        Edge strength in [0, 1], raster order, shape (B, N), float32. All zeros for an image
        without any gradient.

    Raises:
        ValueError: If `pixels` is not (B, 3, H, W), or not floating point, or the patch does not
            divide the image.
    """
    check_pixels(pixels, num_channels=len(_LUMINANCE))

    def strength(images: Tensor) -> Tensor:
        gradient_x, gradient_y = sobel_gradients(_near_one(luminance(images)))
        magnitude = gradient_x.square_().addcmul_(gradient_y, gradient_y).sqrt_()
        return patch_strength(magnitude, patch_size)

    return in_blocks(strength, pixels)


def luminance(pixels: Tensor) -> Tensor:
    """Return how bright each pixel is, shape (B, H, W), float32, without gradient."""
    red, green, blue = pixels.detach().float().unbind(1)
    brightness = (_LUMINANCE[0] * red).add_(green, alpha=_LUMINANCE[1])
    return brightness.add_(blue, alpha=_LUMINANCE[2])


def _near_one(brightness: Tensor) -> Tensor:
    """Scale images (B, H, W), in place, so that no square of theirs overflows or vanishes.

    Each is multiplied by a power of two, which rounds nothing.
    """
    # The powers beyond would not be normal numbers.
    peak_B11 = brightness.abs().amax(dim=(1, 2), keepdim=True).clamp(2.0**-125, 2.0**125)
    mantissa_B11, _ = torch.frexp(peak_B11)
    return brightness.mul_(mantissa_B11 / peak_B11)


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


# ------------------------------------------------------------------------------------------------
# The paper's ablation: Canny (https://doi.org/10.1109/TPAMI.1986.4767851)
#
# Two differences from the usual detector, so that it needs neither tuning nor the host: thresholds
# are shares of an image's strongest gradient, and hysteresis runs a fixed number of steps, which
# ends a weak line that many pixels behind its last strong one.
# ------------------------------------------------------------------------------------------------

LOW, HIGH = 0.1, 0.2  # shares of the strongest gradient of the image
HYSTERESIS_STEPS = 16  # pixels

_SIGMA, _RADIUS = 1.0, 2  # of the blur, in pixels


def canny_edges(pixels: Tensor, patch_size: int | tuple[int, int]) -> Tensor:
    """Measure the share of edge pixels in each patch.

    Args:
        pixels: Images, normalized or not. Shape (B, 3, H, W), any float dtype; H and W at least 3.
        patch_size: Side of a patch in pixels, or (height, width). It must divide H and W.

    Returns:
        Edge strength in [0, 1] after min-max scaling per image, raster order, shape (B, N),
        float32. All zeros for an image without any edge.

    Raises:
        ValueError: As of `sobel_edges`.
    """
    return patch_strength(canny_map(pixels).float(), patch_size)


def canny_map(pixels: Tensor) -> Tensor:
    """Return which pixels lie on an edge, shape (B, H, W), bool; see `canny_edges`."""
    check_pixels(pixels, num_channels=len(_LUMINANCE))
    gradient_x, gradient_y = sobel_gradients(_blur(_near_one(luminance(pixels))))
    magnitude = torch.hypot(gradient_x, gradient_y)
    is_ridge = _is_ridge(magnitude, torch.atan2(gradient_y, gradient_x))
    strongest = magnitude.amax(dim=(1, 2), keepdim=True)
    is_weak = is_ridge & (magnitude > LOW * strongest)
    is_edge = is_ridge & (magnitude > HIGH * strongest)
    for _ in range(HYSTERESIS_STEPS):
        near_edge = functional.max_pool2d(is_edge.float()[:, None], 3, stride=1, padding=1)
        is_edge = is_weak & (near_edge[:, 0] > 0)
    return is_edge


def _blur(brightness: Tensor) -> Tensor:
    weights = [math.exp(-(step**2) / (2 * _SIGMA**2)) for step in range(-_RADIUS, _RADIUS + 1)]
    padded = functional.pad(brightness[:, None], (_RADIUS,) * 4, mode="reflect")[:, 0]
    height, width = brightness.shape[-2:]
    rows = [weight * padded[:, i : i + height] for i, weight in enumerate(weights)]
    blurred = torch.stack(rows).sum(dim=0)
    columns = [weight * blurred[:, :, i : i + width] for i, weight in enumerate(weights)]
    return torch.stack(columns).sum(dim=0) / sum(weights) ** 2


def _is_ridge(magnitude: Tensor, angle: Tensor) -> Tensor:
    """Return where the gradient is strongest along its own direction, shape (B, H, W), bool."""
    height, width = magnitude.shape[-2:]
    padded = functional.pad(magnitude, (1, 1, 1, 1))
    direction = (angle / (math.pi / 4)).round() % 4
    is_ridge = torch.zeros_like(magnitude, dtype=torch.bool)
    for number, (down, right) in enumerate(((0, 1), (1, 1), (1, 0), (1, -1))):
        ahead = padded[:, 1 + down : 1 + down + height, 1 + right : 1 + right + width]
        behind = padded[:, 1 - down : 1 - down + height, 1 - right : 1 - right + width]
        # The two pixels beside an ideal step are equally strong: one of them is the edge.
        is_highest = (magnitude > ahead) & (magnitude >= behind)
        is_ridge |= (direction == number) & is_highest
    return is_ridge
