"""CLIP training with patch masking: CLIP-PGS and its relatives, for OpenCLIP."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
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


def __getattr__(name: str) -> Any:
    # What needs torch, or open_clip on top, is imported when first asked for: a command that
    # refuses a wrong option has no seconds to lose.
    if name == "evaluation":
        return importlib.import_module("clip_pgs.evaluation")
    if name in __all__:
        return getattr(importlib.import_module("clip_pgs.masking"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*globals(), *__all__]
