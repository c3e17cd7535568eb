"""Choosing which patches of an image a vision transformer sees; torch alone."""

from clip_pgs.masking import (
    attentive_masking,
    block_masking,
    cluster_masking,
    gaussian_masking,
    grid_masking,
    none_masking,
    pgs_masking,
    pgs_released_masking,
    random_masking,
)
from clip_pgs.masking.edges import sobel_edges
from clip_pgs.masking.pgs_scores import pgs_scores
from clip_pgs.masking.registry import create_masking, list_maskings, masking_options
from clip_pgs.masking.sinkhorn import sinkhorn_plan
from clip_pgs.masking.types import MaskingStrategy, PatchInputs, PatchSelection

__all__ = [
    "MaskingStrategy",
    "PatchInputs",
    "PatchSelection",
    "attentive_masking",
    "block_masking",
    "cluster_masking",
    "create_masking",
    "gaussian_masking",
    "grid_masking",
    "list_maskings",
    "masking_options",
    "none_masking",
    "pgs_masking",
    "pgs_released_masking",
    "pgs_scores",
    "random_masking",
    "sinkhorn_plan",
    "sobel_edges",
]
