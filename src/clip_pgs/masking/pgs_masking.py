"""Patch generation-to-selection (CLIP-PGS, https://arxiv.org/abs/2503.17080, CVPR 2025).

A few random candidate patches are drawn, edges protect the objects, and the similarity of every
patch to the candidates, balanced by optimal transport, decides what is masked. This follows the
paper's text; the authors' released code computes something else.
"""

from __future__ import annotations

import torch
from torch import Tensor

from clip_pgs.masking.edges import sobel_edges
from clip_pgs.masking.pgs_scores import patch_redundancy
from clip_pgs.masking.registry import register_masking
from clip_pgs.masking.sampling import (
    check_mask_ratio,
    draw_noise,
    gumbel,
    mask_count,
    mask_top,
    mask_top_counts,
)
from clip_pgs.masking.sinkhorn import check_sinkhorn_options
from clip_pgs.masking.types import MaskingStrategy, PatchInputs, PatchSelection

# (progress, threshold); docs/threshold.md says how they were found.
CALIBRATED_THRESHOLDS = ((0.0, 0.42), (0.5, 0.52), (1.0, 0.73))


def calibrated_threshold(progress: float) -> float:
    """Return the adaptive threshold at a training progress in [0, 1].

    Straight lines join the points of `CALIBRATED_THRESHOLDS`.
    """
    (start, low), *rest = CALIBRATED_THRESHOLDS
    for end, high in rest:
        if progress <= end:
            return low + (high - low) * (progress - start) / (end - start)
        start, low = end, high
    return low


@register_masking("pgs")
class PGSMasking(MaskingStrategy):
    """Mask patches that resemble random candidates; keep edges and what is unique.

    Args:
        mask_ratio: Share of patches dropped, in [0, 1); the upper bound where the count adapts.
        mask_ratio_min: Lower bound of an adaptive count, in [0, mask_ratio]. None, or the same
            value as `mask_ratio`, drops the same count in every image.
        candidate_ratio: Share of patches drawn as candidates, in (0, 1]; at least one patch.
        edge_protection: How strongly edges keep a patch from becoming a candidate, >= 0.
        edge_weight: What an edge strength of 1 takes off a patch's score, >= 0.
        threshold: Score above which an adaptive count masks a patch. None follows
            `calibrated_threshold`, which fits the other defaults.
        temperature: Entropy weight of the transport plan, > 0.
        num_iters: Sinkhorn sweeps, >= 1.
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
        edge_protection: float = 4.0,
        edge_weight: float = 0.5,
        threshold: float | None = None,
        temperature: float = 0.1,
        num_iters: int = 12,
        solver: str = "log",
        edges: bool = True,
        transport: bool = True,
    ) -> None:
        super().__init__()
        check_mask_ratio(mask_ratio)
        if mask_ratio_min is not None:
            check_mask_ratio(mask_ratio_min, name="mask_ratio_min")
            if mask_ratio_min > mask_ratio:
                raise ValueError(
                    f"mask_ratio_min must not exceed mask_ratio = {mask_ratio}, "
                    f"got {mask_ratio_min}"
                )
        if not 0.0 < candidate_ratio <= 1.0:
            raise ValueError(f"candidate_ratio must be in (0, 1], got {candidate_ratio}")
        if edge_protection < 0:
            raise ValueError(f"edge_protection must be >= 0, got {edge_protection}")
        if edge_weight < 0:
            raise ValueError(f"edge_weight must be >= 0, got {edge_weight}")
        check_sinkhorn_options(temperature=temperature, num_iters=num_iters, solver=solver)
        self.mask_ratio = mask_ratio
        self.mask_ratio_min = mask_ratio if mask_ratio_min is None else mask_ratio_min
        self.candidate_ratio = candidate_ratio
        self.edge_protection = edge_protection
        self.edge_weight = edge_weight
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
        noise_BN = draw_noise(inputs, generator)
        edges_BN = sobel_edges(inputs.pixels, inputs.patch_size) if self.edges else None
        candidate_index = self._draw_candidates(noise_BN, edges_BN)
        scores_BN = patch_redundancy(
            inputs,
            candidate_index,
            temperature=self.temperature,
            num_iters=self.num_iters,
            solver=self.solver,
            transport=self.transport,
        )
        if edges_BN is not None:
            scores_BN = scores_BN - self.edge_weight * edges_BN
        return self._select(scores_BN, candidate_index, inputs.progress)

    def _draw_candidates(self, noise_BN: Tensor, edges_BN: Tensor | None) -> Tensor:
        # Gumbel top-k draws without replacement, with odds exp(-edge_protection * edge).
        keys_BN = gumbel(noise_BN)
        if edges_BN is not None:
            keys_BN = keys_BN - self.edge_protection * edges_BN
        num_candidates = max(1, round(self.candidate_ratio * noise_BN.shape[1]))
        return keys_BN.topk(num_candidates, dim=1).indices

    def _select(
        self, scores_BN: Tensor, candidate_index: Tensor, progress: float
    ) -> PatchSelection:
        # Scores lie in [-1 - edge_weight, 1]: this lift sets every candidate above all others.
        lift_BN = torch.zeros_like(scores_BN).scatter(1, candidate_index, 3.0 + self.edge_weight)
        num_patches = scores_BN.shape[1]
        num_mask_max = mask_count(num_patches, self.mask_ratio)
        num_mask_min = mask_count(num_patches, self.mask_ratio_min)
        if num_mask_min == num_mask_max:
            return mask_top(scores_BN + lift_BN, num_mask=num_mask_max)
        threshold = calibrated_threshold(progress) if self.threshold is None else self.threshold
        above_BN = (scores_BN > threshold) | (lift_BN > 0)
        num_mask_B = above_BN.sum(dim=1).clamp(num_mask_min, num_mask_max)
        return mask_top_counts(scores_BN + lift_BN, num_mask=num_mask_B, num_mask_min=num_mask_min)
