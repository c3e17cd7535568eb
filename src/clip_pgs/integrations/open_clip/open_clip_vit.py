"""OpenCLIP's own vision transformer, masked."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from open_clip import CoCa
from open_clip.transformer import (
    Attention,
    AttentionalPooler,
    CustomResidualAttentionBlock,
    ResidualAttentionBlock,
    VisionTransformer,
)
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from clip_pgs.integrations.masked_tower import (
    MaskedTower,
    PatchGrid,
    has_hooks,
    has_plain_weights,
    is_exactly,
    run_as_forward,
    unwrap,
    valid_mean,
)
from clip_pgs.integrations.varlen_tokens import BlockParts, logit_mask
from clip_pgs.masking import MaskingStrategy
from clip_pgs.masking.merge import Merge


class MaskedVisionTransformer(MaskedTower, VisionTransformer):
    """A `VisionTransformer` of OpenCLIP that sees a selection of its patches."""

    plain_class = VisionTransformer
    supported = "OpenCLIP's own VisionTransformer"
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
    def check_model(model: nn.Module, strategy: MaskingStrategy, merge: Merge | None) -> None:
        """Refuse padding that a text decoder would read."""
        plain: Any = unwrap(model)
        if not isinstance(plain, CoCa) or plain.visual.attn_pool is not None:
            return
        if strategy.keeps_different_counts() or merge is not None:
            raise ValueError(
                "this CoCa hands patch tokens to its text decoder, which would read the padding of "
                "merge and of different counts, which an adaptive pgs and cluster keep; take a "
                "masking that keeps as many patches of every image and leave out merge, or build "
                "the model with attentional_pool"
            )

    @staticmethod
    def attention_refusal(tower: VisionTransformer) -> str | None:
        """Return why no token's or query's attention makes the feature, None where one does."""
        if tower.pool_type != "tok" and _contrastive_pool(tower) is None:
            return f"the image tower pools by {tower.pool_type!r}"
        if tower.attn_pool is None and not all(
            map(_has_plain_attention, tower.transformer.resblocks)
        ):
            return "attention in the image tower's blocks is changed, as by an adapter or pruning"
        return None

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

    def run_block(
        self,
        block: nn.Module,
        x: Tensor,
        attn_mask: Tensor | None,
        rotation: Tensor | None = None,
    ) -> Tensor:
        """Run a block; `masked_block` says how."""
        return masked_block(block, x, attn_mask)

    def block_parts(self, block: Any, rotation: Tensor | None = None) -> BlockParts | None:
        """Return the parts of OpenCLIP's usual block, and of its custom one what they share."""
        if not _has_plain_attention(block):
            return None
        attention, is_usual = block.attn, isinstance(_inside(block), ResidualAttentionBlock)
        return BlockParts(
            norm=block.ln_1,
            qkv_weight=attention.in_proj_weight,
            qkv_bias=attention.in_proj_bias,
            num_heads=attention.num_heads,
            head_norms=None if is_usual else (attention.ln_q, attention.ln_k),
            after_attention=lambda x: block.ls_1(attention.out_proj(x)),
            mlp=lambda x: block.ls_2(block.mlp(block.ln_2(x))),
            is_all=_is_usual(block) and attention.dropout == 0,
        )

    def reads_first_token(self) -> bool:
        """Return whether the class token is all that comes out."""
        return self.pool_type == "tok" and self.attn_pool is None and not self.output_tokens

    def read_out(self, x: Tensor, key_mask: Tensor | None) -> Any:
        """Pool the valid tokens (B, T, D) and project them."""
        pooled, tokens = pool_valid(self, x, None if key_mask is None else key_mask[:, 0, 0])
        if self.proj is not None:
            pooled = pooled @ self.proj
        return (pooled, tokens) if self.output_tokens else pooled

    def feature_attention(self, x: Tensor, rotations: Tensor | None = None) -> Tensor:
        """Return the attention of the class token, or of the query that pools, shape (B, T)."""
        if self.attn_pool is None:
            return self.class_token_attention(x)
        for block in self.blocks():
            x = self.run_block(block, x, None)
        return _pool_attention(self, x)


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
    return _attend(pooler, x, need_weights=True)[1].float()


