"""A figure of labelled pictures in rows and columns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from PIL import Image, ImageDraw, ImageFont

MARGIN, GAP = 20, 12
TITLE_SIZE, CAPTION_SIZE = 20, 15
INK, PALE, PAPER = "black", "#555555", "white"

Panel = tuple[Image.Image, str]


def draw_figure(columns: Mapping[str, Sequence[Panel]]) -> Image.Image:
    """Lay out pictures of one size in a grid.

    Args:
        columns: By the title that stands above, the panels from top to bottom: a picture and the
            caption below it. Every column has the same number.

    Returns:
        The figure, in RGB.
    """
    first = next(iter(columns.values()))
    width, height = first[0][0].size
    title_height, caption_height = TITLE_SIZE + GAP, CAPTION_SIZE + GAP
    step_x, step_y = width + GAP, height + caption_height + GAP
    size = (
        2 * MARGIN + len(columns) * step_x - GAP,
        2 * MARGIN + title_height + len(first) * step_y - GAP,
    )
    figure = Image.new("RGB", size, PAPER)
    for column, (title, panels) in enumerate(columns.items()):
        x = MARGIN + column * step_x
        middle = x + width // 2
        _write(figure, title, (middle, MARGIN), TITLE_SIZE, INK, width)
        for row, (picture, caption) in enumerate(panels):
            y = MARGIN + title_height + row * step_y
            figure.paste(picture, (x, y))
            _write(figure, caption, (middle, y + height + GAP // 2), CAPTION_SIZE, PALE, width)
    return figure


def _write(
    figure: Image.Image, text: str, place: tuple[int, int], size: int, ink: str, max_width: int
) -> None:
    """Write text with its top centre at a place, shortened to what fits."""
    font = ImageFont.load_default(size)
    if font.getlength(text) > max_width:
        while text and font.getlength(f"{text}...") > max_width:
            text = text[:-1]
        text = f"{text}..."
    ImageDraw.Draw(figure).text(place, text, fill=ink, font=font, anchor="ma")
