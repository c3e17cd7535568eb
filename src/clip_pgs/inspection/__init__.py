"""Looking at what masking strategies do, and measuring what they keep."""

from typing import TYPE_CHECKING

from clip_pgs.registry import late_names

if TYPE_CHECKING:
    from clip_pgs.inspection.kept import (
        ForegroundImages,
        Kept,
        measure_kept,
        pair_masks,
        read_foreground,
    )
    from clip_pgs.inspection.masks import draw_masks
    from clip_pgs.inspection.model_input import (
        ModelInput,
        StrategySpec,
        View,
        load_model,
        parse_spec,
        read_model_input,
    )

__all__ = [
    "ForegroundImages",
    "Kept",
    "ModelInput",
    "StrategySpec",
    "View",
    "draw_masks",
    "load_model",
    "measure_kept",
    "pair_masks",
    "parse_spec",
    "read_foreground",
    "read_model_input",
]
__getattr__ = late_names(__name__, __all__, "model_input", "masks", "kept")
