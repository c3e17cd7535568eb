"""The steps by which PGS (https://arxiv.org/abs/2503.17080) arrives at a selection."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from clip_pgs.masking import PatchInputs, sinkhorn_plan
from clip_pgs.masking.pgs import PGSMasking, reached_similarity


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
    edges_BN, candidate_index, scores_BN = strategy.steps(inputs, inputs.noise)
    candidate_index = candidate_index.sort(dim=1).values
    owner_BN, share_BN = _owners(strategy, inputs, candidate_index)
    return Stages(edges_BN, candidate_index, owner_BN, share_BN, scores_BN)


def _owners(
    strategy: PGSMasking, inputs: PatchInputs, candidate_index: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the candidate that takes most of each patch, and how much, two of shape (B, N)."""
    options = strategy.options
    share_BCN = reached_similarity(inputs, candidate_index, options.neighborhood)
    if options.transport:
        share_BCN = inputs.num_patches * sinkhorn_plan(share_BCN, **options.sinkhorn())
    most = share_BCN.max(dim=1)
    return most.indices, most.values.clamp(0, 1)
