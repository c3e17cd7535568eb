"""Cosine similarity between candidate patches and all patches."""

from __future__ import annotations

import torch
from torch import Tensor

from clip_pgs.masking.patches import patchify
from clip_pgs.masking.types import PatchInputs

# Below this share of its own norm, a centred vector is rounding noise and not a direction.
_NOISE_RATIO = 1e-5
_TINY_NORM = 1e-12


def mixed_similarity(inputs: PatchInputs, candidate_index: Tensor, *, name: str) -> Tensor:
    """Compare candidates with every patch, by pixels at first and by embeddings at the end.

    The similarity of patch embeddings takes the share `progress`; at 0 it is not computed.

    Args:
        inputs: Pixels and, where `progress` > 0, tokens.
        candidate_index: Positions of the candidates. Shape (B, C), int64.
        name: The strategy that asks, for the error.

    Returns:
        Similarity in [-1, 1] up to rounding, shape (B, C, N), float32.

    Raises:
        ValueError: If `progress` > 0 without tokens.
    """
    assert isinstance(inputs.patch_size, tuple)
    patches_BNF = patchify(inputs.pixels, inputs.patch_size)
    pixel_similarity = candidate_similarity(patches_BNF, candidate_index)
    progress = inputs.progress
    if progress == 0:
        return pixel_similarity
    if inputs.tokens is None:
        raise ValueError(f"{name} needs tokens once progress > 0, got none at progress {progress}")
    token_similarity = candidate_similarity(inputs.tokens, candidate_index)
    return (1 - progress) * pixel_similarity + progress * token_similarity


def candidate_similarity(features: Tensor, candidate_index: Tensor) -> Tensor:
    """Compare candidates with every patch by centred cosine similarity.

    Each patch's features lose their own mean first. A patch that is then no more than rounding
    noise (a flat one) resembles nothing but itself.

    Args:
        features: Features of every patch. Shape (B, N, F), any float dtype.
        candidate_index: Positions of the candidates. Shape (B, C), int64.

    Returns:
        Similarity in [-1, 1] up to rounding, shape (B, C, N), float32; 1 between a candidate and
        itself.
    """
    unit_BNF = _centred_directions(features.detach().float())
    index_BCF = candidate_index[:, :, None].expand(-1, -1, unit_BNF.shape[2])
    with torch.autocast(device_type=features.device.type, enabled=False):
        similarity_BCN = torch.bmm(unit_BNF.gather(1, index_BCF), unit_BNF.transpose(1, 2))
    return similarity_BCN.scatter(2, candidate_index[:, :, None], 1.0)


def _centred_directions(features: Tensor) -> Tensor:
    norm = features.norm(dim=-1, keepdim=True)
    centred = features - features.mean(dim=-1, keepdim=True)
    centred_norm = centred.norm(dim=-1, keepdim=True)
    is_flat = centred_norm <= _NOISE_RATIO * norm + _TINY_NORM
    return torch.where(is_flat, 0.0, centred / torch.where(is_flat, 1.0, centred_norm))
