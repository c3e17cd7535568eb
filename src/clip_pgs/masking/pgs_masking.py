"""Patch generation-to-selection (CLIP-PGS, https://arxiv.org/abs/2503.17080, CVPR 2025).

A few random candidate patches are drawn, edges protect the objects, and the similarity of every
patch to the candidates, balanced by optimal transport, decides what is masked. This follows the
paper's text; the authors' released code computes something else.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from clip_pgs.masking.grid import is_on_border
from clip_pgs.masking.pgs_scores import (
    EDGE_DETECTORS,
    MAX_WEIGHT,
    center_strength,
    check_pgs_options,
    pgs_scores,
)
from clip_pgs.masking.ratios import (
    check_range,
    check_share,
    check_threshold,
    drawn_count,
    lower_bound,
    mask_count,
)
from clip_pgs.masking.registry import register_masking
from clip_pgs.masking.sampling import draw_noise, gumbel, mask_top, mask_top_counts
from clip_pgs.masking.sinkhorn import check_sinkhorn_options
from clip_pgs.masking.thresholds import interpolate
from clip_pgs.masking.types import MaskingStrategy, PatchInputs, PatchSelection

CANDIDATE_REGIONS = ("image", "border")

# (progress, threshold); docs/threshold.md says how they were found.
CALIBRATED_THRESHOLDS = ((0.0, 0.42), (0.5, 0.52), (1.0, 0.73))

# (center_weight, what it takes off the threshold): the mean over 200 images each of Flickr8k and
# ImageNet and 50 of COCO, at progress 0 and 1, that brings their mean mask ratio back to 0.40.
CENTER_SHIFTS = ((0.0, 0.0), (0.5, 0.11), (1.0, 0.205), (2.0, 0.345))

# Edges protect candidates by 4 where they take 0.5 off a score; the middle does likewise.
_CENTER_PROTECTION = 8.0
# More than the largest Gumbel number of a float32 draw lies above the smallest.
_GUMBEL_SPAN = 32.0


def calibrated_threshold(progress: float, *, center_weight: float = 0.0) -> float:
    """Return the adaptive threshold at a training progress in [0, 1].

    Straight lines join the points of `CALIBRATED_THRESHOLDS`, and those of `CENTER_SHIFTS`.
    """
    shift = interpolate(CENTER_SHIFTS, center_weight)
    return interpolate(CALIBRATED_THRESHOLDS, progress) - shift


class PGSSteps(NamedTuple):
    """What PGS finds on its way to a selection.

    Attributes:
        edges: Edge strength in [0, 1], shape (B, N). None where edges are left out.
        candidate_index: Positions of the candidates, in no order, shape (B, C), int64.
        scores: How redundant each patch is; candidates are not lifted. Shape (B, N).
    """

    edges: Tensor | None
    candidate_index: Tensor
    scores: Tensor


@register_masking("pgs")
class PGSMasking(MaskingStrategy):
    """Mask patches that resemble random candidates; keep edges and what is unique.

    Args:
        mask_ratio: Share of patches dropped, in [0, 1); the upper bound where the count adapts.
        mask_ratio_min: Lower bound of an adaptive count, in [0, mask_ratio]. None, or the same
            value as `mask_ratio`, drops the same count in every image.
        candidate_ratio: Share of patches drawn as candidates, in (0, 1]; at least one patch.
        candidate_region: Where candidates come from: "image", or "border" for the outermost rows
            and columns of patches, where objects seldom are; only if those are fewer than the
            candidates, others follow.
        edge_protection: How strongly edges keep a patch from becoming a candidate, in [0, 1e6].
        edge_weight: What an edge strength of 1 takes off a patch's score, in [0, 1e6].
        edge_detector: "sobel", or "canny" for the share of Canny's edge pixels (the paper's
            ablation).
        center_weight: What the middle of the image takes off a patch's score, in [0, 1e6]:
            there objects tend to be. It falls off as the Gaussian of `gaussian` does, and keeps
            patches from becoming candidates in the same proportion as edges do. 0 leaves it out.
        neighbourhood: How many rows and columns of patches away a candidate reaches, in [0, 1e6].
            None reaches the whole image (the paper's ablation is a window).
        threshold: Score above which an adaptive count masks a patch. None follows
            `calibrated_threshold`, which fits the other defaults, both regions of candidates and
            any `center_weight` up to 2; a small `neighbourhood` lowers the scores and wants a
            lower one.
        temperature: Entropy weight of the transport plan, in [1e-6, 1e6].
        num_iters: Sinkhorn sweeps, in [1, 10000].
        solver: "log" or "pot"; see `sinkhorn_plan`.
        edges: False draws candidates uniformly and drops the edge term (the paper's ablation).
        transport: False takes the highest similarity to any candidate (the paper's ablation).

    Raises:
        ValueError: If an option is out of its range.
    """

    requires = frozenset({"tokens"})

    def __init__(
        self,
        *,
        mask_ratio: float = 0.5,
        mask_ratio_min: float | None = None,
        candidate_ratio: float = 0.05,
        candidate_region: str = "image",
        edge_protection: float = 4.0,
        edge_weight: float = 0.5,
        edge_detector: str = "sobel",
        center_weight: float = 0.0,
        neighbourhood: int | None = None,
        threshold: float | None = None,
        temperature: float = 0.1,
        num_iters: int = 12,
        solver: str = "log",
        edges: bool = True,
        transport: bool = True,
    ) -> None:
        super().__init__()
        self.mask_ratio = mask_ratio
        self.mask_ratio_min = lower_bound(mask_ratio, mask_ratio_min)
        check_share(candidate_ratio, name="candidate_ratio")
        if candidate_region not in CANDIDATE_REGIONS:
            choices = ", ".join(CANDIDATE_REGIONS)
            raise ValueError(f"candidate_region must be one of {choices}, got {candidate_region!r}")
        check_range(edge_protection, name="edge_protection", low=0, high=MAX_WEIGHT)
        check_threshold(threshold)
        check_pgs_options(
            edge_weight=edge_weight,
            center_weight=center_weight,
            edge_detector=edge_detector,
            transport=transport,
            solver=solver,
            neighbourhood=neighbourhood,
        )
        check_sinkhorn_options(temperature=temperature, num_iters=num_iters, solver=solver)
        self.candidate_ratio = candidate_ratio
        self.candidate_region = candidate_region
        self.edge_protection = edge_protection
        self.edge_weight = edge_weight
        self.edge_detector = edge_detector
        self.center_weight = center_weight
        self.neighbourhood = neighbourhood
        self.threshold = threshold
        self.temperature = temperature
        self.num_iters = num_iters
        self.solver = solver
        self.edges = edges
        self.transport = transport

    def extra_repr(self) -> str:
        """Show the ratios in the module's printed form."""
        return f"mask_ratio={self.mask_ratio}, mask_ratio_min={self.mask_ratio_min}"

    def forward(
        self, inputs: PatchInputs, *, generator: torch.Generator | None = None
    ) -> PatchSelection:
        """Draw candidates, score every patch against them and mask the highest scores."""
        _, candidate_index, scores_BN = self.steps(inputs, draw_noise(inputs, generator))
        return self._select(scores_BN, candidate_index, inputs.progress)

    def steps(self, inputs: PatchInputs, noise: Tensor) -> PGSSteps:
        """Draw candidates and score every patch against them; all but the selection.

        Args:
            inputs: What there is to look at.
            noise: Uniform numbers in [0, 1), shape (B, N), float32.
        """
        edges_BN = None
        if self.edges:
            edges_BN = EDGE_DETECTORS[self.edge_detector](inputs.pixels, inputs.patch_size)
        candidate_index = self._draw_candidates(noise, edges_BN, inputs)
        scores_BN = pgs_scores(
            inputs,
            candidate_index,
            edge_weight=self.edge_weight,
            center_weight=self.center_weight,
            temperature=self.temperature,
            num_iters=self.num_iters,
            solver=self.solver,
            edges=self.edges,
            edge_detector=self.edge_detector,
            edge_strength=edges_BN,
            transport=self.transport,
            neighbourhood=self.neighbourhood,
        )
        return PGSSteps(edges_BN, candidate_index, scores_BN)

    def _draw_candidates(
        self, noise_BN: Tensor, edges_BN: Tensor | None, inputs: PatchInputs
    ) -> Tensor:
        # Gumbel top-k draws without replacement, with odds exp(-protection).
        keys_BN = gumbel(noise_BN)
        if edges_BN is not None:
            keys_BN = keys_BN - self.edge_protection * edges_BN
        center_protection = _CENTER_PROTECTION * self.center_weight
        if center_protection:
            keys_BN = keys_BN - center_protection * center_strength(inputs)
        if self.candidate_region == "border":
            below_all = _GUMBEL_SPAN + self.edge_protection + center_protection
            is_inside_N = ~is_on_border(inputs.grid_size, inputs.device)
            keys_BN = keys_BN - below_all * is_inside_N
        num_candidates = drawn_count(inputs.num_patches, self.candidate_ratio)
        return keys_BN.topk(num_candidates, dim=1).indices

    def _select(
        self, scores_BN: Tensor, candidate_index: Tensor, progress: float
    ) -> PatchSelection:
        # A candidate scores at least -1 less both weights, any other patch at most 1.
        lift = 3.0 + self.edge_weight + self.center_weight
        lift_BN = torch.zeros_like(scores_BN).scatter(1, candidate_index, lift)
        num_patches = scores_BN.shape[1]
        num_mask_max = mask_count(num_patches, self.mask_ratio)
        num_mask_min = mask_count(num_patches, self.mask_ratio_min)
        if num_mask_min == num_mask_max:
            return mask_top(scores_BN + lift_BN, num_mask=num_mask_max)
        threshold = self.threshold
        if threshold is None:
            threshold = calibrated_threshold(progress, center_weight=self.center_weight)
        above_BN = (scores_BN > threshold) | (lift_BN > 0)
        num_mask_B = above_BN.sum(dim=1).clamp(num_mask_min, num_mask_max)
        return mask_top_counts(scores_BN + lift_BN, num_mask=num_mask_B, num_mask_min=num_mask_min)
