"""The words of the demo world: what there is to draw and to say."""

from __future__ import annotations

from typing import NamedTuple

# Part of every scene's key. Raised whenever the same scene would get other pixels or captions.
SCENE_VERSION = 1

# Raised whenever the same seed would give other files, which more sets do, too.
WORLD_VERSION = 2

IMAGE_SIZE = 64

SHAPES = (
    "circle",
    "square",
    "triangle",
    "diamond",
    "star",
    "heart",
    "cross",
    "ring",
    "crescent",
    "arrow",
    "house",
    "flower",
)

# Red, green and blue, 0 to 255.
COLORS: dict[str, tuple[int, int, int]] = {
    "red": (212, 38, 38),
    "orange": (246, 134, 28),
    "yellow": (250, 220, 48),
    "green": (38, 158, 62),
    "blue": (36, 82, 214),
    "purple": (128, 54, 176),
    "pink": (246, 132, 188),
    "brown": (116, 70, 36),
    "white": (246, 246, 244),
    "black": (26, 26, 30),
}

TEXTURES = ("plain", "striped", "dotted", "checkered")

# Smallest and largest radius as a share of the image side. Three objects in a row are tiny.
SIZES: dict[str, tuple[float, float]] = {
    "tiny": (0.126, 0.146),
    "small": (0.190, 0.210),
    "medium": (0.255, 0.285),
    "large": (0.330, 0.380),
}

# Where the only object of a scene is: column and row of a 3 x 3 grid, and how one says it.
PLACES: dict[str, tuple[tuple[int, int], str]] = {
    "top left": ((0, 0), "in the top left corner"),
    "top": ((1, 0), "at the top"),
    "top right": ((2, 0), "in the top right corner"),
    "left": ((0, 1), "on the left"),
    "center": ((1, 1), "in the center"),
    "right": ((2, 1), "on the right"),
    "bottom left": ((0, 2), "in the bottom left corner"),
    "bottom": ((1, 2), "at the bottom"),
    "bottom right": ((2, 2), "in the bottom right corner"),
}

# How the first object of a pair lies to the second, and the same seen from the second.
RELATIONS: dict[str, tuple[str, str]] = {
    "above": ("above", "below"),
    "below": ("below", "above"),
    "left": ("to the left of", "to the right of"),
    "right": ("to the right of", "to the left of"),
}

# How three objects are lined up, with the first between the second and the third.
LINES = ("across", "down")


class Background(NamedTuple):
    """How a background is spoken of, and which colours vanish on it."""

    noun: str
    phrase: str
    clashes: frozenset[str]


def _background(noun: str, preposition: str, *clashes: str) -> Background:
    return Background(noun, f"{preposition} {noun}", frozenset(clashes))


BACKGROUNDS: dict[str, Background] = {
    "sky": _background("a cloudy sky", "in", "white", "blue"),
    "sunset": _background("a sunset sky", "in", "orange", "pink"),
    "night": _background("a starry night", "in", "black", "blue"),
    "fog": _background("thick fog", "in", "white"),
    "wall": _background("a bare wall", "on"),
    "snow": _background("fresh snow", "on", "white"),
    "water": _background("calm water", "on", "blue"),
    "grass": _background("mown grass", "on", "green"),
    "sand": _background("rippled sand", "on", "yellow", "orange"),
    "brick": _background("a brick wall", "on", "red", "brown"),
    "wood": _background("wooden boards", "on", "brown", "orange"),
    "tiles": _background("a tiled floor", "on", "white"),
    "field": _background("an open field", "in", "green", "blue"),
    "beach": _background("a quiet beach", "on", "white", "yellow"),
}

# Grounds that no scene has of itself: patterns of many colours, where the others are landscapes
# and plain surfaces. Pictures on these show how a model does on what training never held.
UNSEEN_BACKGROUNDS: dict[str, Background] = {
    "tartan": _background("a tartan blanket", "on"),
    "marble": _background("veined marble", "on"),
    "pebbles": _background("loose pebbles", "on"),
    "confetti": _background("scattered confetti", "on"),
    "lava": _background("glowing lava", "on"),
}
