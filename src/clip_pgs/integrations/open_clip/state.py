"""What a masked image tower carries: its strategy, and what the caller sets between steps."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from clip_pgs.masking.types import MaskingStrategy, PatchInputs, PatchSelection


class TowerMasking(nn.Module):
    """The masking of one image tower; it holds no parameter and no buffer.

    Args:
        strategy: Chooses the patches.

    Attributes:
        progress: Completed share of the masked training steps, in [0, 1].
        noise: Uniform numbers in [0, 1) for the coming forward passes, shape (B, N); None draws
            from the global stream.
        forced_selection: Takes the strategy's place where set.
        last_selection: What the latest masked forward pass kept.
    """

    def __init__(self, strategy: MaskingStrategy) -> None:
        super().__init__()
        self.strategy = strategy
        self.progress = 0.0
        self.noise: Tensor | None = None
        self.forced_selection: PatchSelection | None = None
        self.last_selection: PatchSelection | None = None

    @torch.no_grad()
    def select(self, pixels: Tensor, tokens: Tensor, patch_size: tuple[int, int]) -> PatchSelection:
        """Choose the patches of a batch.

        Args:
            pixels: Images as the tower receives them. Shape (B, 3, H, W).
            tokens: Patch embeddings without positions. Shape (B, N, D).
            patch_size: (height, width) of a patch.
        """
        selection = self.forced_selection
        if selection is None:
            inputs = PatchInputs(
                pixels, patch_size, tokens=tokens, progress=self.progress, noise=self.noise
            )
            selection = self.strategy(inputs)
        self.last_selection = selection
        return selection
