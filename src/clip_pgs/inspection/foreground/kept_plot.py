"""A plot of the share of the foreground that strategies keep, against the mask ratio."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from clip_pgs.common import atomic_file
from clip_pgs.inspection.foreground.kept import Kept

# Okabe and Ito's colours, which colour-blind readers tell apart.
_COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_MARKERS = "osD^vPX"
_LINES = ("-", "--", "-.")
_SHIFT = 0.006
_INK, _FAINT = "#1a1a1a", "#d9d9d9"


def plot_kept(rows: Sequence[Kept], path: Path, *, title: str) -> None:
    """Draw a line per strategy, with bars of one standard deviation over seeds, into a PNG file.

    Args:
        rows: What was measured.
        path: File to write.
        title: Stands above.

    Raises:
        ValueError: If matplotlib is not installed.
    """
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError:
        raise ValueError("the plot needs the package matplotlib: pip install matplotlib") from None
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update({"font.size": 9, "text.color": _INK, "axes.edgecolor": _INK})
        maskings = list(dict.fromkeys(row.masking for row in rows))
        # The legend stands beside the lines and must not squeeze them.
        width = max(6.4, 4.4 + 0.08 * max(map(len, maskings)))
        drawing = Figure(figsize=(width, 4.0), layout="constrained")
        axes = drawing.subplots()
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", color=_FAINT, linewidth=0.6)
        axes.set_axisbelow(True)
        ratios = sorted({row.mask_ratio for row in rows})
        axes.plot(
            ratios,
            [1 - ratio for ratio in ratios],
            color="#808080",
            linestyle=":",
            label="no preference",
        )
        for number, masking in enumerate(maskings):
            points = sorted((r.mask_ratio, r.kept, r.spread) for r in rows if r.masking == masking)
            x, y, spread = zip(*points, strict=True)
            # Side by side, since bars on one spot hide each other.
            shift = _SHIFT * (number - (len(maskings) - 1) / 2)
            axes.errorbar(
                [ratio + shift for ratio in x],
                y,
                yerr=spread,
                color=_COLORS[number % len(_COLORS)],
                marker=_MARKERS[number % len(_MARKERS)],
                linestyle=_LINES[number // len(_COLORS) % len(_LINES)],
                markersize=5,
                linewidth=1.4,
                elinewidth=0.9,
                capsize=3,
                label=masking,
            )
        axes.set_xticks(ratios)
        axes.set_ylim(bottom=0)
        axes.set_xlabel("mask ratio")
        axes.set_ylabel("share of foreground patches kept")
        axes.set_title(title, loc="left", fontsize=9.5, fontweight="bold")
        axes.legend(frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
        with atomic_file(path) as file:
            drawing.savefig(file, format="png", dpi=150, metadata={"Software": None})
