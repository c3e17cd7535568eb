"""Draw a scene: background, shadows, objects, light and camera noise; and as training never does.

Only arithmetic whose result IEEE 754 fixes is used on pixels (no sine, power, matrix product or
sum over an array), so that a scene has the same pixels on every machine.
"""

from __future__ import annotations

import math
from dataclasses import replace
from functools import cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from clip_pgs.data.world.backgrounds import Field, X, Y, blend, paint_background, wave
from clip_pgs.data.world.scene import (
    COLORS,
    IMAGE_SIZE,
    OUTLINES,
    UNSEEN_BACKGROUNDS,
    Dice,
    Scene,
    Thing,
)

# Objects are stickers: a dark rim inside a white border, whose width is in pixels. The same two
# lines around every color make an outline that stands out on any background. With a rim of the
# object's own color, a small ViT told shapes apart several times later than with these.
_BORDER, _BORDER_COLOR = 1.8, (250, 250, 250)
_RIM_COLOR = (24, 22, 28)

# Standard deviation of the noise of one channel, in steps of 255; a training picture has 1 to 5.
_NOISE = 48

# Distances are tabulated over [-_REACH, _REACH] squared and looked up between the cells.
_REACH = 1.75
_CELLS = 112


class Drawing(NamedTuple):
    """A drawn scene.

    Args:
        pixels: Red, green and blue, shape (64, 64, 3), uint8.
        foreground: True on objects with their border, their shadows left out. Shape (64, 64), bool.
    """

    pixels: NDArray[np.uint8]
    foreground: NDArray[np.bool_]


def draw_scene(scene: Scene, *, filled: bool = True) -> Drawing:
    """Draw a scene; equal scenes give equal pixels.

    Args:
        scene: What to draw.
        filled: False leaves nothing of the objects but their outlines, without surface and shadow.
    """
    pixels = paint_background(scene.background, Dice(scene.key, "background"))
    foreground = np.zeros((IMAGE_SIZE, IMAGE_SIZE), dtype=bool)
    light = Dice(scene.key, "light")
    toward = light.uniform(-1, 1), light.uniform(-1, -0.2)
    for number, thing in enumerate(scene.things):
        box = _box(thing)
        x, y = X[box], Y[box]
        distance = _distance(thing, x, y)
        foreground[box] |= distance < _BORDER
        border = np.clip(_BORDER + 0.5 - distance, 0, 1)
        inside = np.clip(0.5 - distance, 0, 1)
        ground = pixels[box]
        if not filled:
            line = np.clip(_rim(thing) + 0.5 + distance, 0, 1)
            ground = blend(ground, _BORDER_COLOR, border * line)
            pixels[box] = blend(ground, _RIM_COLOR, inside * line)
            continue
        shadow = _shifted(distance, round(-2.5 * toward[1]), round(-2.5 * toward[0]))
        ground = blend(ground, ground * 0.55, np.clip(1 - shadow / 4, 0, 1))
        ground = blend(ground, _BORDER_COLOR, border)
        paint = _paint(thing, distance, x, y, toward, Dice(scene.key, "thing", number))
        pixels[box] = blend(ground, paint, inside)
    slant = ((X - 0.5) * toward[0] + (Y - 0.5) * toward[1]) * light.uniform(0, 0.3)
    pixels = pixels * (light.uniform(0.88, 1.08) + slant)[..., None]
    size = (IMAGE_SIZE, IMAGE_SIZE * 3)
    grain = light.noise("first", *size) - light.noise("second", *size)
    return Drawing(
        _rounded(pixels + grain.reshape(pixels.shape) * light.uniform(2, 12)), foreground
    )


def _box(thing: Thing) -> tuple[slice, slice]:
    """Return the rows and columns that a thing and its shadow may touch."""
    reach = 1.3 * thing.radius * IMAGE_SIZE + 6
    top, left = thing.y * IMAGE_SIZE - reach, thing.x * IMAGE_SIZE - reach
    return (
        slice(max(0, int(top)), int(top + 2 * reach) + 1),
        slice(max(0, int(left)), int(left + 2 * reach) + 1),
    )


def _shifted(field: Field, down: int, right: int) -> Field:
    """Move a field by whole pixels and repeat its border."""
    height, width = field.shape
    row = np.clip(np.arange(height) - down, 0, height - 1)
    column = np.clip(np.arange(width) - right, 0, width - 1)
    return field[row[:, None], column]


def _turned(x: Field, y: Field, degrees: float) -> tuple[Field, Field]:
    """Return coordinates in a frame that is turned clockwise."""
    cosine = round(math.cos(math.radians(degrees)), 6)
    sine = round(math.sin(math.radians(degrees)), 6)
    return x * cosine + y * sine, y * cosine - x * sine


def _distance(thing: Thing, x: Field, y: Field) -> Field:
    """Return the signed distance in pixels of points to a thing's outline."""
    radius = thing.radius
    across, down = (x - thing.x) / radius, (y - thing.y) / radius
    distance = shape_distance(thing.shape, *_turned(across, down, thing.tilt))
    return distance * (thing.radius * IMAGE_SIZE)


