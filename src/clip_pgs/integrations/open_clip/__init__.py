"""Masking inside OpenCLIP models (https://github.com/mlfoundations/open_clip)."""

from clip_pgs.integrations.open_clip.apply import (
    apply_masking,
    force_selection,
    last_selection,
    num_patches,
    remove_masking,
    set_masking_noise,
    set_masking_progress,
)

__all__ = [
    "apply_masking",
    "force_selection",
    "last_selection",
    "num_patches",
    "remove_masking",
    "set_masking_noise",
    "set_masking_progress",
]
