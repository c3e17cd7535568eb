"""Edge strength of every patch after Canny (https://doi.org/10.1109/TPAMI.1986.4767851).

Two differences from the usual detector, so that it needs neither tuning nor the host: thresholds
are shares of an image's strongest gradient, and hysteresis runs a fixed number of steps, which
ends a weak line that many pixels behind its last strong one.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional

from clip_pgs.masking.edges import luminance, patch_strength, sobel_gradients

LOW, HIGH = 0.1, 0.2  # shares of the strongest gradient of the image
HYSTERESIS_STEPS = 16  # pixels

_SIGMA, _RADIUS = 1.0, 2  # of the blur, in pixels


def canny_edges(pixels: Tensor, patch_size: int | tuple[int, int]) -> Tensor:
    """Measure the share of edge pixels in each patch.

    Args:
        pixels: Images, normalised or not. Shape (B, 3, H, W), any float dtype; H and W at least 3.
        patch_size: Side of a patch in pixels, or (height, width). It must divide H and W.

    Returns:
        Edge strength in [0, 1] after min-max scaling per image, raster order, shape (B, N),
        float32. All zeros for an image without any edge.

    Raises:
        ValueError: If `pixels` is not (B, 3, H, W) or the patch does not divide the image.
    """
    return patch_strength(canny_map(pixels).float(), patch_size)


def canny_map(pixels: Tensor) -> Tensor:
    """Return which pixels lie on an edge, shape (B, H, W), bool; see `canny_edges`."""
    gradient_x, gradient_y = sobel_gradients(_blur(luminance(pixels)))
    magnitude = torch.hypot(gradient_x, gradient_y)
    is_ridge = _is_ridge(magnitude, torch.atan2(gradient_y, gradient_x))
    strongest = magnitude.amax(dim=(1, 2), keepdim=True)
    is_weak = is_ridge & (magnitude > LOW * strongest)
    is_edge = is_ridge & (magnitude > HIGH * strongest)
    for _ in range(HYSTERESIS_STEPS):
        near_edge = functional.max_pool2d(is_edge.float(), kernel_size=3, stride=1, padding=1)
        is_edge = is_weak & (near_edge > 0)
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
