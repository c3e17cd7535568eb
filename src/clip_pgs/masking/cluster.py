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

import torch
from torch import Generator, Tensor

from clip_pgs.masking.calibration import CalibratedMasking, ThresholdRecord
from clip_pgs.masking.sampling import draw_noise, mask_top_counts, share_at_random
from clip_pgs.masking.schedule import scheduled_ratio
from clip_pgs.masking.similarity import mixed_similarity
from clip_pgs.masking.strategy import (
    MASK_RATIO,
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
class ClusterMasking(CalibratedMasking):
    """Mask random anchors and every patch that resembles one of them.

    The count differs between images: at least `mask_ratio_min`, all but one patch at most; none
    at a `mask_ratio` of 0.

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
            unlike the anchors, in [0, 1] (ours); see `share_at_random`.
        random_share_end: The random share at the end of training, in [0, 1], reached in five
            equal levels. None keeps it constant.

    Raises:
        ValueError: If an option is out of its range.
    """

    def __init__(
        self,
        *,
        mask_ratio: float = MASK_RATIO,
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
        check_range(threshold, name="threshold", low=-1e6, high=1e6, optional=True)
        check_range(random_share, name="random_share", low=0, high=1)
        check_range(random_share_end, name="random_share_end", low=0, high=1, optional=True)
        self.anchor_ratio = anchor_ratio
        self.random_share = random_share
        self.random_share_end = random_share_end
        self.is_calibrated_in_training = threshold is None
        self.threshold: float = default_threshold(mask_ratio) if threshold is None else threshold
        self.record = ThresholdRecord()

    def keeps_different_counts(self) -> bool:
        """Return True: `mask_ratio` is a mean, also where `mask_ratio_min` equals it."""
        return True

    def idle_options(self) -> dict[str, str]:
        """Return `mask_ratio` where a threshold that was given decides."""
        is_idle = not self.is_calibrated_in_training
        return {"mask_ratio": "but on mask_ratio_min beside threshold"} if is_idle else {}

    def mean_ratio(self) -> float:
        """Return `mask_ratio`."""
        return self.mask_ratio

    def first_threshold(self) -> float:
        """Return `default_threshold` of the ratio."""
        return default_threshold(self.mask_ratio)

    def forward(self, inputs: PatchInputs, *, generator: Generator | None = None) -> PatchSelection:
        """Draw anchors and mask what resembles them, in each image its own number of patches."""
        noise_BN = draw_noise(inputs, generator)
        scores_BN = self.score_for_threshold(inputs, noise_BN)
        num_mask_B = self.masked_counts(scores_BN, self.threshold)
        share = scheduled_ratio(self.random_share, self.random_share_end, progress=inputs.progress)
        return mask_top_counts(
            share_at_random(scores_BN, noise_BN, num_mask=num_mask_B, random_share=share),
            num_mask=num_mask_B,
            num_mask_min=mask_count(inputs.num_patches, self.mask_ratio_min),
        )

    def score_for_threshold(self, inputs: PatchInputs, noise: Tensor) -> Tensor:
        """Return each patch's highest similarity to an anchor, infinite for an anchor."""
        num_anchors = drawn_count(inputs.num_patches, self.anchor_ratio)
        anchor_index = noise.topk(num_anchors, dim=1).indices
        scores_BN = mixed_similarity(inputs, anchor_index, name="cluster").amax(dim=1)
        # Above any threshold, and above every other patch.
        return scores_BN.scatter(1, anchor_index, torch.inf)

    def masked_counts(self, scores: Tensor, threshold: float | Tensor) -> Tensor:
        """Return how many patches of each image score above a threshold, at least the bound's."""
        num_patches = scores.shape[1]
        num_mask_min = mask_count(num_patches, self.mask_ratio_min)
        # At a mean of 0, where a schedule may end, anchors stay, too.
        num_mask_max = num_patches - 1 if self.mask_ratio > 0 else 0
        return (scores > threshold).sum(dim=1).clamp(num_mask_min, num_mask_max)
