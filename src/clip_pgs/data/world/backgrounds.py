"""Paint the backgrounds: smooth skies and walls, and textured ground."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from clip_pgs.data.world.dice import Dice
from clip_pgs.data.world.fields import (
    Field,
    X,
    Y,
    blend,
    contrast,
    flat,
    gradient,
    grain,
    smooth_noise,
    wave,
)
from clip_pgs.data.world.unseen_backgrounds import UNSEEN_PAINTERS
from clip_pgs.data.world.vocabulary import BACKGROUNDS, IMAGE_SIZE, UNSEEN_BACKGROUNDS


def paint_background(name: str, dice: Dice) -> Field:
    """Paint a background.

    Args:
        name: One of `BACKGROUNDS` or of `UNSEEN_BACKGROUNDS`.
        dice: Source of its details.

    Returns:
        Pixels of shape (64, 64, 3), float32, about in 0 to 255.
    """
    return _PAINTERS[name](dice)


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


_PAINTERS: dict[str, Callable[[Dice], Field]] = {
    "sky": _sky,
    "sunset": _sunset,
    "night": _night,
    "fog": _fog,
    "wall": _wall,
    "snow": _snow,
    "water": _water,
    "grass": _grass,
    "sand": _sand,
    "brick": _brick,
    "wood": _wood,
    "tiles": _tiles,
    "field": _field,
    "beach": _beach,
    **UNSEEN_PAINTERS,
}
assert _PAINTERS.keys() == BACKGROUNDS.keys() | UNSEEN_BACKGROUNDS.keys()
