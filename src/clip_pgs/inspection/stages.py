"""The steps by which PGS (https://arxiv.org/abs/2503.17080) arrives at a selection."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import Tensor

from clip_pgs.masking import PatchInputs, pgs_scores, sinkhorn_plan
from clip_pgs.masking.grid import grid_coordinates
from clip_pgs.masking.patches import kept_patches
from clip_pgs.masking.pgs_masking import PGSMasking
from clip_pgs.masking.pgs_scores import EDGE_DETECTORS
from clip_pgs.masking.similarity import mixed_similarity


@dataclass(frozen=True)
class Stages:
    """What PGS finds on its way.

    Attributes:
        edges: Edge strength in [0, 1], shape (B, N). None where edges are left out.
        candidates: Positions of the candidates, ascending, shape (B, C), int64.
        owner: Which candidate takes most of a patch, in [0, C), shape (B, N), int64.
        share: How much of the patch that candidate takes, in [0, 1], shape (B, N). Without
            transport, the similarity between the two where it is positive.
        scores: What the selection sorts by, candidates not lifted, shape (B, N).
    """

    edges: Tensor | None
    candidates: Tensor
    owner: Tensor
    share: Tensor
    scores: Tensor


@torch.no_grad()
def pgs_stages(strategy: PGSMasking, inputs: PatchInputs) -> Stages:
    """Follow PGS through its steps.

    Args:
        strategy: Its options decide each step.
        inputs: What it looks at; `noise` is given.

    Raises:
        ValueError: If `inputs` lack the noise.
    """
    if inputs.noise is None:
        raise ValueError("the stages of one selection need its noise, got none")
    edges_BN = None
    if strategy.edges:
        edges_BN = EDGE_DETECTORS[strategy.edge_detector](inputs.pixels, inputs.patch_size)
    candidate_index = _candidates(strategy, inputs)
    owner_BN, share_BN = _owners(strategy, inputs, candidate_index)
    scores_BN = pgs_scores(
        inputs,
        candidate_index,
        edge_weight=strategy.edge_weight,
        center_weight=strategy.center_weight,
        temperature=strategy.temperature,
        num_iters=strategy.num_iters,
        solver=strategy.solver,
        edges=strategy.edges,
        edge_detector=strategy.edge_detector,
        transport=strategy.transport,
        neighbourhood=strategy.neighbourhood,
    )
    return Stages(edges_BN, candidate_index, owner_BN, share_BN, scores_BN)


def _candidates(strategy: PGSMasking, inputs: PatchInputs) -> Tensor:
    """Return the candidates a selection starts from, shape (B, C)."""
    num_patches = inputs.num_patches
    num_candidates = max(1, round(strategy.candidate_ratio * num_patches))
    # Candidates are masked before all others: who masks as many patches masks just them.
    alone = copy.deepcopy(strategy)
    alone.mask_ratio = alone.mask_ratio_min = num_candidates / num_patches
    keep_mask_BN = kept_patches(alone(inputs), num_patches)
    return (~keep_mask_BN).nonzero()[:, 1].reshape(inputs.batch_size, num_candidates)


def _owners(
    strategy: PGSMasking, inputs: PatchInputs, candidate_index: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the candidate that takes most of each patch, and how much, two of shape (B, N)."""
    similarity_BCN = mixed_similarity(inputs, candidate_index, name="pgs")
    if strategy.neighbourhood is not None:
        row_N, column_N = grid_coordinates(inputs.grid_size, inputs.device)
        distance_BCN = torch.maximum(
            (row_N[candidate_index][:, :, None] - row_N).abs(),
            (column_N[candidate_index][:, :, None] - column_N).abs(),
        )
        is_far_BCN = distance_BCN > strategy.neighbourhood
        similarity_BCN = similarity_BCN.masked_fill(is_far_BCN, -torch.inf)
    if not strategy.transport:
        nearest = similarity_BCN.max(dim=1)
        return nearest.indices, nearest.values.clamp(0, 1)
    plan_BCN = sinkhorn_plan(
        similarity_BCN,
        temperature=strategy.temperature,
        num_iters=strategy.num_iters,
        solver=strategy.solver,
    )
    most = (inputs.num_patches * plan_BCN).max(dim=1)
    return most.indices, most.values.clamp(0, 1)
