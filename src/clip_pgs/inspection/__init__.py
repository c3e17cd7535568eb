"""Looking at what a masking strategy does."""

from clip_pgs.inspection.masks import draw_masks
from clip_pgs.inspection.model_input import ModelInput, read_model_input

__all__ = ["ModelInput", "draw_masks", "read_model_input"]
