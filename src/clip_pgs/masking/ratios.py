"""Ratios of patches: their range, and the counts that follow from them."""

from __future__ import annotations

import math


def mask_count(num_patches: int, mask_ratio: float) -> int:
    """Return how many of `num_patches` patches a mask ratio drops.

    One patch stays, however near to 1 the ratio is. The small constant keeps 100 * 0.29 at 29,
    which floating point would floor to 28.
    """
    return min(math.floor(num_patches * mask_ratio + 1e-9), num_patches - 1)


def keep_count(num_patches: int, mask_ratio: float) -> int:
    """Return how many of `num_patches` patches a mask ratio keeps."""
    return num_patches - mask_count(num_patches, mask_ratio)


def drawn_count(num_patches: int, ratio: float) -> int:
    """Return how many of `num_patches` patches a share draws as candidates: at least one."""
    return max(1, round(ratio * num_patches))


def check_mask_ratio(mask_ratio: float, *, name: str = "mask_ratio") -> None:
    """Refuse a mask ratio outside [0, 1).

    Raises:
        ValueError: If it is.
    """
    if not 0.0 <= mask_ratio < 1.0:
        raise ValueError(f"{name} must be in [0, 1), got {mask_ratio}")


def check_range(value: float, *, name: str, low: float, high: float) -> None:
    """Refuse a number outside [low, high], as a NaN is, too.

    Numbers that float32 cannot hold, or that take for ever, are outside of every option's range.

    Raises:
        ValueError: If it is.
    """
    if not low <= value <= high:
        raise ValueError(f"{name} must be in [{low:g}, {high:g}], got {value}")


def check_threshold(threshold: float | None) -> None:
    """Refuse a threshold that no comparison with float32 numbers takes; None is no threshold.

    Raises:
        ValueError: If it is.
    """
    if threshold is not None:
        check_range(threshold, name="threshold", low=-1e6, high=1e6)


def check_share(share: float, *, name: str) -> None:
    """Refuse a share outside (0, 1].

    Raises:
        ValueError: If it is.
    """
    if not 0.0 < share <= 1.0:
        raise ValueError(f"{name} must be in (0, 1], got {share}")


def lower_bound(mask_ratio: float, mask_ratio_min: float | None) -> float:
    """Return the lower bound of a mask ratio: the ratio itself where None is given.

    Raises:
        ValueError: If one is outside [0, 1), or the bound exceeds the ratio.
    """
    check_mask_ratio(mask_ratio)
    if mask_ratio_min is None:
        return mask_ratio
    check_mask_ratio(mask_ratio_min, name="mask_ratio_min")
    if mask_ratio_min > mask_ratio:
        raise ValueError(
            f"mask_ratio_min must not exceed mask_ratio = {mask_ratio}, got {mask_ratio_min}"
        )
    return mask_ratio_min
