"""What all figures share: look, colours, and their form as files.

Runs have the colours of Okabe and Ito, which colour-blind readers tell apart, and published rows
shades of grey. Hatches, markers and line styles say the same without any colour.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure as MatplotlibFigure

from clip_pgs.evaluation.report.tables import CHANCE, PUBLISHED, RUN, Entry

INK, FAINT = "#1a1a1a", "#d9d9d9"
# Stands in every figure file, so that a later report knows it from the files of others and from
# a copy under another name.
_MARK = "clip-pgs evaluation report ({name})"
_MARK_PLACE = 4096  # bytes from the beginning that hold it
_RUN_COLORS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#56B4E9")
_RUN_HATCHES = ("", "//", "..", "xx", "\\\\", "oo")
_RUN_MARKERS = ("o", "s", "^", "D", "v", "P")
_GREYS = ("#f2f2f2", "#dcdcdc", "#c3c3c3", "#a6a6a6", "#858585", "#5e5e5e")
_LINES = ("-", "--", ":", "-.", (0, (5, 1, 1, 1, 1, 1)), (0, (1, 1)))
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
    """A figure in both its forms.

    Attributes:
        name: Of its files, without ending.
        alt: What it shows, for those who do not see it.
        caption: How to read it.
        svg: As SVG.
        png: As PNG, 200 dots per inch.
    """

    name: str
    alt: str
    caption: str
    svg: bytes
    png: bytes


@dataclass(frozen=True)
class Look:
    """How an entry is drawn.

    Attributes:
        fill: Colour of bars and markers.
        hatch: Of bars.
        marker: Of points.
        line: Style of lines.
        width: Of lines, in points.
    """

    fill: str
    hatch: str
    marker: str
    line: str | tuple[int, tuple[int, ...]]
    width: float

    @property
    def stroke(self) -> str:
        """Colour of lines: never too light for white paper."""
        return "#707070" if self.fill in _GREYS else self.fill

    @property
    def line_options(self) -> dict[str, Any]:
        """What matplotlib's `plot` takes for a line with markers."""
        return {
            "color": self.stroke,
            "linestyle": self.line,
            "linewidth": self.width,
            "marker": self.marker,
            "markersize": 5,
            "markeredgecolor": INK,
            "markeredgewidth": 0.5,
        }


@contextmanager
def look_of_the_report() -> Iterator[None]:
    """Set matplotlib's look while a figure is drawn, whatever the user's own settings are."""
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(_SETTINGS)
        yield


def looks(entries: Sequence[Entry]) -> dict[str, Look]:
    """Return the look of each entry; more than six of a kind repeat.

    Args:
        entries: All rows of a family, whether this figure shows them or not, so that a model looks
            the same in every figure.
    """
    chosen: dict[str, Look] = {}
    counts = {PUBLISHED: 0, RUN: 0, CHANCE: 0}
    for entry in entries:
        place = counts[entry.kind] % 6
        counts[entry.kind] += 1
        if entry.kind == PUBLISHED:
            look = Look(_GREYS[place], "", _RUN_MARKERS[place], _LINES[place], 1.0)
        elif entry.kind == CHANCE:
            look = Look(INK, "", "_", ":", 1.2)
        else:
            hatch, marker = _RUN_HATCHES[place], _RUN_MARKERS[place]
            look = Look(_RUN_COLORS[place], hatch, marker, _LINES[place], 2.0)
        chosen[f"{entry.kind} {entry.name}"] = look
    return chosen


def look_of(entry: Entry, chosen: dict[str, Look]) -> Look:
    """Return an entry's look among those of its family."""
    return chosen[f"{entry.kind} {entry.name}"]


def label_of(entry: Entry) -> str:
    """Return an entry's name in a legend."""
    return f"{entry.name} (published)" if entry.kind == PUBLISHED else entry.name


def quiet_axis(axes: Axes) -> None:
    """Put faint horizontal lines behind the data and take the ticks' strokes away."""
    axes.set_axisbelow(True)
    axes.grid(axis="y", color=FAINT, linewidth=0.6)
    axes.tick_params(length=0)


def finish(drawing: MatplotlibFigure, *, name: str, alt: str, caption: str) -> Figure:
    """Save a drawing in both forms, with a white ground, our mark and no date."""
    svg, png = io.BytesIO(), io.BytesIO()
    mark = _MARK.format(name=name)
    maker: dict[str, Any] = {"Creator": mark, **dict.fromkeys(("Date", "Format", "Type"))}
    common: dict[str, Any] = {"bbox_inches": "tight", "pad_inches": 0.08, "facecolor": "white"}
    drawing.savefig(svg, format="svg", metadata=maker, **common)
    drawing.savefig(png, format="png", dpi=200, metadata={"Software": mark}, **common)
    return Figure(name, alt, caption, svg.getvalue(), png.getvalue())


def is_own_figure(path: Path) -> bool:
    """Say whether a file is a figure that a report drew, now or earlier."""
    if path.suffix not in (".svg", ".png") or not path.is_file() or path.is_symlink():
        return False
    with path.open("rb") as file:
        return _MARK.format(name=path.stem).encode() in file.read(_MARK_PLACE)