def _attend(pooler: AttentionalPooler, x: Tensor, **options: Any) -> tuple[Tensor, Any]:
    keys = pooler.ln_k(x)
    queries = pooler.ln_q(pooler.query).expand(x.shape[0], -1, -1)
    return pooler.attn(queries, keys, keys, **options)


# ------------------------------------------------------------------------------------------------
# Attention and pooling that never read a padding slot
#
# OpenCLIP's residual block casts any mask to the activations' dtype, which turns True / False into
# +1 / 0 on the logits, and `nn.MultiheadAttention` takes a mask per image for each head and query
# alone. So a boolean key mask goes to scaled-dot-product attention itself, with the block's own
# weights, as long as these say what the block does.
# ------------------------------------------------------------------------------------------------


def masked_block(block: Any, x: Tensor, attn_mask: Tensor | None) -> Tensor:
    """Run a residual attention block of OpenCLIP over tokens of which some are padding.

    Args:
        block: A `ResidualAttentionBlock` or `CustomResidualAttentionBlock`, or one in their place.
        x: Tokens of shape (B, T, D).
        attn_mask: Boolean, True where a token may be attended to, shape (B, 1, 1, T); or, in the
            tokens' dtype, what is added to the logits, of that shape or (B, H, T, T). None for
            neither.

    Returns:
        Tokens of shape (B, T, D); those in padding slots are finite and without meaning.
    """
    if not _is_usual(block):
        if attn_mask is not None:
            attn_mask = _mask_of_whole_block(block, x, attn_mask)
        return block(x, attn_mask=attn_mask)
    # In eval mode `nn.MultiheadAttention` is one fused operation, which no FLOP counter sees into.
    if attn_mask is None and block.training:
        return block(x)

    def run(x: Tensor) -> Tensor:
        x = x + block.ls_1(_self_attention(block.attn, block.ln_1(x), attn_mask))
        return x + block.ls_2(block.mlp(block.ln_2(x)))

    return run_as_forward(block, run, x)


def _has_plain_attention(block: Any) -> bool:
    """Return whether a block's attention can be had from its weights."""
    attention = block.attn
    if has_plain_weights(attention, nn.MultiheadAttention):
        # Whose weights it reads as well.
        return has_plain_weights(attention.out_proj, NonDynamicallyQuantizableLinear)
    return has_plain_weights(attention, Attention)


def _inside(block: Any) -> Any:
    """Return the block in a wrapper that saves memory, compiles or shards, and else the block."""
    for wrapper in ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"):
        block = getattr(block, wrapper, block)
    return block


def _is_usual(block: Any) -> bool:
    """Return whether other calls may take the place of a block's attention."""
    return (
        is_exactly(block, ResidualAttentionBlock)
        and _has_plain_attention(block)
        and not has_hooks(block.attn)
        and not has_hooks(block.attn.out_proj)
    )


def _mask_of_whole_block(block: Any, x: Tensor, attn_mask: Tensor) -> Tensor:
    """Return the mask of `masked_block` as a block takes it that runs as it is."""
    is_key_mask = attn_mask.dtype == torch.bool
    if isinstance(_inside(block), CustomResidualAttentionBlock):
        # It adds -inf wherever its boolean mask is True, and broadcasts.
        return ~attn_mask if is_key_mask else attn_mask
    if is_key_mask:
        attn_mask = logit_mask(attn_mask, x.dtype)
    # Adapters stand around the module that has heads.
    heads = next(module.num_heads for module in block.modules() if hasattr(module, "num_heads"))
    num_tokens = x.shape[1]
    return attn_mask.expand(len(x), heads, num_tokens, num_tokens).flatten(0, 1)


def pool_valid(
    tower: VisionTransformer, x: Tensor, valid_BT: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Pool as the tower does, over the valid tokens alone.

    Args:
        tower: The image tower.
        x: Output of its blocks, class token first. Shape (B, T, D).
        valid_BT: True where a token is valid; None where all are.

    Returns:
        What the tower's own pooling returns, (pooled, tokens); padding tokens are zero.
    """
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
        return valid_mean(x[:, 1:], None if valid_BT is None else valid_BT[:, 1:]), x[:, 1:]
    return x, x


def _attentional_pool(pooler: AttentionalPooler, x: Tensor, valid_BT: Tensor | None) -> Tensor:
    padding_BT = None if valid_BT is None else ~valid_BT
    return _attend(pooler, x, key_padding_mask=padding_BT, need_weights=False)[0]
