"""Draw scenes as training never shows them: what robustness is measured on.

A variant changes one thing of a picture and keeps the rest, so that a drop against the unchanged
picture has one cause. Strengths are such that a person still names every shape.
"""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from clip_pgs.data.world.dice import Dice
from clip_pgs.data.world.draw import Drawing, draw_scene
from clip_pgs.data.world.fields import Field
from clip_pgs.data.world.scene import Scene
from clip_pgs.data.world.vocabulary import IMAGE_SIZE, UNSEEN_BACKGROUNDS

# Standard deviation of the noise of one channel, in steps of 255; a training picture has 1 to 5.
_NOISE = 48


def draw_noisy(scene: Scene) -> Drawing:
    """Draw a scene under strong noise, independent between pixels and channels."""
    pixels, foreground = draw_scene(scene)
    size = (IMAGE_SIZE, IMAGE_SIZE * 3)
    fields = [Dice(scene.key, "variant noise").noise(str(number), *size) for number in range(4)]
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
        before, after = _neighbours(pixels, axis)
        pixels = pixels * 0.5 + (before + after) * 0.25
    return Drawing(_rounded(pixels), drawing.foreground)


def draw_grey(scene: Scene) -> Drawing:
    """Draw a scene without colours."""
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


def _neighbours(pixels: Field, axis: int) -> tuple[Field, Field]:
    """Return the pixels before and after each one; at the border, that is the pixel itself."""
    size = pixels.shape[axis]
    before = np.take(pixels, [0, *range(size - 1)], axis=axis)
    after = np.take(pixels, [*range(1, size), size - 1], axis=axis)
    return before, after


def _rounded(pixels: Field) -> NDArray[np.uint8]:
    return np.clip(np.rint(pixels), 0, 255).astype(np.uint8)
