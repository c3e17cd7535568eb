"""Fields of numbers over the image, which the backgrounds are painted with."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from clip_pgs.data.world.dice import Dice
from clip_pgs.data.world.vocabulary import IMAGE_SIZE

# (H, W, 3) pixels or (H, W) fields, float32; a pixel's values lie about in 0 to 255.
Field = NDArray[np.floating[Any]]
Color = Sequence[float]

_TICKS = (np.arange(IMAGE_SIZE, dtype=np.float32) + 0.5) / IMAGE_SIZE
X, Y = (np.ascontiguousarray(grid) for grid in np.meshgrid(_TICKS, _TICKS))


def blend(base: Field, top: Field | Color, share: Field) -> Field:
    """Lay `top` over `base` where `share` (H, W) is 1, and in between where it is in between."""
    return base + (np.asarray(top, dtype=np.float32) - base) * share[..., None]


def smooth_noise(dice: Dice, name: str, columns: int, rows: int | None = None) -> Field:
    """Return noise in [0, 1) that bends about `columns` times over the image, shape (64, 64)."""
    rows = columns if rows is None else rows
    knots = dice.noise(name, rows + 1, columns + 1)
    left, across = _knots(columns)
    top, down = _knots(rows)
    along = knots[:, left] + (knots[:, left + 1] - knots[:, left]) * across
    return along[top] + (along[top + 1] - along[top]) * down[:, None]


@cache
def _knots(number: int) -> tuple[NDArray[np.intp], Field]:
    position = _TICKS * number
    first = position.astype(np.intp)
    share = position - first.astype(np.float32)
    return first, share * share * (3 - 2 * share)


def wave(phase: Field) -> Field:
    """Return a triangle wave of period 1 between 0 and 1, without a sine's rounding."""
    return np.abs(2 * (phase - np.floor(phase)) - 1)


def flat(color: Color) -> Field:
    """Return one colour all over, shape (64, 64, 3)."""
    pixels = np.empty((IMAGE_SIZE, IMAGE_SIZE, 3), dtype=np.float32)
    pixels[:] = color
    return pixels


def gradient(top: Color, bottom: Color, position: Field = Y) -> Field:
    """Return colours between `top`, where `position` is 0, and `bottom`, where it is 1."""
    return blend(flat(top), bottom, position)


def contrast(field: Field, threshold: float, slope: float) -> Field:
    """Return 0 up to `threshold`, then rise by `slope` up to 1."""
    return np.clip((field - threshold) * slope, 0, 1)


def grain(pixels: Field, field: Field, strength: float) -> Field:
    """Make pixels darker where `field` is below 0.5 and brighter where it is above."""
    return pixels * (1 + (field[..., None] - 0.5) * strength)
