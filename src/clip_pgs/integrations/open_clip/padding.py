"""Attention and pooling that never read a padding slot.

OpenCLIP's residual block casts any mask to the activations' dtype, which turns True / False into
+1 / 0 on the logits, and `nn.MultiheadAttention` refuses a mask per image. So a boolean key mask
goes to scaled-dot-product attention itself, with the block's own weights.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from open_clip.transformer import AttentionalPooler, ResidualAttentionBlock, VisionTransformer
from torch import Tensor, nn
from torch.nn import functional


@dataclass(frozen=True)
class PaddedTokens:
    """Tokens (B, T, D) of which some may be padding; a layout for `BlockParts`.

    Attributes:
        key_mask: True where a token may be attended to, shape (B, 1, 1, T); None for all.
    """

    key_mask: Tensor | None

    def first_tokens(self, x: Tensor) -> Tensor:
        """Return the first token of each image, (B, 1, D)."""
        return x[:, :1]

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Attend to the valid keys; queries (B, Q, H, W / H), the others (B, T, H, W / H)."""
        query, key, value = (part.transpose(1, 2) for part in (query, key, value))
        attended = functional.scaled_dot_product_attention(
            query, key, value, attn_mask=self.key_mask
        )
        return attended.transpose(1, 2)


def masked_block(block: nn.Module, x: Tensor, attn_mask: Tensor | None) -> Tensor:
    """Run a residual attention block of OpenCLIP over tokens of which some are padding.

    Args:
        block: A `ResidualAttentionBlock` or `CustomResidualAttentionBlock`.
        x: Tokens of shape (B, T, D).
        attn_mask: Boolean, True where a token may be attended to, shape (B, 1, 1, T); or, in any
            float dtype, what is added to the logits, shape (B, H, T, T). None for neither.

    Returns:
        Tokens of shape (B, T, D); those in padding slots are finite and without meaning.
    """
    if not isinstance(block, ResidualAttentionBlock):
        if attn_mask is not None and attn_mask.dtype == torch.bool:
            # The custom block adds -inf wherever its boolean mask is True, and broadcasts.
            attn_mask = ~attn_mask
        return block(x, attn_mask=attn_mask)
    # In eval mode `nn.MultiheadAttention` is one fused operation, which no FLOP counter sees into.
    if attn_mask is None and block.training:
        return block(x)
    x = x + block.ls_1(_self_attention(block.attn, block.ln_1(x), attn_mask))
    return x + block.ls_2(block.mlp(block.ln_2(x)))


def pool_with_key_mask(
    tower: VisionTransformer, x: Tensor, key_mask: Tensor
) -> tuple[Tensor, Tensor]:
    """Pool as the tower does, over the valid tokens alone.

    Args:
        tower: The image tower.
        x: Output of its blocks, class token first. Shape (B, T, D).
        key_mask: True where a token is valid, shape (B, 1, 1, T).

    Returns:
        What the tower's own pooling returns, (pooled, tokens); padding tokens are zero.
    """
    valid_BT = key_mask[:, 0, 0]
    if tower.attn_pool is None:
        if tower.final_ln_after_pool:
            pooled, tokens = _global_pool(tower.pool_type, x, valid_BT)
            return tower.ln_post(pooled), tokens
        return _global_pool(tower.pool_type, tower.ln_post(x), valid_BT)
    if tower.attn_pool_contrastive is None:
        x = tower.ln_post(_attentional_pool(tower.attn_pool, x, valid_BT))
        return _global_pool(tower.pool_type, x, None)
    x = tower.ln_post(x)
    tokens = _attentional_pool(tower.attn_pool, x, valid_BT)
    if tower.attn_pool_type == "parallel":
        return _attentional_pool(tower.attn_pool_contrastive, x, valid_BT), tokens
    return tower.attn_pool_contrastive(tokens), tokens


def _self_attention(
    attention: nn.MultiheadAttention, x: Tensor, attn_mask: Tensor | None
) -> Tensor:
    batch_size, num_tokens, width = x.shape
    qkv = functional.linear(x, attention.in_proj_weight, attention.in_proj_bias)
    qkv = qkv.reshape(batch_size, num_tokens, 3, attention.num_heads, -1)
    query, key, value = qkv.permute(2, 0, 3, 1, 4)
    dropout = attention.dropout if attention.training else 0.0
    x = functional.scaled_dot_product_attention(
        query, key, value, attn_mask=attn_mask, dropout_p=dropout
    )
    x = x.transpose(1, 2).reshape(batch_size, num_tokens, width)
    return attention.out_proj(x)


def _global_pool(pool_type: str, x: Tensor, valid_BT: Tensor | None) -> tuple[Tensor, Tensor]:
    if valid_BT is not None:
        x = torch.where(valid_BT[:, :, None], x, 0.0)
    if pool_type == "tok":
        return x[:, 0], x[:, 1:]
    if pool_type == "avg":
        if valid_BT is None:
            return x[:, 1:].mean(dim=1), x[:, 1:]
        num_valid_B1 = valid_BT[:, 1:].sum(dim=1, keepdim=True)
        return x[:, 1:].sum(dim=1) / num_valid_B1, x[:, 1:]
    return x, x


def _attentional_pool(pooler: AttentionalPooler, x: Tensor, valid_BT: Tensor) -> Tensor:
    keys = pooler.ln_k(x)
    queries = pooler.ln_q(pooler.query).expand(x.shape[0], -1, -1)
    return pooler.attn(queries, keys, keys, key_padding_mask=~valid_BT, need_weights=False)[0]
