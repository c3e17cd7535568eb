"""What there is in the demo world, as plain data, and how a scene of it is made up."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

# Part of every scene's key. Raised whenever the same scene would get other pixels or captions.
SCENE_VERSION = 1

# Raised whenever the same seed would give other files, which more sets do, too.
WORLD_VERSION = 2

IMAGE_SIZE = 64

Point = tuple[float, float]


def _arc(
    radius: float, start: float = 0, stop: float = 360, *, num: int = 40, x: float = 0, y: float = 0
) -> list[Point]:
    """Return points on a circle; degrees, clockwise from the right."""
    angles = [math.radians(start + (stop - start) * step / num) for step in range(num)]
    return [(x + radius * math.cos(angle), y + radius * math.sin(angle)) for angle in angles]


def _spokes(*radii: float, num: int) -> list[Point]:
    """Return a closed outline that goes through the radii again and again, from the top."""
    count = num * len(radii)
    return [
        _arc(radii[step % len(radii)], -90 + 360 * step / count, num=1)[0] for step in range(count)
    ]


def _arms(*corners: Point) -> list[Point]:
    """Return corners, followed by the same turned by a quarter, a half and three."""
    turns = [corners]
    while len(turns) < 4:
        turns.append(tuple((-y, x) for x, y in turns[-1]))
    return [corner for turn in turns for corner in turn]


def _mirrored(*half: Point, x: float = 1, y: float = 1) -> list[Point]:
    """Return one half of an outline, from a point on its axis, and its mirror image."""
    return [*half, *((x * across, y * down) for across, down in reversed(half[1:]))]


def _heart() -> list[Point]:
    points = []
    for step in range(48):
        angle = math.radians(360 * step / 48)
        x = 16 * math.sin(angle) ** 3
        y = 13 * math.cos(angle) - 5 * math.cos(2 * angle) - 2 * math.cos(3 * angle)
        points.append((x / 16, -(y - math.cos(4 * angle) + 2) / 15.5))
    return points


def _flower() -> list[Point]:
    radii = [0.62 + 0.44 * abs(math.cos(math.radians(2.5 * 4.5 * step))) for step in range(80)]
    return _spokes(*radii, num=1)


# Contours of each shape; where two overlap there is a hole. Centered, about radius 1, y down.
OUTLINES: dict[str, list[list[Point]]] = {
    "circle": [_arc(0.95)],
    "square": [[(-0.84, -0.84), (0.84, -0.84), (0.84, 0.84), (-0.84, 0.84)]],
    "triangle": [[(0, -1), (1, 0.8), (-1, 0.8)]],
    "diamond": [[(0, -1.12), (0.78, 0), (0, 1.12), (-0.78, 0)]],
    "star": [_spokes(1.12, 0.47, num=5)],
    "heart": [_heart()],
    "cross": [_arms((-0.34, -1), (0.34, -1), (0.34, -0.34))],
    "ring": [_arc(1), _arc(0.48)],
    "crescent": [_arc(1, 58, 302, x=0.15) + _arc(0.85, 274, 86, num=30, x=0.62)],
    "arrow": [_mirrored((1.1, 0), (0.2, -0.88), (0.2, -0.36), (-1.05, -0.36), y=-1)],
    "house": [_mirrored((0, -1.1), (1.05, -0.12), (0.78, -0.12), (0.78, 0.92), x=-1)],
    "flower": [_flower(), _arc(0.2, num=16)],
}

SHAPES = tuple(OUTLINES)

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
    """How a background is spoken of, and which colors vanish on it."""

    noun: str
    preposition: str
    clashes: tuple[str, ...] = ()


BACKGROUNDS: dict[str, Background] = {
    "sky": Background("a cloudy sky", "in", ("white", "blue")),
    "sunset": Background("a sunset sky", "in", ("orange", "pink")),
    "night": Background("a starry night", "in", ("black", "blue")),
    "fog": Background("thick fog", "in", ("white",)),
    "wall": Background("a bare wall", "on"),
    "snow": Background("fresh snow", "on", ("white",)),
    "water": Background("calm water", "on", ("blue",)),
    "grass": Background("mown grass", "on", ("green",)),
    "sand": Background("rippled sand", "on", ("yellow", "orange")),
    "brick": Background("a brick wall", "on", ("red", "brown")),
    "wood": Background("wooden boards", "on", ("brown", "orange")),
    "tiles": Background("a tiled floor", "on", ("white",)),
    "field": Background("an open field", "in", ("green", "blue")),
    "beach": Background("a quiet beach", "on", ("white", "yellow")),
}

# Grounds that no scene has of itself: patterns of many colors, where the others are landscapes
# and plain surfaces. Pictures on these show how a model does on what training never held.
UNSEEN_BACKGROUNDS: dict[str, Background] = {
    "tartan": Background("a tartan blanket", "on"),
    "marble": Background("veined marble", "on"),
    "pebbles": Background("loose pebbles", "on"),
    "confetti": Background("scattered confetti", "on"),
    "lava": Background("glowing lava", "on"),
}

_MARGIN = 0.03
_GAP = 0.05
# A pair or a row of three stays this close to its axis, so that "above" is never "beside".
_SIDE_STEP = 0.07

T = TypeVar("T")

# numpy and Python keep the raw streams of their generators across versions, but not what their
# choice, shuffle or normal make of them. A hash as the source leaves nothing to change.
_NUMBERS_PER_BLOCK = 64


class Dice:
    """Random numbers named by a key.

    Equal keys give equal numbers, and a key one part longer an unrelated stream, so that asking
    for more numbers in one place changes none elsewhere.

    Args:
        *key: What the numbers are for, such as ("train", 17, "background").
    """

    def __init__(self, *key: str | int) -> None:
        self._key = "/".join(str(part) for part in key)
        self._numbers: list[int] = []
        self._num_blocks = 0

    def uniform(self, low: float = 0.0, high: float = 1.0) -> float:
        """Draw a number in [low, high)."""
        if not self._numbers:
            stream = self._bytes(f"block {self._num_blocks}", 4 * _NUMBERS_PER_BLOCK)
            self._numbers = np.frombuffer(stream, dtype="<u4").tolist()
            self._num_blocks += 1
        return low + (high - low) * (self._numbers.pop() / 2**32)

    def chance(self, probability: float) -> bool:
        """Return True with a probability in [0, 1]."""
        return self.uniform() < probability

    def choice(self, options: Sequence[T]) -> T:
        """Draw one of the options, each as likely as the others."""
        return options[int(self.uniform(0, len(options)))]

    def noise(self, name: str, height: int, width: int) -> NDArray[np.floating[Any]]:
        """Draw one number in [0, 1) per pixel.

        Args:
            name: Tells several fields of one key apart.
            height: Rows.
            width: Columns.

        Returns:
            Multiples of 1 / 256, shape (height, width).
        """
        stream = np.frombuffer(self._bytes(f"noise {name}", height * width), dtype=np.uint8)
        return stream.reshape(height, width).astype(np.float32) / 256

    def _bytes(self, name: str, num_bytes: int) -> bytes:
        return hashlib.shake_128(f"{self._key}/{name}".encode()).digest(num_bytes)


@dataclass(frozen=True)
class Thing:
    """One object. Lengths are shares of the image side, y points down.

    Args:
        shape: One of `SHAPES`.
        color: One of `COLORS`.
        texture: One of `TEXTURES`.
        size: One of `SIZES`.
        x: Center, from the left.
        y: Center, from the top.
        radius: Distance from the center to the farthest points of the outline, about.
        tilt: Clockwise rotation in degrees.
    """

    shape: str
    color: str
    texture: str
    size: str
    x: float
    y: float
    radius: float
    tilt: float


@dataclass(frozen=True)
class Scene:
    """One picture before it is drawn.

    Args:
        key: Names the random details that no caption speaks of (clouds, light, noise).
        background: One of `BACKGROUNDS`.
        arrangement: One of `PLACES` for one object, `RELATIONS` for two (of the first to the
            second), `LINES` for three (the first is in the middle).
        things: One to three objects whose circles do not touch; the borders of pointed shapes may.
    """

    key: str
    background: str
    arrangement: str
    things: tuple[Thing, ...]


@dataclass(frozen=True)
class Sample:
    """A scene and what is said of it.

    Args:
        key: Name within the world, such as "train-000017".
        scene: What to draw.
        caption: One sentence.
        label: Index of its class, in classification sets.
    """

    key: str
    scene: Scene
    caption: str
    label: int | None = None


def make_scene(
    key: str,
    *,
    num_things: int | None = None,
    shape: str | None = None,
    color: str | None = None,
    background: str | None = None,
    sizes: Sequence[str] | None = None,
) -> Scene:
    """Make up a scene; what is not given is drawn.

    Args:
        key: Source of every random number, and the scene's name.
        num_things: 1, 2 or 3.
        shape: Shape of the first object.
        color: Color of the first object.
        background: One of `BACKGROUNDS`.
        sizes: Sizes to draw from; None means all that fit: tiny for three objects, else the others.

    Raises:
        ValueError: If the color cannot be seen on the background, or no sizes fit.
    """
    dice = Dice(key, "scene")
    if background is not None and color in BACKGROUNDS[background].clashes:
        raise ValueError(f"{color} cannot be seen on {background}")
    if num_things is None:
        num_things = dice.choice((1, 1, 1, 1, 1, 1, 2, 2, 3))
    if background is None:
        background = dice.choice(
            [name for name, about in BACKGROUNDS.items() if color not in about.clashes]
        )
    visible = [name for name in COLORS if name not in BACKGROUNDS[background].clashes]
    shapes = _distinct(dice, SHAPES, num_things, first=shape)
    colors = _distinct(dice, visible, num_things, first=color)
    if sizes is None:
        sizes = ("tiny",) if num_things == 3 else ("small", "medium", "large")
    size_names, radii = _sizes(dice, sizes, num_things)
    arrangement, centers = _arrange(dice, radii)
    things = []
    for shape, color, size, (x, y), radius in zip(
        shapes, colors, size_names, centers, radii, strict=True
    ):
        texture, tilt = dice.choice((*TEXTURES, "plain", "plain")), round(dice.uniform(-10, 10), 1)
        things.append(Thing(shape, color, texture, size, round(x, 4), round(y, 4), radius, tilt))
    return Scene(key, background, arrangement, tuple(things))


def scene_key(seed: int, key: str) -> str:
    """Return what a sample's random numbers come from: the seed of its world and its own key."""
    return f"world {SCENE_VERSION}/seed {seed}/{key}"


