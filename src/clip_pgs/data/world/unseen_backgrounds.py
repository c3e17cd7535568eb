"""Paint the backgrounds that training never shows: patterns of many colours."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

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
from clip_pgs.data.world.vocabulary import IMAGE_SIZE


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


UNSEEN_PAINTERS: dict[str, Callable[[Dice], Field]] = {
    "tartan": _tartan,
    "marble": _marble,
    "pebbles": _pebbles,
    "confetti": _confetti,
    "lava": _lava,
}
