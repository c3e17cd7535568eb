"""Paint backgrounds: skies, walls and ground, and patterns that training never shows.

A painter makes fields of numbers over the image, and lays colors over each other where they say.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from clip_pgs.data.world.scene import BACKGROUNDS, IMAGE_SIZE, UNSEEN_BACKGROUNDS, Dice

# (H, W, 3) pixels or (H, W) fields, float32; a pixel's values lie about in 0 to 255.
Field = NDArray[np.floating[Any]]
Color = Sequence[float]

_TICKS = (np.arange(IMAGE_SIZE, dtype=np.float32) + 0.5) / IMAGE_SIZE
X, Y = (np.ascontiguousarray(grid) for grid in np.meshgrid(_TICKS, _TICKS))


def paint_background(name: str, dice: Dice) -> Field:
    """Paint a background.

    Args:
        name: One of `BACKGROUNDS` or of `UNSEEN_BACKGROUNDS`.
        dice: Source of its details.

    Returns:
        Pixels of shape (64, 64, 3), float32, about in 0 to 255.
    """
    return _PAINTERS[name](dice)


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
    """Return one color all over, shape (64, 64, 3)."""
    pixels = np.empty((IMAGE_SIZE, IMAGE_SIZE, 3), dtype=np.float32)
    pixels[:] = color
    return pixels


def gradient(top: Color, bottom: Color, position: Field = Y) -> Field:
    """Return colors between `top`, where `position` is 0, and `bottom`, where it is 1."""
    return blend(flat(top), bottom, position)


def contrast(field: Field, threshold: float, slope: float) -> Field:
    """Return 0 up to `threshold`, then rise by `slope` up to 1."""
    return np.clip((field - threshold) * slope, 0, 1)


def grain(pixels: Field, field: Field, strength: float) -> Field:
    """Make pixels darker where `field` is below 0.5 and brighter where it is above."""
    return pixels * (1 + (field[..., None] - 0.5) * strength)


def _sky(dice: Dice) -> Field:
    pixels = gradient((88, 148, 216), (196, 222, 244))
    clouds = smooth_noise(dice, "clouds", 3) * 0.65 + smooth_noise(dice, "puffs", 8, 6) * 0.35
    return blend(pixels, (250, 250, 252), contrast(clouds, dice.uniform(0.45, 0.6), 4) * 0.85)


def _sunset(dice: Dice) -> Field:
    horizon = dice.uniform(0.45, 0.7)
    pixels = gradient((70, 62, 122), (222, 120, 104), np.clip(Y / horizon, 0, 1))
    pixels = blend(pixels, (252, 206, 134), np.clip((Y - horizon) / (1 - horizon), 0, 1))
    streaks = contrast(smooth_noise(dice, "streaks", 2, 9), 0.55, 3)
    return blend(pixels, (96, 66, 110), streaks * 0.4)


def _night(dice: Dice) -> Field:
    pixels = gradient((12, 16, 44), (44, 46, 92))
    stars = dice.noise("stars", IMAGE_SIZE, IMAGE_SIZE)
    return blend(pixels, (236, 236, 220), contrast(stars, 0.9895, 110))


def _fog(dice: Dice) -> Field:
    pixels = gradient((206, 212, 216), (150, 158, 164))
    return grain(pixels, smooth_noise(dice, "banks", 2, 4), 0.22)


def _wall(dice: Dice) -> Field:
    gray = dice.uniform(120, 196)
    paint = [gray + dice.uniform(-20, 20) for _ in range(3)]
    pixels = grain(flat(paint), smooth_noise(dice, "plaster", 2), 0.2)
    return grain(pixels, X if dice.chance(0.5) else 1 - X, 0.2)


def _snow(dice: Dice) -> Field:
    drifts = smooth_noise(dice, "drifts", 3, 5) * 0.7 + smooth_noise(dice, "powder", 12) * 0.3
    return blend(flat((244, 247, 250)), (176, 194, 222), contrast(drifts, 0.3, 1.5))


def _water(dice: Dice) -> Field:
    pixels = gradient((66, 132, 158), (26, 84, 118))
    bend = smooth_noise(dice, "bend", 3, 5)
    ripples = wave(Y * dice.uniform(6, 9) + bend * 1.6)
    return blend(pixels, (176, 214, 222), contrast(ripples, 0.72, 2.2) * 0.6)


def _grass(dice: Dice) -> Field:
    pixels = gradient((96, 150, 70), (70, 124, 52), smooth_noise(dice, "patches", 3))
    return grain(pixels, smooth_noise(dice, "blades", 40, 14), 0.5)


def _sand(dice: Dice) -> Field:
    slope, bend = dice.uniform(-0.6, 0.6), smooth_noise(dice, "bend", 3)
    ripples = wave((Y + X * slope) * dice.uniform(5, 7) + bend * 1.2)
    pixels = gradient((226, 204, 158), (188, 160, 114), ripples * ripples)
    return grain(pixels, dice.noise("grains", IMAGE_SIZE, IMAGE_SIZE), 0.08)


def _brick(dice: Dice) -> Field:
    height, width = dice.choice((8, 9, 10)), dice.choice((16, 18, 20))
    row = np.floor(Y * IMAGE_SIZE / height).astype(np.intp)
    along = X * IMAGE_SIZE + (row % 2) * (width / 2) + dice.uniform(0, width)
    column = np.floor(along / width).astype(np.intp)
    shade = dice.noise("bricks", 16, 16)[row % 16, column % 16]
    pixels = gradient((146, 78, 60), (184, 112, 88), shade)
    in_row, in_column = Y * IMAGE_SIZE - row * height, along - column * width
    joint = np.maximum(contrast(1.4 - in_row, 0, 1), contrast(1.4 - in_column, 0, 1))
    return blend(pixels, (196, 186, 172), joint)


def _wood(dice: Dice) -> Field:
    width = dice.choice((12, 14, 16))
    across, along = (X, Y) if dice.chance(0.5) else (Y, X)
    board = np.floor(across * IMAGE_SIZE / width).astype(np.intp)
    shade = dice.noise("boards", 1, 8)[0][board]
    pixels = gradient((150, 104, 62), (190, 142, 92), shade)
    bend = smooth_noise(dice, "bend", 4) * 1.5 + along
    veins = wave(across * 22 + bend * 2 + shade * 7)
    in_board = across * IMAGE_SIZE - board * width
    return blend(grain(pixels, veins, 0.16), (82, 54, 32), contrast(1.3 - in_board, 0, 1) * 0.8)


def _tiles(dice: Dice) -> Field:
    side = dice.choice((14, 16, 18))
    x = X * IMAGE_SIZE + dice.uniform(0, side)
    y = Y * IMAGE_SIZE + dice.uniform(0, side)
    column, row = np.floor(x / side).astype(np.intp), np.floor(y / side).astype(np.intp)
    paint = [dice.uniform(176, 214) for _ in range(3)]
    pixels = grain(flat(paint), dice.noise("tiles", 8, 8)[row, column], 0.14)
    joint = np.maximum(
        contrast(1.5 - (x - column * side), 0, 1), contrast(1.5 - (y - row * side), 0, 1)
    )
    return blend(pixels, (120, 116, 112), joint * 0.8)


def _below(dice: Dice, low: float, high: float) -> Field:
    """Return 1 below a horizon that lies between `low` and `high`, 0 above it."""
    return contrast(Y - dice.uniform(low, high), 0, IMAGE_SIZE)


def _field(dice: Dice) -> Field:
    return blend(_sky(dice), _grass(dice), _below(dice, 0.45, 0.65))


def _beach(dice: Dice) -> Field:
    pixels = blend(_sky(dice), _water(dice), _below(dice, 0.35, 0.45))
    return blend(pixels, _sand(dice), _below(dice, 0.6, 0.72))


class _Stones(NamedTuple):
    """A plane split among scattered points: each pixel belongs to the nearest.

    Args:
        tone: A number in [0, 1) per stone, shape (64, 64).
        center: Pixels to the stone's own point, shape (64, 64).
        joint: How much farther the next stone's point is, in pixels, shape (64, 64).
    """

    tone: Field
    center: Field
    joint: Field


def _scatter(dice: Dice, side: int) -> _Stones:
    """Scatter a point over each square of `side` pixels and split the plane among them."""
    # A square more on each side, whose points may be the nearest of a pixel at the rim.
    num_squares = IMAGE_SIZE // side + 3
    shift_x, shift_y, tones = (
        dice.noise(name, num_squares, num_squares) for name in ("across", "down", "tones")
    )
    x, y = X * (IMAGE_SIZE / side) + 1, Y * (IMAGE_SIZE / side) + 1
    column, row = x.astype(np.intp), y.astype(np.intp)
    first = second = np.full(X.shape, 99, dtype=np.float32)
    tone = np.zeros_like(X)
    for down in (-1, 0, 1):
        for right in (-1, 0, 1):
            square = (row + down, column + right)
            gap_x = column + right + shift_x[square] - x
            gap_y = row + down + shift_y[square] - y
            away = np.sqrt(gap_x * gap_x + gap_y * gap_y)
            tone = np.where(away < first, tones[square], tone)
            second = np.minimum(second, np.maximum(first, away))
            first = np.minimum(first, away)
    return _Stones(tone, first * side, (second - first) * side)


def _tartan(dice: Dice) -> Field:
    dark = [dice.uniform(20, 90) for _ in range(3)]
    bright = [dice.uniform(120, 220) for _ in range(3)]
    thread = [dice.uniform(190, 250) for _ in range(3)]
    period, start = dice.uniform(18, 26), dice.uniform()
    pixels = flat(dark)
    for position in (X, Y):
        bands = wave(position * (IMAGE_SIZE / period) + start)
        pixels = blend(pixels, bright, contrast(bands, 0.5, 8) * 0.5)
        pixels = blend(pixels, thread, contrast(1 - np.abs(bands - 0.2) * 9, 0, 1) * 0.6)
    return grain(pixels, wave((X + Y) * (IMAGE_SIZE / 4)), 0.15)


def _marble(dice: Dice) -> Field:
    stone = [dice.uniform(170, 225) for _ in range(3)]
    slope, bend = dice.uniform(-1, 1), smooth_noise(dice, "bend", 4) * 1.2
    veins = wave(X * 2 + Y * (2 * slope) + bend + smooth_noise(dice, "crack", 11) * 0.3)
    pixels = grain(flat(stone), smooth_noise(dice, "clouds", 5), 0.35)
    return blend(pixels, [0.35 * value for value in stone], contrast(veins, 0.78, 4.5) * 0.8)


def _pebbles(dice: Dice) -> Field:
    stones = _scatter(dice, dice.choice((9, 10, 11)))
    pixels = gradient((96, 84, 78), (206, 196, 180), stones.tone)
    pixels = pixels * (1.1 - np.clip(stones.center * 0.03, 0, 0.4))[..., None]
    return blend(pixels, (38, 34, 32), 1 - contrast(stones.joint, 0.4, 0.6))


def _confetti(dice: Dice) -> Field:
    pixels = flat([dice.uniform(200, 245) for _ in range(3)])
    palette = np.asarray(
        [(220, 60, 90), (60, 130, 220), (250, 200, 60), (70, 180, 110), (150, 80, 190)],
        dtype=np.float32,
    )
    papers = _scatter(dice, dice.choice((7, 8, 9)))
    paint = palette[(papers.tone * len(palette)).astype(np.intp)]
    return blend(pixels, paint, contrast(3 - papers.center, 0, 1))


def _lava(dice: Dice) -> Field:
    crust = _scatter(dice, dice.choice((12, 14, 16)))
    pixels = gradient((36, 26, 28), (74, 56, 54), crust.tone)
    pixels = grain(pixels, smooth_noise(dice, "ash", 20), 0.6)
    glow = 1 - contrast(crust.joint, 0, 0.28)
    return blend(blend(pixels, (226, 60, 16), glow), (255, 220, 90), contrast(glow, 0.55, 2.2))


# The painter of a background is the function of its name.
_PAINTERS: dict[str, Callable[[Dice], Field]] = {
    name: globals()[f"_{name}"] for name in (*BACKGROUNDS, *UNSEEN_BACKGROUNDS)
}
