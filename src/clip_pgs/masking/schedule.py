"""How a mask ratio goes from one value to another over training, in a few levels."""

from __future__ import annotations

import math

from clip_pgs.common import MASK_SCHEDULES
from clip_pgs.masking.strategy import check_choice, check_mask_ratio, check_range


def scheduled_ratio(
    start: float, end: float, *, progress: float, kind: str = "linear", num_levels: int = 5
) -> float:
    """Return the mask ratio at a point of training.

    Training is cut into `num_levels` equal parts with one ratio each, so that a compiled model
    meets few shapes. The first part has `start`, the last `end`, exactly.

    Args:
        start: Ratio of the first part, in [0, 1).
        end: Ratio of the last part, in [0, 1); has no effect on "constant".
        progress: Completed share of the masked training steps, in [0, 1].
        kind: "constant"; "linear" with equal steps between levels; "cosine" with small steps at
            both ends and large ones between, half a period.
        num_levels: Different ratios over training, >= 2; has no effect on "constant".

    Raises:
        ValueError: If an argument is out of its range.
    """
    for name, ratio in (("start", start), ("end", end)):
        check_mask_ratio(ratio, name=name)
    check_range(progress, name="progress", low=0, high=1)
    check_choice(kind, MASK_SCHEDULES, name="kind")
    if num_levels < 2:
        raise ValueError(f"num_levels must be >= 2, got {num_levels}")
    # 3 / 10 * 10 falls just short of 3 for some progress that means three tenths.
    level = min(math.floor(progress * num_levels + 1e-9), num_levels - 1)
    if kind == "constant" or level == 0:
        return start
    if level == num_levels - 1:
        return end
    share = level / (num_levels - 1)
    if kind == "cosine":
        share = (1 - math.cos(math.pi * share)) / 2
    return start + (end - start) * share
