"""Thresholds that training finds, so that the mean mask ratio meets a target.

`cluster` finds its own unless it is given one, `pgs` where it is given `mask_ratio_mean`. On each
of the first `NUM_BATCHES` batches of each tenth of training bisection looks for one; the mean of
those is in force. It is found anew because embeddings take over from pixels in the similarity.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field

import torch
from torch import Tensor

from clip_pgs.masking.sampling import draw_noise
from clip_pgs.masking.strategy import MaskingStrategy, PatchInputs, check_range

_logger = logging.getLogger(__name__)

NUM_BATCHES = 8  # whose thresholds are averaged at one point of training
NUM_POINTS = 10  # points of training with a threshold of their own
TOLERANCE = 0.01  # of the mask ratio
_NUM_HALVINGS = 24
# Of the numbers in a record.
_RANGES = {
    "thresholds": (-1e7, 1),  # below -1 by the weights that protect patches
    "mask_ratios": (0, 1),
    "progress": (0, 1),
    "num_batches": (1, 1e9),
}


class CalibratedMasking(MaskingStrategy):
    """A strategy that masks what scores above a threshold, which training may look for.

    Attributes:
        threshold: The one in force; None where there is none yet.
        is_calibrated_in_training: Whether training looks for it.
        record: What was found so far; None in a strategy that never looks.
    """

    threshold: float | None
    is_calibrated_in_training: bool
    record: ThresholdRecord | None

    def mean_ratio(self) -> float:
        """Return the mean mask ratio that the threshold shall give."""
        raise NotImplementedError

    def first_threshold(self) -> float | None:
        """Return what holds before any was found."""
        raise NotImplementedError

    def score_for_threshold(self, inputs: PatchInputs, noise: Tensor) -> Tensor:
        """Score patches, shape (B, N); what goes at any threshold is infinite."""
        raise NotImplementedError

    def lowest_score(self) -> float:
        """Return a number that no score lies below."""
        return -1.0

    def masked_counts(self, scores: Tensor, threshold: float | Tensor) -> Tensor:
        """Return how many patches of each image score above a threshold, within the bounds."""
        raise NotImplementedError

    def set_mask_ratio(self, mask_ratio: float) -> None:
        """Change the mask ratio and with it the lower bound; see `MaskingStrategy`."""
        super().set_mask_ratio(mask_ratio)
        if self.is_calibrated_in_training:
            assert self.record is not None
            if self.record.latest_ratio() != self.mean_ratio():
                self.threshold = self.first_threshold()

    def state(self) -> dict[str, float | list[float]]:
        """Return the thresholds found so far, with the ratio and the progress of each."""
        return {} if self.record is None else self.record.state()

    def load_state(self, state: Mapping[str, float | list[float]]) -> None:
        """Restore what `state` returned, and the threshold found last.

        Raises:
            ValueError: If the numbers belong to another strategy.
        """
        if self.record is None:
            super().load_state(state)
            return
        self.record = ThresholdRecord.from_state(state)
        if self.is_calibrated_in_training and self.record.thresholds:
            self.threshold = self.record.thresholds[-1]

    def needs_calibration(self, progress: float) -> bool:
        """Return whether this tenth of training, or this ratio, lacks a settled threshold."""
        if not self.is_calibrated_in_training:
            return False
        assert self.record is not None
        return not self.record.is_settled(self.mean_ratio(), progress)

    @torch.no_grad()
    def calibrate(
        self, inputs: PatchInputs, *, average: Callable[[float], float] | None = None
    ) -> bool:
        """Find the threshold at which a batch reaches its ratio in the mean.

        Images that are not finite do not count, and a batch without others changes nothing. Nor
        does any where training does not look for a threshold.

        Args:
            inputs: The batch, with tokens where `progress` > 0.
            average: Returns the mean of a number over all processes; None stands for one.

        Returns:
            Whether a threshold was found.
        """
        if not self.is_calibrated_in_training:
            return False
        assert self.record is not None
        target = self.mean_ratio()
        scores_BN = self.score_for_threshold(inputs, draw_noise(inputs, None))
        scores_BN = scores_BN[~scores_BN.isnan().any(dim=1)]
        average = average or (lambda share: share)
        if average(float(len(scores_BN) > 0)) == 0:
            _logger.warning("no image of this batch is finite; the threshold stays as it is")
            return False

        def mean_ratio(threshold: float) -> float:
            # A process without such images moves the mean of the others nowhere.
            share = target
            if len(scores_BN):
                counts_B = self.masked_counts(scores_BN, threshold)
                share = counts_B.float().mean().item() / inputs.num_patches
            return average(share)

        found = bisect_threshold(mean_ratio, target=target, low=self.lowest_score())
        self.threshold = self.record.add(found, target, float(inputs.progress))
        return True


def bisect_threshold(
    mean_ratio: Callable[[float], float], *, target: float, low: float = -1.0
) -> float:
    """Find the similarity threshold at which the mean mask ratio hits a target.

    Args:
        mean_ratio: Returns the mean mask ratio of a batch at a threshold; the higher the
            threshold, the lower the ratio. It is called equally often whatever it returns, so
            that processes which average in it stay together.
        target: Wanted mean mask ratio.
        low: Where to begin.

    Returns:
        A threshold in [low, 1]. Where none comes within `TOLERANCE`, the nearest, with a warning.
    """
    high = 1.0
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
                f"the state of a threshold must hold lists of one length named {', '.join(names)}, "
                f"got {dict(state)}"
            )
        for name, (low, high) in _RANGES.items():
            for number in columns[name]:
                check_range(number, name=f"{name} of the state", low=low, high=high)
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
