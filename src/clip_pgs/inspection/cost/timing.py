"""How long the parts of a training step take, in rounds that take turns between setups."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from clip_pgs.inspection.cost.setups import Setup
from clip_pgs.inspection.cost.stopwatch import Stopwatch

PARTS = ("selection", "forward", "backward", "update")


@dataclass
class Timings:
    """Seconds that the parts of a setup's steps took, one number per round.

    `selection` is measured by itself and is also inside `forward`.
    """

    seconds: dict[str, list[float]] = field(default_factory=lambda: {part: [] for part in PARTS})
    steps: list[float] = field(default_factory=list)
    peak_bytes: int | None = None


def time_steps(
    setups: Sequence[Setup],
    optimizer: torch.optim.Optimizer,
    *,
    num_rounds: int,
    progress: Callable[[], object] | None = None,
) -> list[Timings]:
    """Time training steps: in every round, one of each setup.

    What slows the machine down for a while then meets all of them, and the ratio of two setups in
    one round stays right.

    Args:
        setups: They share their weights.
        optimizer: Of these weights.
        num_rounds: Rounds that count; one more comes first.
        progress: Called after every step.
    """
    all_timings = [Timings() for _ in setups]
    selections = [setup.selection() for setup in setups]
    for round_number in range(num_rounds + 1):
        for setup, select, timings in zip(setups, selections, all_timings, strict=True):
            parts, peak_bytes = _time_step(setup, select, optimizer)
            if round_number > 0:
                for part, seconds in parts.items():
                    timings.seconds[part].append(seconds)
                timings.steps.append(parts["forward"] + parts["backward"] + parts["update"])
                timings.peak_bytes = peak_bytes
            if progress is not None:
                progress()
    return all_timings


def _time_step(
    setup: Setup, select: Callable[[], object] | None, optimizer: torch.optim.Optimizer
) -> tuple[dict[str, float], int | None]:
    device = setup.conditions.images.device
    is_cuda = device.type == "cuda"
    if select is not None:
        selecting = Stopwatch(device)
        select()
        selecting.mark()
    if is_cuda:
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
    stopwatch = Stopwatch(device)
    loss = setup.forward()
    stopwatch.mark()
    loss.backward()
    stopwatch.mark()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    stopwatch.mark()
    parts = dict(zip(PARTS[1:], stopwatch.parts(), strict=True))
    parts["selection"] = 0.0 if select is None else selecting.parts()[0]
    return parts, torch.cuda.max_memory_allocated(device) if is_cuda else None
