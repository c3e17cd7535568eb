"""One style for all plots: colors, markers, grid and files. Importing it needs matplotlib.

Lines and bars have the colors of Okabe and Ito, which color-blind readers tell apart; markers,
hatches and line styles say the same without any color.
"""

from __future__ import annotations

import errno
import io
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

import matplotlib
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure as Drawing
from matplotlib.ticker import LogLocator, NullLocator

from clip_pgs.files import write_bytes

INK, FAINT, MIDDLE = "#1a1a1a", "#d9d9d9", "#808080"
COLORS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#56B4E9")
GRAYS = ("#f2f2f2", "#dcdcdc", "#c3c3c3", "#a6a6a6", "#858585", "#5e5e5e")
MARKERS = ("o", "s", "^", "D", "v", "P")
HATCHES = ("", "//", "..", "xx", "\\\\", "oo")
# The first bytes of a figure's file, which hold its mark.
_MARK_PLACE = 4096
LINES = ("-", "--", ":", "-.", (0, (5, 1, 1, 1, 1, 1)), (0, (1, 1)))

_SETTINGS: dict[Any, Any] = {
    "font.family": "sans-serif",
    "font.size": 9,
    "axes.edgecolor": INK,
    "axes.linewidth": 0.7,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": False,
    "axes.titlesize": 9.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "hatch.linewidth": 0.5,
    "legend.frameon": False,
    "text.color": INK,
    "text.parse_math": False,
    "axes.labelcolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "svg.fonttype": "path",
    "svg.hashsalt": "clip-pgs",
}


@dataclass(frozen=True)
class Figure:
    """A figure of a page, in both its forms.

    Attributes:
        name: Of its files, without ending.
        alt: What it shows, for those who do not see it.
        caption: How to read it.
        svg: As SVG.
        png: As PNG.
    """

    name: str
    alt: str
    caption: str
    svg: bytes
    png: bytes

    @classmethod
    def of(cls, drawing: Drawing, name: str, alt: str, caption: str, *, mark: str) -> Figure:
        """Save a drawing, with the mark of whoever made it; see `picture` and `figure_mark`."""
        own = figure_mark(mark, name)
        svg, png = (picture(drawing, form, mark=own) for form in ("svg", "png"))
        return cls(name, alt, caption, svg, png)


@contextmanager
def plot_style() -> Iterator[None]:
    """Set the style while a figure is drawn and saved, whatever the user's own settings are."""
    with matplotlib.rc_context(), warnings.catch_warnings():
        # A name may be of a script that the font lacks.
        warnings.filterwarnings("ignore", message="Glyph ")
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(_SETTINGS)
        yield


def look_of(number: int) -> dict[str, Any]:
    """Return color, marker and line of the thing of this number, from 0; no two are all alike."""
    turn, place = divmod(number, len(COLORS))
    marker, line = MARKERS[(place + turn) % len(MARKERS)], LINES[turn % len(LINES)]
    return {"color": COLORS[place], "marker": marker, "linestyle": line}


def quiet_axis(axes: Axes) -> None:
    """Put faint horizontal lines behind the data and take the ticks' strokes away."""
    axes.set_axisbelow(True)
    axes.grid(axis="y", color=FAINT, linewidth=0.6)
    axes.tick_params(length=0)


def log_ticks(axis: Axis) -> None:
    """Give a logarithmic axis few ticks, in plain numbers."""
    axis.set_major_locator(LogLocator(subs=(1, 2, 5), numticks=8))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter("{x:g}")


def legend_label(name: str) -> str:
    """Return a name that a legend shows: matplotlib leaves out what begins with an underscore."""
    return f" {name}" if name.startswith("_") else name


def picture(drawing: Drawing, form: str, *, mark: str | None = None) -> bytes:
    """Return a figure as a file's content, the same for the same figure: without any date.

    Args:
        drawing: Drawn within `plot_style`, which still holds.
        form: "svg", or "png" with 200 dots per inch.
        mark: Who made it, in the file's metadata.
    """
    metadata: dict[str, Any] = {"Software": mark}
    if form == "svg":
        metadata = {"Creator": mark, **dict.fromkeys(("Date", "Format", "Type"))}
    stream = io.BytesIO()
    drawing.savefig(
        stream,
        format=form,
        dpi=200,
        metadata=metadata,
        bbox_inches="tight",
        pad_inches=0.08,
        facecolor="white",
    )
    return stream.getvalue()


def write_figures(figures: Sequence[Figure], folder: Path, *, mark: str) -> None:
    """Write both forms of figures into a folder, which is made if need be.

    Args:
        figures: All of a page.
        folder: Earlier figures of the page are removed from it, and no other file is: not those of
            others, nor a copy under another name.
        mark: Of whoever made it; see `figure_mark`.

    Raises:
        OSError: If one cannot be written; each is there whole or not at all. Or if the folder is a
            link, which in somebody else's report or study may lead anywhere.
    """
    if folder.is_symlink():
        raise NotADirectoryError(errno.ENOTDIR, "it is a link; remove it", str(folder))
    folder.mkdir(parents=True, exist_ok=True)
    for figure in figures:
        write_bytes(folder / f"{figure.name}.svg", figure.svg)
        write_bytes(folder / f"{figure.name}.png", figure.png)
    names = {figure.name for figure in figures}
    for path in list(folder.iterdir()):
        if path.stem not in names and _has_mark(path, figure_mark(mark, path.stem)):
            path.unlink()


def figure_mark(mark: str, name: str) -> str:
    """Return what stands in the files of a figure, and in both forms as it is: ASCII alone.

    Args:
        mark: Of whoever made it.
        name: Of the figure.
    """
    return f"{mark} ({quote(name, errors='surrogateescape')})"


def _has_mark(path: Path, mark: str) -> bool:
    if path.suffix not in (".svg", ".png") or not path.is_file() or path.is_symlink():
        return False
    with path.open("rb") as file:
        return mark.encode() in file.read(_MARK_PLACE)
