"""How a share of patches goes from one value to another over training, in a few levels."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

from torch import Tensor

from clip_pgs.common import check_choice
from clip_pgs.masking.strategy import Number, check_range
from clip_pgs.registry import MASK_SCHEDULES


def scheduled_ratio(
    start: float,
    end: float | None,
    *,
    progress: Number,
    kind: str = "linear",
    num_levels: int = 5,
) -> float | Number:
    """Return the mask ratio, or another share of patches, at a point of training.

    Training is cut into `num_levels` equal parts with one ratio each, so that a compiled model
    meets few shapes. The first part has `start`, the last `end`, exactly.

    Args:
        start: Ratio of the first part, in [0, 1].
        end: Ratio of the last part, in [0, 1]; has no effect on "constant". None stays at `start`.
        progress: Completed share of the masked training steps, in [0, 1]; in a compiled model a
            tensor of shape () and `exact_dtype`, and then so is a "linear" ratio that changes.
        kind: "constant"; "linear" with equal steps between levels; "cosine" with small steps at
            both ends and large ones between, half a period.
        num_levels: Different ratios over training, >= 2; has no effect on "constant".

    Raises:
        ValueError: If an argument is out of its range.
    """
    for name, ratio in (("start", start), ("end", end)):
        check_range(ratio, name=name, low=0, high=1, optional=name == "end")
    if not isinstance(progress, Tensor):
        check_range(progress, name="progress", low=0, high=1)
    check_choice(kind, MASK_SCHEDULES, name="kind")
    if num_levels < 2:
        raise ValueError(f"num_levels must be >= 2, got {num_levels}")
    if kind == "constant" or end is None:
        return start
    # 3 / 10 * 10 falls just short of 3 for some progress that means three tenths.
    place = progress * num_levels + 1e-9
    if isinstance(place, Tensor):
        share: Any = place.floor().clamp(max=num_levels - 1) / (num_levels - 1)
    else:
        share = min(math.floor(place), num_levels - 1) / (num_levels - 1)
    if kind == "cosine":
        share = (1 - math.cos(math.pi * float(share))) / 2
    # Exact at both ends; without a branch, a compiled model need not tell the levels apart.
    return start * (1 - share) + end * share


def scheduled_levels(
    start: float, end: float | None, *, num_steps: int, kind: str = "linear", num_levels: int = 5
) -> list[tuple[float, int]]:
    """Return the ratios of a training in their order, each with the steps that it lasts.

    A training of few steps leaves levels out.

    Args:
        start: As for `scheduled_ratio`.
        end: As for `scheduled_ratio`.
        num_steps: Masked training steps.
        kind: As for `scheduled_ratio`.
        num_levels: As for `scheduled_ratio`.

    Raises:
        ValueError: If an argument is out of its range.
    """
    if kind == "constant":
        return [(start, num_steps)]
    firsts = [math.ceil(num_steps * level / num_levels) for level in range(num_levels + 1)]
    return [
        (
            scheduled_ratio(
                start, end, progress=first / num_steps, kind=kind, num_levels=num_levels
            ),
            after - first,
        )
        for first, after in pairwise(firsts)
        if after > first
    ]
