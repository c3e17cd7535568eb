"""What strategies that drop the same share of every image have in common."""

from __future__ import annotations

from clip_pgs.masking.ratios import check_mask_ratio
from clip_pgs.masking.types import MaskingStrategy


class FixedRatioMasking(MaskingStrategy):
    """A strategy with one number for the share of patches that goes.

    Args:
        mask_ratio: Share of patches dropped, in [0, 1).

    Raises:
        ValueError: If `mask_ratio` is out of its range.
    """

    def __init__(self, *, mask_ratio: float = 0.5) -> None:
        super().__init__()
        check_mask_ratio(mask_ratio)
        self.mask_ratio = mask_ratio

    def extra_repr(self) -> str:
        """Show the ratio in the module's printed form."""
        return f"mask_ratio={self.mask_ratio}"
