"""Outlines of the shapes, and how far a point lies from them."""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from clip_pgs.data.world.vocabulary import SHAPES

Points = list[tuple[float, float]]

# Distances are tabulated over [-_REACH, _REACH] squared and looked up between the cells.
_REACH = 1.75
_CELLS = 112


def shape_distance(
    shape: str, x: NDArray[np.floating[Any]], y: NDArray[np.floating[Any]]
) -> NDArray[np.floating[Any]]:
    """Return signed distances to the outline of a shape of radius 1.

    Args:
        shape: One of `SHAPES`.
        x: Points to the right of the centre, any shape.
        y: Points below the centre, the same shape.

    Returns:
        Distances, negative inside the outline, the same shape. Points farther out than 1.75
        get the distance of the nearest point that is not.
    """
    table = _distance_table(shape)
    scale = _CELLS / (2 * _REACH)
    column = np.clip((x + _REACH) * scale, 0, _CELLS - 1e-3)
    row = np.clip((y + _REACH) * scale, 0, _CELLS - 1e-3)
    left, top = column.astype(np.intp), row.astype(np.intp)
    across, down = column - left.astype(np.float32), row - top.astype(np.float32)
    upper = table[top, left] * (1 - across) + table[top, left + 1] * across
    lower = table[top + 1, left] * (1 - across) + table[top + 1, left + 1] * across
    return upper * (1 - down) + lower * down


@cache
def _distance_table(shape: str) -> NDArray[np.floating[Any]]:
    ticks = np.linspace(-_REACH, _REACH, _CELLS + 1)
    x, y = np.meshgrid(ticks, ticks)
    nearest = np.full(x.shape, np.inf)
    is_inside = np.zeros(x.shape, dtype=bool)
    for outline in _OUTLINES[shape]:
        # An edge's points differ by one unit in the last place between maths libraries.
        corners = [(round(a, 6), round(b, 6)) for a, b in outline]
        for (x0, y0), (x1, y1) in zip(corners, corners[1:] + corners[:1], strict=True):
            dx, dy = x1 - x0, y1 - y0
            share = np.clip(((x - x0) * dx + (y - y0) * dy) / (dx * dx + dy * dy), 0, 1)
            gap_x, gap_y = x - x0 - share * dx, y - y0 - share * dy
            nearest = np.minimum(nearest, gap_x * gap_x + gap_y * gap_y)
            if dy != 0:
                # Even-odd rule: count the edges that a ray to the right crosses.
                crosses = ((y0 > y) != (y1 > y)) & (x < x0 + dx * (y - y0) / dy)
                is_inside ^= crosses
    distance = np.sqrt(nearest)
    return np.where(is_inside, -distance, distance).astype(np.float32)


def _arc(
    radius: float, start: float = 0, stop: float = 360, *, num: int = 40, x: float = 0, y: float = 0
) -> Points:
    """Return points on a circle; degrees, clockwise from the right."""
    angles = [math.radians(start + (stop - start) * step / num) for step in range(num)]
    return [(x + radius * math.cos(angle), y + radius * math.sin(angle)) for angle in angles]


def _spokes(*radii: float, num: int) -> Points:
    """Return a closed outline that goes through the radii again and again, from the top."""
    count = num * len(radii)
    return [
        _arc(radii[step % len(radii)], -90 + 360 * step / count, num=1)[0] for step in range(count)
    ]


def _heart() -> Points:
    points = []
    for step in range(48):
        angle = math.radians(360 * step / 48)
        x = 16 * math.sin(angle) ** 3
        y = 13 * math.cos(angle) - 5 * math.cos(2 * angle) - 2 * math.cos(3 * angle)
        points.append((x / 16, -(y - math.cos(4 * angle) + 2) / 15.5))
    return points


def _flower() -> Points:
    radii = [0.62 + 0.44 * abs(math.cos(math.radians(2.5 * 4.5 * step))) for step in range(80)]
    return _spokes(*radii, num=1)


# Contours of each shape; where two overlap there is a hole. Centred, about radius 1, y down.
_OUTLINES: dict[str, list[Points]] = {
    "circle": [_arc(0.95)],
    "square": [[(-0.84, -0.84), (0.84, -0.84), (0.84, 0.84), (-0.84, 0.84)]],
    "triangle": [[(0, -1), (1, 0.8), (-1, 0.8)]],
    "diamond": [[(0, -1.12), (0.78, 0), (0, 1.12), (-0.78, 0)]],
    "star": [_spokes(1.12, 0.47, num=5)],
    "heart": [_heart()],
    "cross": [
        [
            (-0.34, -1),
            (0.34, -1),
            (0.34, -0.34),
            (1, -0.34),
            (1, 0.34),
            (0.34, 0.34),
            (0.34, 1),
            (-0.34, 1),
            (-0.34, 0.34),
            (-1, 0.34),
            (-1, -0.34),
            (-0.34, -0.34),
        ]
    ],
    "ring": [_arc(1), _arc(0.48)],
    "crescent": [_arc(1, 58, 302, x=0.15) + _arc(0.85, 274, 86, num=30, x=0.62)],
    "arrow": [
        [
            (1.1, 0),
            (0.2, -0.88),
            (0.2, -0.36),
            (-1.05, -0.36),
            (-1.05, 0.36),
            (0.2, 0.36),
            (0.2, 0.88),
        ]
    ],
    "house": [
        [
            (0, -1.1),
            (1.05, -0.12),
            (0.78, -0.12),
            (0.78, 0.92),
            (-0.78, 0.92),
            (-0.78, -0.12),
            (-1.05, -0.12),
        ]
    ],
    "flower": [_flower(), _arc(0.2, num=16)],
}
assert tuple(_OUTLINES) == SHAPES
