"""OpenCLIP's own vision transformer, masked."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from open_clip.transformer import AttentionalPooler, ResidualAttentionBlock, VisionTransformer
from torch import Tensor, nn

from clip_pgs.integrations.open_clip.attention_rows import first_token_attention
from clip_pgs.integrations.open_clip.block_parts import BlockParts
from clip_pgs.integrations.open_clip.compat import pool_tower
from clip_pgs.integrations.open_clip.masked_tower import MaskedTower
from clip_pgs.integrations.open_clip.padding import masked_block, pool_with_key_mask
from clip_pgs.integrations.open_clip.state import PatchGrid


class MaskedVisionTransformer(MaskedTower, VisionTransformer):
    """A `VisionTransformer` of OpenCLIP that sees a selection of its patches."""

    plain_class = VisionTransformer
    takes_attention_bias = True

    @staticmethod
    def refusal(tower: VisionTransformer) -> str | None:
        """Return why a tower cannot be masked, None where it can."""
        if not isinstance(tower.patch_dropout, nn.Identity):
            return (
                f"the image tower drops patches by itself (patch_dropout={tower.patch_dropout.prob}"
                "); build the model with force_patch_dropout=0 to mask it"
            )
        return None

    @staticmethod
    def attention_refusal(tower: VisionTransformer) -> str | None:
        """Return why no token's or query's attention makes the feature, None where one does."""
        if tower.pool_type == "tok" or _contrastive_pool(tower) is not None:
            return None
        return f"the image tower pools by {tower.pool_type!r}"

    @staticmethod
    def patch_grid(tower: VisionTransformer) -> PatchGrid:
        """Return how a tower cuts its images."""
        return PatchGrid(tower.grid_size, tower.patch_size)

    @staticmethod
    def patch_weight(tower: VisionTransformer) -> Tensor:
        """Return the weight that meets the pixels first."""
        return tower.conv1.weight

    def embed_patches(self, pixels: Tensor) -> Tensor:
        """Return patch embeddings without positions, shape (B, N, D)."""
        return self.conv1(pixels).flatten(2).transpose(1, 2)

    def patch_positions(self, dtype: torch.dtype) -> Tensor:
        """Return the patches' position embeddings, shape (N, D)."""
        return self.positional_embedding[1:].to(dtype)

    def add_prefix(self, patches: Tensor) -> Tensor:
        """Put the class token in front, shape (B, 1 + K, D)."""
        position_D = self.positional_embedding[0].to(patches.dtype)
        class_token = self.class_embedding.to(patches.dtype) + position_D
        return self.ln_pre(torch.cat([class_token.expand(len(patches), 1, -1), patches], dim=1))

    def blocks(self) -> Sequence[nn.Module]:
        """Return the transformer's blocks, in order."""
        return self.transformer.resblocks

    def uses_checkpointing(self) -> bool:
        """Return whether blocks are computed again in the backward pass."""
        return self.transformer.grad_checkpointing

    def num_heads(self) -> int:
        """Return how many heads a block has."""
        return self.transformer.resblocks[0].attn.num_heads

    def run_block(self, block: nn.Module, x: Tensor, attn_mask: Tensor | None) -> Tensor:
        """Run a block; `masked_block` says how."""
        return masked_block(block, x, attn_mask)

    def block_parts(self, block: Any) -> BlockParts | None:
        """Return the parts of OpenCLIP's usual block."""
        if type(block) is not ResidualAttentionBlock or block.attn.dropout > 0:
            return None
        attention = block.attn
        return BlockParts(
            norm=block.ln_1,
            qkv_weight=attention.in_proj_weight,
            qkv_bias=attention.in_proj_bias,
            num_heads=attention.num_heads,
            head_norms=None,
            after_attention=lambda x: block.ls_1(attention.out_proj(x)),
            mlp=lambda x: block.ls_2(block.mlp(block.ln_2(x))),
        )

    def reads_first_token(self) -> bool:
        """Return whether the class token is all that comes out."""
        return self.pool_type == "tok" and self.attn_pool is None and not self.output_tokens

    def read_out(self, x: Tensor, key_mask: Tensor | None) -> Any:
        """Pool the valid tokens (B, T, D) and project them."""
        if key_mask is None:
            pooled, tokens = pool_tower(self, x)
        else:
            pooled, tokens = pool_with_key_mask(self, x, key_mask)
        if self.proj is not None:
            pooled = pooled @ self.proj
        return (pooled, tokens) if self.output_tokens else pooled

    def feature_attention(self, x: Tensor) -> Tensor:
        """Return the attention of the class token, or of the query that pools, shape (B, T)."""
        if self.attn_pool is None:
            return self.class_token_attention(x)
        for block in self.blocks():
            x = self.run_block(block, x, None)
        return _pool_attention(self, x)

    def first_row(self, block: Any, x: Tensor) -> Tensor:
        """Return a block's attention of the class token to all, mean over heads, (B, T)."""
        attention = block.attn
        norms = None
        if not isinstance(block, ResidualAttentionBlock):
            norms = (attention.ln_q, attention.ln_k)
        return first_token_attention(
            block.ln_1(x),
            attention.in_proj_weight,
            attention.in_proj_bias,
            num_heads=attention.num_heads,
            norms=norms,
        )


def _contrastive_pool(tower: VisionTransformer) -> AttentionalPooler | None:
    # OpenCLIP sets this attribute only where there is attentional pooling.
    return getattr(tower, "attn_pool_contrastive", None)


def _pool_attention(tower: VisionTransformer, x: Tensor) -> Tensor:
    """Return the attention of the query that becomes the image feature, shape (B, T)."""
    contrastive = _contrastive_pool(tower)
    if contrastive is None:
        return _query_attention(tower.attn_pool, x)[:, 0]
    x = tower.ln_post(x)
    if tower.attn_pool_type == "parallel":
        return _query_attention(contrastive, x)[:, 0]
    # In a cascade the feature attends to queries, which attend to tokens.
    to_queries_B1Q = _query_attention(contrastive, tower.attn_pool(x))
    return (to_queries_B1Q @ _query_attention(tower.attn_pool, x))[:, 0]


def _query_attention(pooler: AttentionalPooler, x: Tensor) -> Tensor:
    keys = pooler.ln_k(x)
    queries = pooler.ln_q(pooler.query).expand(x.shape[0], -1, -1)
    return pooler.attn(queries, keys, keys, need_weights=True)[1].float()
