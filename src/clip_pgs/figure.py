"""A figure of labeled pictures in rows and columns."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont

# Smaller pictures are enlarged by a whole number until their shorter side reaches this.
PANEL_SIZE = 224
MARGIN, GAP = 20, 12
TITLE_SIZE, CAPTION_SIZE = 20, 15
INK, PALE, PAPER = "black", "#555555", "white"

_LEGEND_SIZE, _BAR_HEIGHT = 13, 12
_TITLE_SIZE_MIN = 13
# What titles, legends of a few lines and margins take of the height.
_MAX_SURROUNDINGS = 512

Panel = tuple[Image.Image, str]


@dataclass(frozen=True)
class Legend:
    """How to read a column.

    Args:
        text: In a few words.
        ramp: A picture of the colors from low to high, one pixel high. None for no scale.
        ends: What the lowest and the highest color mean.
    """

    text: str
    ramp: Image.Image | None = None
    ends: tuple[str, str] = ("", "")


@dataclass(frozen=True)
class Column:
    """A column of a figure.

    Args:
        title: Stands above.
        panels: From top to bottom, a picture and the caption below it.
        legend: Stands below.
    """

    title: str
    panels: Sequence[Panel]
    legend: Legend | None = None


def draw_figure(columns: Sequence[Column]) -> Image.Image:
    """Lay out pictures of one size in a grid.

    Args:
        columns: From left to right, each with the same number of panels.

    Returns:
        The figure, in RGB.
    """
    panels = columns[0].panels
    width, height = panels[0][0].size
    title_height, (step_x, step_y) = TITLE_SIZE + GAP, _steps(width, height)
    bottom = MARGIN + title_height + len(panels) * step_y - GAP
    legend_height = max(_legend_height(column.legend, width) for column in columns)
    size = (2 * MARGIN + len(columns) * step_x - GAP, bottom + legend_height + MARGIN)
    figure = Image.new("RGB", size, PAPER)
    for number, column in enumerate(columns):
        x = MARGIN + number * step_x
        middle = x + width // 2
        _write(figure, column.title, (middle, MARGIN), TITLE_SIZE, INK, width)
        for row, (picture, caption) in enumerate(column.panels):
            y = MARGIN + title_height + row * step_y
            figure.paste(picture, (x, y))
            _write(figure, caption, (middle, y + height + GAP // 2), CAPTION_SIZE, PALE, width)
        if column.legend is not None:
            _draw_legend(figure, column.legend, (x, bottom + GAP), width)
    return figure


def most_sides(size: tuple[int, int], num_rows: int, num_columns: int) -> tuple[int, int]:
    """Return height and width that a figure of pictures of a size (height, width) has at most."""
    step_x, step_y = _steps(size[1], size[0])
    return num_rows * step_y + _MAX_SURROUNDINGS, num_columns * step_x + 2 * MARGIN


def _steps(width: int, height: int) -> tuple[int, int]:
    """Return how far a picture is from the next one to the right and below."""
    return width + GAP, height + CAPTION_SIZE + 2 * GAP


def _write(
    figure: Image.Image, text: str, place: tuple[int, int], size: int, ink: str, max_width: int
) -> None:
    """Write text with its top center at a place, smaller or shortened until it fits."""
    x, y = place
    font = _font(text, size)
    smallest = min(size, _TITLE_SIZE_MIN)
    while font.getlength(text) > max_width and size > smallest:
        size, y = size - 1, y + 1
        font = _font(text, size)
    if font.getlength(text) > max_width:
        while text and font.getlength(f"{text}...") > max_width:
            text = text[:-1]
        text = f"{text}..."
    ImageDraw.Draw(figure).text((x, y), text, fill=ink, font=font, anchor="ma")


def _font(text: str, size: int) -> Any:
    """Return Pillow's font, which has ASCII alone; for other letters matplotlib's, if there is."""
    if not text.isascii():
        with suppress(ImportError, OSError):
            from matplotlib import get_data_path

            return ImageFont.truetype(Path(get_data_path(), "fonts/ttf/DejaVuSans.ttf"), size)
    return ImageFont.load_default(size)


def _draw_legend(figure: Image.Image, legend: Legend, place: tuple[int, int], width: int) -> None:
    x, y = place
    draw, font = ImageDraw.Draw(figure), ImageFont.load_default(_LEGEND_SIZE)
    if legend.ramp is not None:
        figure.paste(legend.ramp.resize((width, _BAR_HEIGHT)), (x, y))
        y += _BAR_HEIGHT + 4
        low, high = legend.ends
        draw.text((x, y), low, fill=PALE, font=font, anchor="la")
        draw.text((x + width, y), high, fill=PALE, font=font, anchor="ra")
        y += _LEGEND_SIZE + GAP // 2
    for line in _wrapped(legend.text, width):
        draw.text((x, y), line, fill=INK, font=font, anchor="la")
        y += _LEGEND_SIZE + 4


def _legend_height(legend: Legend | None, width: int) -> int:
    if legend is None:
        return 0
    scale = 0 if legend.ramp is None else _BAR_HEIGHT + 4 + _LEGEND_SIZE + GAP // 2
    return GAP + scale + len(_wrapped(legend.text, width)) * (_LEGEND_SIZE + 4)


def _wrapped(text: str, width: int) -> list[str]:
    """Break text into lines of at most a width in pixels; a letter is half as wide as high."""
    return textwrap.wrap(text, 2 * width // _LEGEND_SIZE)
