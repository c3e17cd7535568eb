"""Draw a scene: background, shadows, objects, light and camera noise.

Only arithmetic whose result IEEE 754 fixes is used on pixels (no sine, power, matrix product or
sum over an array), so that a scene has the same pixels on every machine.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from clip_pgs.data.world.backgrounds import paint_background
from clip_pgs.data.world.dice import Dice
from clip_pgs.data.world.fields import Field, X, Y, blend, wave
from clip_pgs.data.world.scene import Scene, Thing
from clip_pgs.data.world.shapes import shape_distance
from clip_pgs.data.world.vocabulary import COLORS, IMAGE_SIZE

# Objects are stickers: a dark rim inside a white border, whose width is in pixels. The same two
# lines around every colour make an outline that stands out on any background. With a rim of the
# object's own colour, a small ViT told shapes apart several times later than with these.
_BORDER, _BORDER_COLOR = 1.8, (250, 250, 250)
_RIM_COLOR = (24, 22, 28)


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
    light_x, light_y = light.uniform(-1, 1), light.uniform(-1, -0.2)
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
        shadow = _shifted(distance, round(-2.5 * light_y), round(-2.5 * light_x))
        ground = blend(ground, ground * 0.55, np.clip(1 - shadow / 4, 0, 1))
        ground = blend(ground, _BORDER_COLOR, border)
        paint = _paint(thing, distance, x, y, light_x, light_y, Dice(scene.key, "thing", number))
        pixels[box] = blend(ground, paint, inside)
    pixels = _expose(pixels, light_x, light_y, light)
    return Drawing(np.clip(np.rint(pixels), 0, 255).astype(np.uint8), foreground)


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
    thing: Thing,
    distance: Field,
    x: Field,
    y: Field,
    light_x: float,
    light_y: float,
    dice: Dice,
) -> Field:
    """Return the colours of a thing's surface at points, shape (h, w, 3)."""
    color = [value + dice.uniform(-12, 12) for value in COLORS[thing.color]]
    brightness = 0.3 * color[0] + 0.6 * color[1] + 0.1 * color[2]
    is_bright = brightness > 140
    second = [0.66 * value if is_bright else value + 0.36 * (255 - value) for value in color]
    pixels = blend(np.asarray(color, dtype=np.float32), second, _texture(thing, x, y, dice))
    lit = (x - thing.x) * light_x + (y - thing.y) * light_y
    pixels = pixels * (1 + np.clip(lit * (0.5 / thing.radius), -0.3, 0.2)[..., None])
    return blend(pixels, _RIM_COLOR, np.clip(_rim(thing) + 0.5 + distance, 0, 1) * 0.9)


def _rim(thing: Thing) -> float:
    """Return the width of a thing's dark rim in pixels."""
    return 0.5 + 0.075 * thing.radius * IMAGE_SIZE


def _texture(thing: Thing, x: Field, y: Field, dice: Dice) -> Field:
    """Return how much of the second colour shows at points, in [0, 1]."""
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


def _expose(pixels: Field, light_x: float, light_y: float, dice: Dice) -> Field:
    """Light the picture from one side, and add the noise of a camera."""
    slant = ((X - 0.5) * light_x + (Y - 0.5) * light_y) * dice.uniform(0, 0.3)
    pixels = pixels * (dice.uniform(0.88, 1.08) + slant)[..., None]
    grain = dice.noise("first", IMAGE_SIZE, IMAGE_SIZE * 3) - dice.noise(
        "second", IMAGE_SIZE, IMAGE_SIZE * 3
    )
    strength = dice.uniform(2, 12)
    return pixels + grain.reshape(pixels.shape) * strength
