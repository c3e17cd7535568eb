"""What is said about each setup, out of its timings and operations."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

from clip_pgs.inspection.cost.compilation import Compilation
from clip_pgs.inspection.cost.peaks import Peak
from clip_pgs.inspection.cost.timing import Timings


@dataclass(frozen=True)
class Row:
    """The cost of a training step; all seconds are medians over rounds.

    Attributes:
        title: The setup's.
        text_tokens: Tokens that the text tower reads per caption, on average.
        selection: Seconds of choosing patches, measured by itself; part of `forward`.
        selection_share: Its share of the step.
        forward: Seconds of model and loss.
        backward: Seconds of the gradients.
        update: Seconds of the optimiser.
        step: Seconds of the three together.
        samples_per_second: Batch size over `step`.
        peak_gib: Highest memory of the GPU during a step, weights included; None on a CPU.
        flops: Operations of a step.
        time_over_first: Step time over the first setup's, median of the rounds' ratios.
        flops_over_first: Operations over the first setup's.
        time_over_ideal: `time_over_first` over `flops_over_first`: 1 turns every saved operation
            into saved time.
        utilisation: Operations per second as a share of the peak; None where that is not known.
        graph_breaks: See `Compilation`; None for a model that is not compiled.
        recompilations: See `Compilation`.
    """

    title: str
    text_tokens: float
    selection: float
    selection_share: float
    forward: float
    backward: float
    update: float
    step: float
    samples_per_second: float
    peak_gib: float | None
    flops: float
    time_over_first: float
    flops_over_first: float
    time_over_ideal: float
    utilisation: float | None
    graph_breaks: int | None = None
    recompilations: int | None = None


def make_rows(
    titles: Sequence[str],
    timings: Sequence[Timings],
    *,
    flops: Sequence[float],
    text_tokens: Sequence[float],
    batch_size: int,
    peak: Peak | None,
    compilations: Sequence[Compilation] | None = None,
) -> list[Row]:
    """Summarise setups, the first of which is what the others are compared with."""
    rows = []
    watched = [None] * len(titles) if compilations is None else compilations
    for title, timing, count, tokens, compilation in zip(
        titles, timings, flops, text_tokens, watched, strict=True
    ):
        parts = {part: median(seconds) for part, seconds in timing.seconds.items()}
        step = median(timing.steps)
        ratio = median(a / b for a, b in zip(timing.steps, timings[0].steps, strict=True))
        peak_bytes = timing.peak_bytes
        rows.append(
            Row(
                title=title,
                text_tokens=tokens,
                selection=parts["selection"],
                selection_share=parts["selection"] / step,
                forward=parts["forward"],
                backward=parts["backward"],
                update=parts["update"],
                step=step,
                samples_per_second=batch_size / step,
                peak_gib=None if peak_bytes is None else peak_bytes / 2**30,
                flops=count,
                time_over_first=ratio,
                flops_over_first=count / flops[0],
                time_over_ideal=ratio * flops[0] / count,
                utilisation=None if peak is None else count / step / peak.flops,
                graph_breaks=None if compilation is None else compilation.graph_breaks,
                recompilations=None if compilation is None else compilation.recompilations,
            )
        )
    return rows
