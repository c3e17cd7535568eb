"""How redundant every patch is: the deterministic part of CLIP-PGS.

Source: https://arxiv.org/abs/2503.17080 (similarity, optimal-transport normalisation, edges).
"""

from __future__ import annotations

from torch import Tensor

from clip_pgs.masking.edges import sobel_edges
from clip_pgs.masking.patches import patchify
from clip_pgs.masking.similarity import candidate_similarity
from clip_pgs.masking.sinkhorn import sinkhorn_plan
from clip_pgs.masking.types import PatchInputs


def pgs_scores(
    inputs: PatchInputs,
    candidate_index: Tensor,
    *,
    edge_weight: float = 0.5,
    temperature: float = 0.1,
    num_iters: int = 12,
    solver: str = "log",
    edges: bool = True,
    transport: bool = True,
) -> Tensor:
    """Score every patch for given candidates; the highest are to be masked.

    Args:
        inputs: Pixels and, where `progress` > 0, tokens.
        candidate_index: Positions of the candidates, no two alike in a row. Shape (B, C), int64.
        edge_weight: What an edge strength of 1 takes off a score.
        temperature: Entropy weight of the transport plan, in the units of the similarity.
        num_iters: Sinkhorn sweeps.
        solver: "log" or "pot"; see `sinkhorn_plan`.
        edges: False leaves the edge term out (the paper's ablation).
        transport: False takes each patch's highest similarity instead of its balanced one.

    Returns:
        Scores of shape (B, N), float32; candidates are not lifted.

    Raises:
        ValueError: If `progress` > 0 without tokens, or an option is out of its range.
    """
    redundancy_BN = patch_redundancy(
        inputs,
        candidate_index,
        temperature=temperature,
        num_iters=num_iters,
        solver=solver,
        transport=transport,
    )
    if not edges:
        return redundancy_BN
    return redundancy_BN - edge_weight * sobel_edges(inputs.pixels, inputs.patch_size)


def patch_redundancy(
    inputs: PatchInputs,
    candidate_index: Tensor,
    *,
    temperature: float = 0.1,
    num_iters: int = 12,
    solver: str = "log",
    transport: bool = True,
) -> Tensor:
    """Measure how well the candidates stand for every patch: `pgs_scores` without edges.

    With transport, each candidate may absorb only its fair share of the image: column j of
    `N * plan` sums to 1 and weighs the similarities of patch j.

    Args:
        inputs: Pixels and, where `progress` > 0, tokens.
        candidate_index: Positions of the candidates. Shape (B, C), int64.
        temperature: See `pgs_scores`.
        num_iters: See `pgs_scores`.
        solver: See `pgs_scores`.
        transport: See `pgs_scores`.

    Returns:
        Redundancy in [-1, 1] up to rounding, shape (B, N), float32.
    """
    similarity_BCN = _similarity(inputs, candidate_index)
    if not transport:
        return similarity_BCN.amax(dim=1)
    plan_BCN = sinkhorn_plan(
        similarity_BCN, temperature=temperature, num_iters=num_iters, solver=solver
    )
    return inputs.num_patches * (plan_BCN * similarity_BCN).sum(dim=1)


def _similarity(inputs: PatchInputs, candidate_index: Tensor) -> Tensor:
    assert isinstance(inputs.patch_size, tuple)
    patches_BNF = patchify(inputs.pixels, inputs.patch_size)
    pixel_similarity = candidate_similarity(patches_BNF, candidate_index)
    progress = inputs.progress
    if progress == 0:
        return pixel_similarity
    if inputs.tokens is None:
        raise ValueError(f"pgs needs tokens once progress > 0, got none at progress {progress}")
    token_similarity = candidate_similarity(inputs.tokens, candidate_index)
    return (1 - progress) * pixel_similarity + progress * token_similarity
