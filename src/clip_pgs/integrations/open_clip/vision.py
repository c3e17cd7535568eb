"""OpenCLIP's vision transformer, with the patches that a strategy drops left out in training."""

from __future__ import annotations

import torch
from open_clip.transformer import VisionTransformer
from torch import Tensor
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from clip_pgs.integrations.open_clip.compat import pool_tower
from clip_pgs.integrations.open_clip.padding import block_with_key_mask, pool_with_key_mask
from clip_pgs.integrations.open_clip.state import TowerMasking
from clip_pgs.masking.patches import gather_tokens
from clip_pgs.masking.types import PatchSelection


class MaskedVisionTransformer(VisionTransformer):
    """A `VisionTransformer` that sees a selection of its patches in train mode.

    It is never constructed: `apply_masking` turns an existing tower into one and adds `masking`.
    Parameters and buffers are those of the tower. In eval mode, and with the strategy `none`,
    OpenCLIP's own forward pass runs.
    """

    masking: TowerMasking

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        """Encode images.

        Args:
            x: Images of shape (B, 3, H, W).

        Returns:
            What OpenCLIP's tower returns: features (B, D), with `output_tokens` also the kept
            tokens (B, K, D), zero in padding slots.
        """
        if not self.training or self.masking.strategy.keeps_all:
            return super().forward(x)

        tokens_BND = self.conv1(x).flatten(2).transpose(1, 2)
        selection = self.masking.select(x, tokens_BND, self.patch_size)
        key_mask = _key_mask(selection)
        x = self.ln_pre(self._embed_selection(tokens_BND, selection))
        for block in self.transformer.resblocks:
            if self.transformer.grad_checkpointing:
                x = checkpoint(block_with_key_mask, block, x, key_mask, use_reentrant=False)
            else:
                x = block_with_key_mask(block, x, key_mask)
        if key_mask is None:
            pooled, tokens = pool_tower(self, x)
        else:
            pooled, tokens = pool_with_key_mask(self, x, key_mask)
        if self.proj is not None:
            pooled = pooled @ self.proj
        return (pooled, tokens) if self.output_tokens else pooled

    def _embed_selection(self, tokens_BND: Tensor, selection: PatchSelection) -> Tensor:
        positions = self.positional_embedding.to(tokens_BND.dtype)
        kept_BKD = gather_tokens(tokens_BND + positions[1:], selection)
        class_token = self.class_embedding.to(tokens_BND.dtype) + positions[0]
        return torch.cat([class_token.expand(kept_BKD.shape[0], 1, -1), kept_BKD], dim=1)


def _key_mask(selection: PatchSelection) -> Tensor | None:
    if selection.valid is None:
        return None
    # The class token stands first and is always valid.
    return functional.pad(selection.valid, (1, 0), value=True)[:, None, None, :]