def _paint(
    thing: Thing, distance: Field, x: Field, y: Field, toward: tuple[float, float], dice: Dice
) -> Field:
    """Return the colors of a thing's surface at points, shape (h, w, 3)."""
    color = [value + dice.uniform(-12, 12) for value in COLORS[thing.color]]
    brightness = 0.3 * color[0] + 0.6 * color[1] + 0.1 * color[2]
    is_bright = brightness > 140
    second = [0.66 * value if is_bright else value + 0.36 * (255 - value) for value in color]
    pixels = blend(np.asarray(color, dtype=np.float32), second, _texture(thing, x, y, dice))
    lit = (x - thing.x) * toward[0] + (y - thing.y) * toward[1]
    pixels = pixels * (1 + np.clip(lit * (0.5 / thing.radius), -0.3, 0.2)[..., None])
    return blend(pixels, _RIM_COLOR, np.clip(_rim(thing) + 0.5 + distance, 0, 1) * 0.9)


def _rim(thing: Thing) -> float:
    """Return the width of a thing's dark rim in pixels."""
    return 0.5 + 0.075 * thing.radius * IMAGE_SIZE


def _texture(thing: Thing, x: Field, y: Field, dice: Dice) -> Field:
    """Return how much of the second color shows at points, in [0, 1]."""
    period = dice.uniform(4.6, 5.6) if thing.size == "small" else dice.uniform(5.4, 7.2)
    angle = thing.tilt + dice.choice((0, 45, 90, 135))
    start_x, start_y = dice.uniform(), dice.uniform()
    cells = IMAGE_SIZE / period
    across, down = _turned(x * cells, y * cells, angle)
    wave_x, wave_y = wave(across + start_x), wave(down + start_y)
    sharpness = period / 2
    if thing.texture == "striped":
        return np.clip((wave_x - 0.5) * sharpness + 0.5, 0, 1)
    if thing.texture == "checkered":
        side_x = np.clip((wave_x - 0.5) * sharpness + 0.5, 0, 1)
        side_y = np.clip((wave_y - 0.5) * sharpness + 0.5, 0, 1)
        return side_x + side_y - 2 * side_x * side_y
    if thing.texture == "dotted":
        away = np.sqrt((1 - wave_x) * (1 - wave_x) + (1 - wave_y) * (1 - wave_y))
        return np.clip((0.58 - away) * sharpness + 0.5, 0, 1)
    return np.zeros_like(x)


def draw_noisy(scene: Scene) -> Drawing:
    """Draw a scene under strong noise, independent between pixels and channels."""
    pixels, foreground = draw_scene(scene)
    size = (IMAGE_SIZE, IMAGE_SIZE * 3)
    dice = Dice(scene.key, "variant noise")
    fields = [dice.noise(str(number), *size) for number in range(4)]
    # The sum of four even numbers is nearly normal, and needs no function that may round elsewhere.
    noise = (fields[0] + fields[1] - fields[2] - fields[3]) * (_NOISE * math.sqrt(3))
    return Drawing(_rounded(pixels + noise.reshape(pixels.shape)), foreground)


def draw_blurred(scene: Scene) -> Drawing:
    """Draw a scene slightly out of focus; the mask stays sharp.

    The blur's standard deviation is 0.7 pixels. With 1.4, a model that tells half of the sharp
    shapes did no better than chance, and no model could be told from another.
    """
    drawing = draw_scene(scene)
    pixels: Field = drawing.pixels.astype(np.float32)
    for axis in (0, 1):
        before, after = _neighbors(pixels, axis)
        pixels = pixels * 0.5 + (before + after) * 0.25
    return Drawing(_rounded(pixels), drawing.foreground)


def draw_gray(scene: Scene) -> Drawing:
    """Draw a scene without colors."""
    pixels, foreground = draw_scene(scene)
    red, green, blue = (pixels[..., channel].astype(np.float32) for channel in range(3))
    brightness = 0.3 * red + 0.6 * green + 0.1 * blue
    return Drawing(_rounded(np.stack([brightness] * 3, axis=-1)), foreground)


def draw_outlines(scene: Scene) -> Drawing:
    """Draw a scene's objects as outlines, with the background inside."""
    return draw_scene(scene, filled=False)


def on_unseen_background(scene: Scene) -> Scene:
    """Return a scene with one of `UNSEEN_BACKGROUNDS` instead of its own."""
    background = Dice(scene.key, "unseen background").choice(tuple(UNSEEN_BACKGROUNDS))
    return replace(scene, background=background)


def _neighbors(pixels: Field, axis: int) -> tuple[Field, Field]:
    """Return the pixels before and after each one; at the border, that is the pixel itself."""
    size = pixels.shape[axis]
    before = np.take(pixels, [0, *range(size - 1)], axis=axis)
    after = np.take(pixels, [*range(1, size), size - 1], axis=axis)
    return before, after


def _rounded(pixels: Field) -> NDArray[np.uint8]:
    return np.clip(np.rint(pixels), 0, 255).astype(np.uint8)


def shape_distance(shape: str, x: Field, y: Field) -> Field:
    """Return signed distances to the outline of a shape of radius 1.

    Args:
        shape: One of `SHAPES`.
        x: Points to the right of the center, any shape.
        y: Points below the center, the same shape.

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
def _distance_table(shape: str) -> Field:
    ticks = np.linspace(-_REACH, _REACH, _CELLS + 1)
    x, y = np.meshgrid(ticks, ticks)
    nearest = np.full(x.shape, np.inf)
    is_inside = np.zeros(x.shape, dtype=bool)
    for outline in OUTLINES[shape]:
        # An edge's points differ by one unit in the last place between math libraries.
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
