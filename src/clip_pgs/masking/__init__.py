"""Choosing which patches of an image a vision transformer sees; torch alone."""

# They register themselves.
from clip_pgs.masking import (  # noqa: F401
    attentive,
    baselines,
    cluster,
    colormae,
    pgs,
    pgs_released,
    saliency_crop,
)
from clip_pgs.masking.edges import sobel_edges
from clip_pgs.masking.pgs import pgs_scores
from clip_pgs.masking.sinkhorn import sinkhorn_plan
from clip_pgs.masking.strategy import (
    FixedRatioMasking,
    MaskingDeclaration,
    MaskingStrategy,
    PatchInputs,
    PatchSelection,
    create_masking,
    describe_masking,
    list_maskings,
    masking_options,
    register_masking,
)

__all__ = [
    "FixedRatioMasking",
    "MaskingDeclaration",
    "MaskingStrategy",
    "PatchInputs",
    "PatchSelection",
    "create_masking",
    "describe_masking",
    "list_maskings",
    "masking_options",
    "pgs_scores",
    "register_masking",
    "sinkhorn_plan",
    "sobel_edges",
]
