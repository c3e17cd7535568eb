"""Thresholds of adaptive strategies: tables of them, their search, and a record of the search."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field

NUM_BATCHES = 8  # whose thresholds are averaged at one point of training
NUM_POINTS = 10  # points of training with a threshold of their own
TOLERANCE = 0.01  # of the mask ratio

_NUM_HALVINGS = 24
_logger = logging.getLogger(__name__)


def interpolate(points: tuple[tuple[float, float], ...], position: float) -> float:
    """Return the height at a position of the straight lines that join points.

    Args:
        points: (position, height), ascending by position.
        position: Where to read; beyond either end the last height holds.
    """
    (start, low), *rest = points
    if position <= start:
        return low
    for end, high in rest:
        if position <= end:
            return low + (high - low) * (position - start) / (end - start)
        start, low = end, high
    return low


def bisect_threshold(mean_ratio: Callable[[float], float], *, target: float) -> float:
    """Find the similarity threshold at which the mean mask ratio hits a target.

    Args:
        mean_ratio: Returns the mean mask ratio of a batch at a threshold; the higher the
            threshold, the lower the ratio. It is called equally often whatever it returns, so
            that processes which average in it stay together.
        target: Wanted mean mask ratio.

    Returns:
        A threshold in [-1, 1]. Where none comes within `TOLERANCE`, the nearest, with a warning.
    """
    low, high = -1.0, 1.0
    for _ in range(_NUM_HALVINGS):
        middle = (low + high) / 2
        if mean_ratio(middle) > target:
            low = middle
        else:
            high = middle
    below, above = mean_ratio(high), mean_ratio(low)
    threshold, reached = (high, below) if target - below <= above - target else (low, above)
    if abs(reached - target) > TOLERANCE:
        _logger.warning(
            "no threshold gives this batch a mean mask ratio of %.3f; the nearest gives %.3f",
            target,
            reached,
        )
    return threshold


@dataclass
class ThresholdRecord:
    """Thresholds in the order they were found, one for each point of training.

    A point is a mask ratio in one tenth of training. Its threshold is the mean over the batches
    seen there.

    Args:
        thresholds: The threshold of each point.
        mask_ratios: The mean mask ratio that it was found for.
        progress: The progress at which it was first found, in [0, 1].
        num_batches: How many batches it is the mean of.
    """

    thresholds: list[float] = field(default_factory=list)
    mask_ratios: list[float] = field(default_factory=list)
    progress: list[float] = field(default_factory=list)
    num_batches: list[float] = field(default_factory=list)

    @classmethod
    def from_state(cls, state: Mapping[str, float | list[float]]) -> ThresholdRecord:
        """Build a record from what `state` returned.

        Raises:
            ValueError: If the numbers are no such record.
        """
        names = list(cls().state())
        columns = {name: list(v) for name, v in state.items() if isinstance(v, (list, tuple))}
        lengths = {len(column) for column in columns.values()}
        if sorted(columns) != sorted(names) or len(columns) != len(state) or len(lengths) != 1:
            raise ValueError(
                f"the state of cluster must hold lists of one length named {', '.join(names)}, "
                f"got {dict(state)}"
            )
        return cls(**columns)

    def state(self) -> dict[str, float | list[float]]:
        """Return the record as lists of plain numbers."""
        return asdict(self)

    def latest_ratio(self) -> float | None:
        """Return the mask ratio of the latest point, None before the first."""
        return self.mask_ratios[-1] if self.mask_ratios else None

    def is_settled(self, mask_ratio: float, progress: float) -> bool:
        """Return whether the latest point is this one and has seen all its batches."""
        return self._is_latest(mask_ratio, progress) and self.num_batches[-1] >= NUM_BATCHES

    def add(self, threshold: float, mask_ratio: float, progress: float) -> float:
        """Take in the threshold of one more batch and return the mean of its point."""
        if not self._is_latest(mask_ratio, progress):
            self.thresholds.append(threshold)
            self.mask_ratios.append(mask_ratio)
            self.progress.append(progress)
            self.num_batches.append(1)
            return threshold
        self.num_batches[-1] += 1
        self.thresholds[-1] += (threshold - self.thresholds[-1]) / self.num_batches[-1]
        return self.thresholds[-1]

    def _is_latest(self, mask_ratio: float, progress: float) -> bool:
        if self.latest_ratio() != mask_ratio:
            return False
        return _point(self.progress[-1]) == _point(progress)


def _point(progress: float) -> int:
    # 3 / 10 * 10 lies just below 3 for some progress that means three tenths.
    return int(progress * NUM_POINTS + 1e-9)