def _distinct(dice: Dice, names: Sequence[str], number: int, first: str | None) -> list[str]:
    chosen = [] if first is None else [first]
    while len(chosen) < number:
        chosen.append(dice.choice([name for name in names if name not in chosen]))
    return chosen


def _sizes(dice: Dice, names: Sequence[str], number: int) -> tuple[list[str], list[float]]:
    """Draw sizes that fit beside each other."""
    room = 1 - 2 * _MARGIN - (number - 1) * _GAP
    if 2 * number * min(SIZES[name][0] for name in names) > room:
        raise ValueError(f"{number} objects of size {' or '.join(names)} do not fit in a row")
    while True:
        chosen = [dice.choice(names) for _ in range(number)]
        radii = [round(dice.uniform(*SIZES[name]), 4) for name in chosen]
        if 2 * sum(radii) <= room:
            return chosen, radii


def _arrange(dice: Dice, radii: list[float]) -> tuple[str, list[tuple[float, float]]]:
    """Draw an arrangement and the centers of its objects, in the order of `radii`."""
    if len(radii) == 1:
        place = dice.choice(tuple(PLACES))
        column, row = PLACES[place][0]
        return place, [(_in_third(dice, column, radii[0]), _in_third(dice, row, radii[0]))]
    if len(radii) == 2:
        arrangement = dice.choice(tuple(RELATIONS))
        order = [0, 1] if arrangement in ("above", "left") else [1, 0]
        is_vertical = arrangement in ("above", "below")
    else:
        arrangement = dice.choice(LINES)
        order = [1, 0, 2]
        is_vertical = arrangement == "down"

    along = _line_up(dice, [radii[position] for position in order])
    across = _in_third(dice, 1, max(radii), spread=0.5)
    centers = [(0.0, 0.0)] * len(radii)
    for position, main in zip(order, along, strict=True):
        lowest, highest = _reach(radii[position])
        side = min(max(across + dice.uniform(-_SIDE_STEP, _SIDE_STEP), lowest), highest)
        centers[position] = (side, main) if is_vertical else (main, side)
    return arrangement, centers


def _reach(radius: float) -> tuple[float, float]:
    return radius + _MARGIN, 1 - radius - _MARGIN


def _in_third(dice: Dice, third: int, radius: float, spread: float = 0.16) -> float:
    """Draw a center in the first, middle or last part of what a radius leaves free."""
    lowest, highest = _reach(radius)
    middle = (lowest, 0.5, highest)[third]
    step = spread * (highest - lowest)
    return min(max(middle + dice.uniform(-step, step), lowest), highest)


def _line_up(dice: Dice, radii: list[float]) -> list[float]:
    """Spread objects along a line, with the free room shared out at random."""
    free = 1 - 2 * _MARGIN - 2 * sum(radii) - (len(radii) - 1) * _GAP
    shares = [dice.uniform(0.2, 1) for _ in range(len(radii) + 1)]
    centers, position = [], _MARGIN
    for share, radius in zip(shares, radii, strict=False):
        position += free * share / sum(shares)
        centers.append(position + radius)
        position += 2 * radius + _GAP
    return centers
