"""How redundant every patch is: the deterministic part of CLIP-PGS.

Source: https://arxiv.org/abs/2503.17080 (similarity, optimal-transport normalisation, edges).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from clip_pgs.masking.canny import canny_edges
from clip_pgs.masking.edges import sobel_edges
from clip_pgs.masking.grid import grid_coordinates, log_center_weight
from clip_pgs.masking.ratios import check_range
from clip_pgs.masking.similarity import mixed_similarity
from clip_pgs.masking.sinkhorn import plan_average, sinkhorn_plan
from clip_pgs.masking.types import PatchInputs

# Far beyond what has an effect, and float32 still tells a candidate's score from another's.
MAX_WEIGHT = 1e6

EDGE_DETECTORS = {"sobel": sobel_edges, "canny": canny_edges}


def pgs_scores(
    inputs: PatchInputs,
    candidate_index: Tensor,
    *,
    edge_weight: float = 0.5,
    center_weight: float = 0.0,
    temperature: float = 0.1,
    num_iters: int = 12,
    solver: str = "log",
    edges: bool = True,
    edge_detector: str = "sobel",
    edge_strength: Tensor | None = None,
    transport: bool = True,
    neighbourhood: int | None = None,
) -> Tensor:
    """Score every patch for given candidates; the highest are to be masked.

    Args:
        inputs: Pixels and, where `progress` > 0, tokens.
        candidate_index: Positions of the candidates, no two alike in a row. Shape (B, C), int64.
        edge_weight: What an edge strength of 1 takes off a score.
        center_weight: What the middle of the image takes off a score; less towards the borders,
            as the Gaussian of `gaussian` falls off.
        temperature: Entropy weight of the transport plan, in the units of the similarity.
        num_iters: Sinkhorn sweeps.
        solver: "log" or "pot"; see `sinkhorn_plan`.
        edges: False leaves the edge term out (the paper's ablation).
        edge_detector: "sobel" or "canny".
        edge_strength: What the detector finds, from a caller who has it, shape (B, N); None has
            it computed.
        transport: False takes each patch's highest similarity instead of its balanced one.
        neighbourhood: How many patches away a candidate reaches; see `patch_redundancy`. A patch
            that no candidate reaches scores below all others.

    Returns:
        Scores of shape (B, N), float32; candidates are not lifted.

    Raises:
        ValueError: If `progress` > 0 without tokens, or an option is out of its range.
    """
    check_pgs_options(
        edge_weight=edge_weight,
        center_weight=center_weight,
        edge_detector=edge_detector,
        transport=transport,
        solver=solver,
        neighbourhood=neighbourhood,
    )
    scores_BN = patch_redundancy(
        inputs,
        candidate_index,
        temperature=temperature,
        num_iters=num_iters,
        solver=solver,
        transport=transport,
        neighbourhood=neighbourhood,
        # Below the score of any patch that a candidate reaches.
        unreached=-2.0 - edge_weight - center_weight,
    )
    if edges:
        if edge_strength is None:
            edge_strength = EDGE_DETECTORS[edge_detector](inputs.pixels, inputs.patch_size)
        scores_BN = scores_BN - edge_weight * edge_strength
    if center_weight:
        scores_BN = scores_BN - center_weight * center_strength(inputs)
    return scores_BN


def center_strength(inputs: PatchInputs) -> Tensor:
    """Return how near each patch is to the middle of the image, in (0, 1], shape (N,)."""
    return log_center_weight(inputs.grid_size, inputs.device).exp()


def check_pgs_options(
    *,
    edge_weight: float,
    center_weight: float,
    edge_detector: str,
    transport: bool,
    solver: str,
    neighbourhood: int | None,
) -> None:
    """Refuse options that `pgs_scores` cannot work with.

    Raises:
        ValueError: If one is out of its range, or two do not go together.
    """
    check_range(edge_weight, name="edge_weight", low=0, high=MAX_WEIGHT)
    check_range(center_weight, name="center_weight", low=0, high=MAX_WEIGHT)
    if edge_detector not in EDGE_DETECTORS:
        choices = ", ".join(EDGE_DETECTORS)
        raise ValueError(f"edge_detector must be one of {choices}, got {edge_detector!r}")
    if neighbourhood is None:
        return
    if not isinstance(neighbourhood, int):
        raise ValueError(f"neighbourhood must be a whole number, got {neighbourhood}")
    check_range(neighbourhood, name="neighbourhood", low=0, high=MAX_WEIGHT)
    if transport and solver != "log":
        raise ValueError(f"neighbourhood goes with solver='log', got solver={solver!r}")


def patch_redundancy(
    inputs: PatchInputs,
    candidate_index: Tensor,
    *,
    temperature: float = 0.1,
    num_iters: int = 12,
    solver: str = "log",
    transport: bool = True,
    neighbourhood: int | None = None,
    unreached: float = -1.0,
) -> Tensor:
    """Measure how well the candidates stand for every patch: `pgs_scores` without edges.

    With transport, each candidate may absorb only its fair share of the image: column j of
    `N * plan` sums to 1 and weighs the similarities of patch j. With a neighbourhood, the plan
    moves nothing between a candidate and a patch beyond its reach, and a patch that no candidate
    reaches takes no part.

    Args:
        inputs: Pixels and, where `progress` > 0, tokens.
        candidate_index: Positions of the candidates. Shape (B, C), int64.
        temperature: See `pgs_scores`.
        num_iters: See `pgs_scores`.
        solver: See `pgs_scores`.
        transport: See `pgs_scores`.
        neighbourhood: A candidate reaches the patches at most this many rows and this many
            columns away. None reaches all.
        unreached: Redundancy of a patch that no candidate reaches.

    Returns:
        Redundancy in [-1, 1] up to rounding where a candidate reaches, shape (B, N), float32.
    """
    affinity_BCN = candidate_affinity(inputs, candidate_index, neighbourhood=neighbourhood)
    sinkhorn: dict[str, Any] = {
        "temperature": temperature,
        "num_iters": num_iters,
        "solver": solver,
    }
    if neighbourhood is None:
        if transport:
            return plan_average(affinity_BCN, **sinkhorn)
        return affinity_BCN.amax(dim=1)
    is_near_BCN = affinity_BCN > -torch.inf
    if transport:
        plan_BCN = sinkhorn_plan(affinity_BCN, **sinkhorn)
        # Where the plan is 0, -inf must not meet it.
        similarity_BCN = affinity_BCN.masked_fill(~is_near_BCN, 0.0)
        redundancy_BN = inputs.num_patches * (plan_BCN * similarity_BCN).sum(dim=1)
    else:
        redundancy_BN = affinity_BCN.amax(dim=1)
    return torch.where(is_near_BCN.any(dim=1), redundancy_BN, unreached)


def candidate_affinity(
    inputs: PatchInputs, candidate_index: Tensor, *, neighbourhood: int | None = None
) -> Tensor:
    """Compare candidates with the patches in their reach.

    Args:
        inputs: Pixels and, where `progress` > 0, tokens.
        candidate_index: Positions of the candidates. Shape (B, C), int64.
        neighbourhood: See `patch_redundancy`.

    Returns:
        Similarity, and -inf beyond the reach, shape (B, C, N), float32.
    """
    similarity_BCN = mixed_similarity(inputs, candidate_index, name="pgs")
    if neighbourhood is None:
        return similarity_BCN
    is_near_BCN = _is_near(inputs.grid_size, candidate_index, neighbourhood)
    return similarity_BCN.masked_fill(~is_near_BCN, -torch.inf)


def _is_near(grid_size: tuple[int, int], candidate_index: Tensor, reach: int) -> Tensor:
    """Return whether a patch lies in the window around a candidate, shape (B, C, N), bool."""
    row_N, column_N = grid_coordinates(grid_size, candidate_index.device)
    row_distance = (row_N[candidate_index][:, :, None] - row_N).abs()
    column_distance = (column_N[candidate_index][:, :, None] - column_N).abs()
    return torch.maximum(row_distance, column_distance) <= reach
