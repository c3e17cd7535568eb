"""CLIP training with patch masking: CLIP-PGS and its relatives, for OpenCLIP."""

from clip_pgs.masking import (
    MaskingStrategy,
    PatchInputs,
    PatchSelection,
    create_masking,
    list_maskings,
    pgs_scores,
    sinkhorn_plan,
    sobel_edges,
)

__version__ = "0.1.0"

__all__ = [
    "MaskingStrategy",
    "PatchInputs",
    "PatchSelection",
    "__version__",
    "create_masking",
    "list_maskings",
    "pgs_scores",
    "sinkhorn_plan",
    "sobel_edges",
]
