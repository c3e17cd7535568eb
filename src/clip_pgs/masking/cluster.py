"""Cluster masking (E-CLIP, https://arxiv.org/abs/2405.08815).

Everything that looks like one of a few random anchor patches is dropped. The anchors go, too; in
the authors' released code an anchor always exceeds the threshold by its similarity to itself.

Deliberate differences from that code: where fewer patches than the lower bound resemble an anchor,
those most alike come next (there: arbitrary ones). Slots beyond an image's own count hold no patch
at all (there: masked patches come back, behind an attention mask). The threshold is searched in
training (there: a search is written and never called). Every draw of anchors stands by itself
(there: the noise's cutoff accumulates).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field

import torch
from torch import Tensor

from clip_pgs.masking.sampling import draw_noise, mask_top_counts, share_at_random
from clip_pgs.masking.schedule import scheduled_ratio
from clip_pgs.masking.similarity import mixed_similarity
from clip_pgs.masking.strategy import (
    MaskingStrategy,
    PatchInputs,
    PatchSelection,
    check_range,
    check_share,
    drawn_count,
    interpolate,
    lower_bound,
    mask_count,
    register_masking,
)

_logger = logging.getLogger(__name__)

# (mean mask ratio, threshold), by bisection over 300 images of Flickr8k and 300 of ImageNet at 224
# pixels, patches of 16, pixels alone, lower bound 0.3; the two sets lie within 0.02 of the mean.
DEFAULT_THRESHOLDS = (
    (0.3, 1.0),
    (0.35, 0.835),
    (0.4, 0.70),
    (0.5, 0.53),
    (0.6, 0.43),
    (0.75, 0.315),
    (0.9, 0.18),
)

NUM_BATCHES = 8  # whose thresholds are averaged at one point of training
NUM_POINTS = 10  # points of training with a threshold of their own
TOLERANCE = 0.01  # of the mask ratio
_NUM_HALVINGS = 24


def default_threshold(mask_ratio: float) -> float:
    """Return the similarity threshold that gives photographs about this mean mask ratio.

    Straight lines join the points of `DEFAULT_THRESHOLDS`; beyond them the nearest holds.
    """
    return interpolate(DEFAULT_THRESHOLDS, mask_ratio)


@register_masking(
    "cluster",
    keeps="unlike all random anchors; the ratio is a mean, met by a threshold found in training",
    paper="E-CLIP, arXiv 2405.08815",
    adaptive=True,
    requires={"tokens"},
    variants=[{"random_share": 0.5}, {"random_share": 1.0, "random_share_end": 0.2}],
)
class ClusterMasking(MaskingStrategy):
    """Mask random anchors and every patch that resembles one of them.

    The count differs between images: at least `mask_ratio_min`, all but one patch at most.

    The threshold is found on the first batches by bisection (`calibrate`), so that the mean ratio
    hits `mask_ratio`. As embeddings join the similarity over training, the same threshold would
    mask ever more, so that it is found anew at each tenth of training, and after
    `set_mask_ratio`: the mean over `NUM_BATCHES` batches each time.

    Args:
        mask_ratio: Mean share of patches dropped, in [0, 1).
        mask_ratio_min: Share of patches dropped in every image at least, in [0, mask_ratio].
        anchor_ratio: Share of patches drawn as anchors, in (0, 1]; at least one patch.
        threshold: Similarity above which a patch is masked. None starts from `default_threshold`
            and asks for calibration; a number stays as it is.
        random_share: Share of the kept patches that is drawn uniformly from all but those most
            unlike the anchors, in [0, 1] (ours; see `share_at_random`).
        random_share_end: The random share at the end of training, in [0, 1], reached in five
            equal levels. None keeps it constant.

    Raises:
        ValueError: If an option is out of its range.
    """

    def __init__(
        self,
        *,
        mask_ratio: float = 0.5,
        mask_ratio_min: float = 0.3,
        anchor_ratio: float = 0.03,
        threshold: float | None = None,
        random_share: float = 0.0,
        random_share_end: float | None = None,
    ) -> None:
        super().__init__()
        self.mask_ratio = mask_ratio
        self.mask_ratio_min = lower_bound(mask_ratio, mask_ratio_min)
        check_share(anchor_ratio, name="anchor_ratio")
        check_range(threshold, name="threshold", low=-1e6, high=1e6)
        check_range(random_share, name="random_share", low=0, high=1)
        check_range(random_share_end, name="random_share_end", low=0, high=1)
        self.anchor_ratio = anchor_ratio
        self.random_share = random_share
        self.random_share_end = random_share_end
        self.is_calibrated_in_training = threshold is None
        self.threshold = default_threshold(mask_ratio) if threshold is None else threshold
        self.record = ThresholdRecord()

    def set_mask_ratio(self, mask_ratio: float) -> None:
        """Change the mean mask ratio and with it the lower bound; see `MaskingStrategy`."""
        super().set_mask_ratio(mask_ratio)
        if self.is_calibrated_in_training and self.record.latest_ratio() != mask_ratio:
            self.threshold = default_threshold(mask_ratio)

    def state(self) -> dict[str, float | list[float]]:
        """Return the thresholds found so far, with the ratio and the progress of each."""
        return self.record.state()

    def load_state(self, state: Mapping[str, float | list[float]]) -> None:
        """Restore what `state` returned, and the threshold found last.

        Raises:
            ValueError: If the numbers belong to another strategy.
        """
        self.record = ThresholdRecord.from_state(state)
        if self.is_calibrated_in_training and self.record.thresholds:
            self.threshold = self.record.thresholds[-1]

    def needs_calibration(self, progress: float) -> bool:
        """Return whether this tenth of training, or this ratio, lacks a settled threshold."""
        return self.is_calibrated_in_training and not self.record.is_settled(
            self.mask_ratio, progress
        )

    @torch.no_grad()
    def calibrate(
        self, inputs: PatchInputs, *, average: Callable[[float], float] | None = None
    ) -> None:
        """Find the threshold at which a batch reaches `mask_ratio` in the mean.

        Images that are not finite do not count, and a batch without others changes nothing.

        Args:
            inputs: The batch, with tokens where `progress` > 0.
            average: Returns the mean of a number over all processes; None stands for one.
        """
        scores_BN = self._score(inputs, draw_noise(inputs, None))
        scores_BN = scores_BN[~scores_BN.isnan().any(dim=1)]
        average = average or (lambda share: share)
        if average(float(len(scores_BN) > 0)) == 0:
            _logger.warning("no image of this batch is finite; the threshold stays as it is")
            return

        def mean_ratio(threshold: float) -> float:
            # A process without such images moves the mean of the others nowhere.
            share = self.mask_ratio
            if len(scores_BN):
                share = self._count(scores_BN, threshold).float().mean().item() / inputs.num_patches
            return average(share)

        found = bisect_threshold(mean_ratio, target=self.mask_ratio)
        self.threshold = self.record.add(found, self.mask_ratio, float(inputs.progress))

    def forward(
        self, inputs: PatchInputs, *, generator: torch.Generator | None = None
    ) -> PatchSelection:
        """Draw anchors and mask what resembles them, in each image its own number of patches."""
        noise_BN = draw_noise(inputs, generator)
        scores_BN = self._score(inputs, noise_BN)
        num_mask_B = self._count(scores_BN, self.threshold)
        share = scheduled_ratio(self.random_share, self.random_share_end, progress=inputs.progress)
        return mask_top_counts(
            share_at_random(scores_BN, noise_BN, num_mask=num_mask_B, random_share=share),
            num_mask=num_mask_B,
            num_mask_min=mask_count(inputs.num_patches, self.mask_ratio_min),
        )

    def _score(self, inputs: PatchInputs, noise_BN: Tensor) -> Tensor:
        num_anchors = drawn_count(inputs.num_patches, self.anchor_ratio)
        anchor_index = noise_BN.topk(num_anchors, dim=1).indices
        scores_BN = mixed_similarity(inputs, anchor_index, name="cluster").amax(dim=1)
        # Above any threshold, and above every other patch.
        return scores_BN.scatter(1, anchor_index, torch.inf)

    def _count(self, scores_BN: Tensor, threshold: float) -> Tensor:
        num_patches = scores_BN.shape[1]
        num_mask_min = mask_count(num_patches, self.mask_ratio_min)
        return (scores_BN > threshold).sum(dim=1).clamp(num_mask_min, num_patches - 1)


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
