"""Masking inside OpenCLIP models (https://github.com/mlfoundations/open_clip)."""
# ruff: noqa: E402 - the check comes first

from clip_pgs.integrations import check_versions

check_versions()

from clip_pgs.integrations import apply
from clip_pgs.integrations.apply import *  # noqa: F403
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
    "caption_trimmer",
    "is_text_trimming_lossless",
]
__all__ += apply.__all__
