"""CLIP training with patch masking: CLIP-PGS and its relatives, for OpenCLIP."""

from __future__ import annotations

import importlib
from types import ModuleType

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


def __getattr__(name: str) -> ModuleType:
    # Evaluation brings open_clip with it, so that it is imported when first asked for.
    if name == "evaluation":
        return importlib.import_module("clip_pgs.evaluation")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
