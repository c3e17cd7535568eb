"""Masking inside OpenCLIP models (https://github.com/mlfoundations/open_clip)."""
# ruff: noqa: E402 - the check comes first

from clip_pgs.integrations import check_versions

check_versions()

from clip_pgs.integrations.apply import (
    apply_masking,
    calibrate_masking,
    force_selection,
    last_selection,
    load_masking_state,
    masked_inference,
    masking_state,
    num_patches,
    patch_size,
    pixel_dtype,
    remove_masking,
    set_mask_ratio,
    set_masking_noise,
    set_masking_progress,
    update_masking,
)
from clip_pgs.integrations.open_clip import conv, open_clip_vit, timm_vit  # noqa: F401
from clip_pgs.integrations.open_clip.text import (
    CaptionGroups,
    CaptionTrimmer,
    allow_short_text,
    caption_trimmer,
    is_text_trimming_lossless,
)

__all__ = [
    "CaptionGroups",
    "CaptionTrimmer",
    "allow_short_text",
    "apply_masking",
    "calibrate_masking",
    "caption_trimmer",
    "force_selection",
    "is_text_trimming_lossless",
    "last_selection",
    "load_masking_state",
    "masked_inference",
    "masking_state",
    "num_patches",
    "patch_size",
    "pixel_dtype",
    "remove_masking",
    "set_mask_ratio",
    "set_masking_noise",
    "set_masking_progress",
    "update_masking",
]
