"""Looking at what masking strategies do, and measuring what they keep."""

from clip_pgs.inspection.foreground.annotations import ForegroundImages, pair_masks, read_foreground
from clip_pgs.inspection.foreground.kept import Kept, measure_kept
from clip_pgs.inspection.masks import draw_masks
from clip_pgs.inspection.model_input import ModelInput, load_model, read_model_input
from clip_pgs.inspection.strategies import StrategySpec, parse_spec
from clip_pgs.inspection.view import View

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
