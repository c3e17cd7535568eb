"""Cosine similarity between candidate patches and all patches."""

from __future__ import annotations

import torch
from torch import Tensor

from clip_pgs.masking.sampling import full_precision, in_blocks, patchify
from clip_pgs.masking.strategy import PatchInputs

# Below this share of its own norm, a centered vector is rounding noise and not a direction.
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
    progress = inputs.progress
    if inputs.compares_tokens and inputs.tokens is None:
        raise ValueError(f"{name} needs tokens once progress > 0, got none at progress {progress}")

    def similarity(pixels: Tensor, index_BC: Tensor, tokens: Tensor | None) -> Tensor:
        assert isinstance(inputs.patch_size, tuple)
        by_pixels = candidate_similarity(patchify(pixels, inputs.patch_size), index_BC)
        if tokens is None:
            return by_pixels
        return (1 - progress) * by_pixels + progress * candidate_similarity(tokens, index_BC)

    tokens = inputs.tokens if inputs.compares_tokens else None
    return in_blocks(similarity, inputs.pixels.detach(), candidate_index, tokens)


def candidate_similarity(features: Tensor, candidate_index: Tensor) -> Tensor:
    """Compare candidates with every patch by centered cosine similarity.

    Each patch's features lose their own mean first. A patch that is then no more than rounding
    noise (all its values are equal, across channels too) resembles nothing but itself.

    Args:
        features: Features of every patch. Shape (B, N, F), any float dtype.
        candidate_index: Positions of the candidates. Shape (B, C), int64.

    Returns:
        Similarity in [-1, 1] up to rounding, shape (B, C, N), float32; 1 between a candidate and
        itself.
    """
    features = features.detach().float()
    mean_BN1 = features.mean(dim=-1, keepdim=True)
    centered_BNF = features - mean_BN1
    scale_BN = _inverse_norm(centered_BNF.norm(dim=-1), mean_BN1[..., 0], features.shape[-1])
    index_BCF = candidate_index[:, :, None].expand(-1, -1, features.shape[-1])
    # Scaling the C x N products is less work than scaling the features.
    with full_precision(features):
        product_BCN = torch.bmm(centered_BNF.gather(1, index_BCF), centered_BNF.transpose(1, 2))
    similarity_BCN = product_BCN * scale_BN.gather(1, candidate_index)[:, :, None]
    similarity_BCN = similarity_BCN * scale_BN[:, None]
    return similarity_BCN.scatter(2, candidate_index[:, :, None], 1.0)


def _inverse_norm(centered_norm: Tensor, mean: Tensor, num_features: int) -> Tensor:
    """Return what brings centered vectors to length 1, and 0 for those that are rounding noise."""
    norm = (centered_norm.square() + num_features * mean.square()).sqrt()
    is_flat = centered_norm <= _NOISE_RATIO * norm + _TINY_NORM
    return torch.where(is_flat, 0.0, 1.0 / torch.where(is_flat, 1.0, centered_norm))
