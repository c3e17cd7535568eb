"""A plot of throughput against operations per sample, with the lines that bound it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from clip_pgs.inspection.cost.peaks import Peak
from clip_pgs.inspection.cost.rows import Row

# Okabe and Ito's colours, which colour-blind readers tell apart.
_COLORS = ("#000000", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
_MARKERS = "osD^vPX"
_INK, _FAINT = "#1a1a1a", "#808080"
_ROOM = 1.25  # between the outermost points and the frame


def plot_cost(
    rows: Sequence[Row], path: Path, *, batch_size: int, peak: Peak | None, title: str
) -> None:
    """Draw a point per setup into a PNG file.

    On a line, samples per second times operations per sample is one rate: the device's peak, and
    what the first setup reaches. A point below the latter loses saved operations again.

    Args:
        rows: What was measured.
        path: File to write.
        batch_size: Samples per step.
        peak: The device's, where it is known.
        title: Stands above.

    Raises:
        ValueError: If matplotlib is not installed, or the file cannot be written.
    """
    try:
        import matplotlib
        from matplotlib.figure import Figure
        from matplotlib.ticker import FuncFormatter
    except ImportError:
        raise ValueError("the plot needs the package matplotlib: pip install matplotlib") from None
    flops = [row.flops / batch_size for row in rows]
    rates = {f"rate of {rows[0].title}": (rows[0].flops / rows[0].step, "--")}
    if peak is not None:
        rates["peak"] = (peak.flops, "-")
    ends = (min(flops) / _ROOM, max(flops) * _ROOM)
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update({"font.size": 9, "text.color": _INK, "axes.edgecolor": _INK})
        drawing = Figure(figsize=(6.4, 5.4), layout="constrained")
        axes = drawing.subplots()
        axes.spines[["top", "right"]].set_visible(False)
        for label, (rate, style) in rates.items():
            axes.plot(
                [end / 1e9 for end in ends],
                [rate / end for end in ends],
                linestyle=style,
                color=_FAINT,
                linewidth=1.2,
                label=f"{label}: {_rate_text(rate)}",
            )
        for number, (row, count) in enumerate(zip(rows, flops, strict=True)):
            axes.plot(
                [count / 1e9],
                [row.samples_per_second],
                linestyle="none",
                color=_COLORS[number % len(_COLORS)],
                marker=_MARKERS[number % len(_MARKERS)],
                markersize=7,
                label=row.title,
            )
        axes.set_xscale("log")
        axes.set_yscale("log")
        for axis in (axes.xaxis, axes.yaxis):
            for which in (axis.set_major_formatter, axis.set_minor_formatter):
                which(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.set_xlabel("GFLOPs per sample, forward and backward")
        axes.set_ylabel("samples per second")
        axes.set_title(title, loc="left", fontsize=9.5, fontweight="bold")
        drawing.legend(frameon=False, loc="outside lower center", ncols=3, fontsize=8)
        try:
            drawing.savefig(path, dpi=150, metadata={"Software": None})
        except OSError as error:
            raise ValueError(f"cannot write {path}: {error.strerror}") from None


def _rate_text(rate: float) -> str:
    return f"{rate / 1e12:.0f} TFLOP/s" if rate >= 1e13 else f"{rate / 1e9:.0f} GFLOP/s"
