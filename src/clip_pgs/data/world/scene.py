"""What is in a scene, as plain data, and how a scene is made up."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from clip_pgs.data.world.dice import Dice
from clip_pgs.data.world.vocabulary import (
    BACKGROUNDS,
    COLORS,
    LINES,
    PLACES,
    RELATIONS,
    SHAPES,
    SIZES,
    TEXTURES,
)

_MARGIN = 0.03
_GAP = 0.05
# A pair or a row of three stays this close to its axis, so that "above" is never "beside".
_SIDE_STEP = 0.07


@dataclass(frozen=True)
class Thing:
    """One object. Lengths are shares of the image side, y points down.

    Args:
        shape: One of `SHAPES`.
        color: One of `COLORS`.
        texture: One of `TEXTURES`.
        size: One of `SIZES`.
        x: Centre, from the left.
        y: Centre, from the top.
        radius: Distance from the centre to the farthest points of the outline, about.
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
        color: Colour of the first object.
        background: One of `BACKGROUNDS`.
        sizes: Sizes to draw from; None means all that fit: tiny for three objects, else the others.

    Raises:
        ValueError: If the colour cannot be seen on the background, or no sizes fit.
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
    things = tuple(
        Thing(
            shape=shapes[number],
            color=colors[number],
            texture=dice.choice((*TEXTURES, "plain", "plain")),
            size=size_names[number],
            x=round(centers[number][0], 4),
            y=round(centers[number][1], 4),
            radius=radii[number],
            tilt=round(dice.uniform(-10, 10), 1),
        )
        for number in range(num_things)
    )
    return Scene(key=key, background=background, arrangement=arrangement, things=things)


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
    """Draw an arrangement and the centres of its objects, in the order of `radii`."""
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
    """Draw a centre in the first, middle or last part of what a radius leaves free."""
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
