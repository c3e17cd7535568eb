"""timm's vision transformer inside OpenCLIP's `TimmModel`, masked."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from open_clip.timm_model import TimmModel
from timm.layers import Attention, AttentionPoolLatent, PatchEmbed
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn

from clip_pgs.integrations.masked_tower import MaskedTower, PatchGrid
from clip_pgs.integrations.open_clip.compat import check_versions
from clip_pgs.integrations.tokens import (
    BlockParts,
    first_token_attention,
    logit_mask,
    query_attention,
)
from clip_pgs.masking import MaskingStrategy
from clip_pgs.masking.merge import Merge


class MaskedTimmModel(MaskedTower, TimmModel):
    """A `TimmModel` with a `VisionTransformer` of timm that sees a selection of its patches."""

    plain_class = TimmModel
    supported = "timm's in OpenCLIP's TimmModel (ViT models, not ResNet or ConvNeXt)"

    @staticmethod
    def refusal(tower: TimmModel) -> str | None:
        """Return why a tower cannot be masked, None where it can."""
        trunk = tower.trunk
        # A subclass may have a forward pass of its own, which masking would undo without a word.
        if type(trunk) is not VisionTransformer:
            return (
                f"the image tower is timm's {type(trunk).__name__}; of timm's models masking "
                "supports VisionTransformer alone"
            )
        if type(trunk.patch_embed) is not PatchEmbed:
            return (
                f"the image tower embeds patches by timm's {type(trunk.patch_embed).__name__}, "
                "whose patches see each other; masking needs PatchEmbed"
            )
        if trunk.dynamic_img_size:
            return "the image tower takes images of any size (dynamic_img_size); masking needs one"
        if trunk.pos_embed is None:
            return "the image tower has no position embedding, without which patches have no place"
        if not isinstance(trunk.patch_drop, nn.Identity):
            return (
                f"the image tower drops patches by itself (patch_drop_rate={trunk.patch_drop.prob})"
                "; build the model with force_patch_dropout=0 to mask it"
            )
        if trunk.attn_pool is not None and type(trunk.attn_pool) is not AttentionPoolLatent:
            return (
                f"the image tower pools by timm's {type(trunk.attn_pool).__name__}, which cannot "
                "leave tokens out; masking supports token, avg, avgmax, max and map pooling"
            )
        return None

    @staticmethod
    def check_model(model: nn.Module, strategy: MaskingStrategy, merge: Merge | None) -> None:
        """Refuse another version of OpenCLIP."""
        check_versions()

    @staticmethod
    def attention_refusal(tower: TimmModel) -> str | None:
        """Return why no token's or query's attention makes the feature, None where one does."""
        trunk = tower.trunk
        if trunk.attn_pool is not None:
            return None
        if trunk.global_pool != "token":
            return f"the image tower pools by {trunk.global_pool!r}"
        for block in trunk.blocks:
            if type(block) is not Block or type(block.attn) is not Attention:
                return f"the image tower is built of {type(block).__name__} without plain attention"
        return None

    @staticmethod
    def patch_grid(tower: TimmModel) -> PatchGrid:
        """Return how a tower cuts its images."""
        return PatchGrid(tower.trunk.patch_embed.grid_size, tower.trunk.patch_embed.patch_size)

    @staticmethod
    def patch_weight(tower: TimmModel) -> Tensor:
        """Return the weight that meets the pixels first."""
        return tower.trunk.patch_embed.proj.weight

    def embed_patches(self, pixels: Tensor) -> Tensor:
        """Return patch embeddings without positions, shape (B, N, D)."""
        # `patch_embed` itself refuses the smaller images of a teacher.
        embed = self.trunk.patch_embed
        return embed.norm(embed.proj(pixels).flatten(2).transpose(1, 2))

    def patch_positions(self, dtype: torch.dtype) -> Tensor:
        """Return the patches' position embeddings, shape (N, D); timm adds them uncast."""
        return self.trunk.pos_embed[0, self._num_placed_prefix() :]

    def add_prefix(self, patches: Tensor) -> Tensor:
        """Put class token and registers in front, shape (B, P + K, D)."""
        trunk = self.trunk
        prefix = [token for token in (trunk.cls_token, trunk.reg_token) if token is not None]
        x = patches
        if prefix:
            prefix_1PD = torch.cat(prefix, dim=1)
            if self._num_placed_prefix():
                prefix_1PD = prefix_1PD + trunk.pos_embed[:, : self._num_placed_prefix()]
            x = torch.cat([prefix_1PD.expand(len(patches), -1, -1), patches], dim=1)
        return trunk.norm_pre(trunk.pos_drop(x))

    def blocks(self) -> Sequence[nn.Module]:
        """Return the transformer's blocks, in order."""
        return self.trunk.blocks

    def uses_checkpointing(self) -> bool:
        """Return whether blocks are computed again in the backward pass."""
        return self.trunk.grad_checkpointing

    def run_block(self, block: nn.Module, x: Tensor, attn_mask: Tensor | None) -> Tensor:
        """Run a block over tokens (B, T, D), leaving out keys that are padding."""
        if attn_mask is not None and attn_mask.dtype == torch.bool:
            # Without the fused kernel, timm adds its mask to the logits, of any dtype.
            attn_mask = logit_mask(attn_mask, x.dtype)
        return block(x) if attn_mask is None else block(x, attn_mask=attn_mask)

    def block_parts(self, block: Any) -> BlockParts | None:
        """Return the parts of timm's usual block with its usual attention."""
        if not _is_plain(block):
            return None
        attention = block.attn
        return BlockParts(
            norm=block.norm1,
            qkv_weight=attention.qkv.weight,
            qkv_bias=attention.qkv.bias,
            num_heads=attention.num_heads,
            head_norms=(attention.q_norm, attention.k_norm),
            after_attention=lambda x: block.ls1(attention.proj(attention.norm(x))),
            mlp=lambda x: block.ls2(block.mlp(block.norm2(x))),
        )

    def reads_first_token(self) -> bool:
        """Return whether the class token is all that is pooled."""
        return self.trunk.attn_pool is None and self.trunk.global_pool == "token"

    def read_out(self, x: Tensor, key_mask: Tensor | None) -> Any:
        """Pool the valid tokens (B, T, D) and project them."""
        trunk = self.trunk
        x = trunk.norm(x)
        if key_mask is None:
            return self.head(trunk.forward_head(x))
        pooled = _pool(trunk, x, key_mask)
        return self.head(trunk.head(trunk.head_drop(trunk.fc_norm(pooled))))

    def feature_attention(self, x: Tensor) -> Tensor:
        """Return the attention of the class token, or of the query that pools, shape (B, T)."""
        if self.trunk.attn_pool is None:
            return self.class_token_attention(x)
        for block in self.blocks():
            x = self.run_block(block, x, None)
        pool: AttentionPoolLatent = self.trunk.attn_pool
        x = _pooled_tokens(self.trunk, self.trunk.norm(x))
        # The first latent query is the one whose output timm's "token" pooling takes.
        query = pool.q(pool.latent[:, :1].expand(len(x), -1, -1))
        key = pool.kv(x).chunk(2, dim=-1)[0]
        return query_attention(
            query, key, num_heads=pool.num_heads, norms=(pool.q_norm, pool.k_norm)
        )

    def first_row(self, block: Any, x: Tensor) -> Tensor:
        """Return a block's attention of the class token to all, mean over heads, (B, T)."""
        attention = block.attn
        return first_token_attention(
            block.norm1(x),
            attention.qkv.weight,
            attention.qkv.bias,
            num_heads=attention.num_heads,
            norms=(attention.q_norm, attention.k_norm),
        )

    def _num_placed_prefix(self) -> int:
        """Return how many prefix tokens have positions of their own."""
        return 0 if self.trunk.no_embed_class else self.trunk.num_prefix_tokens


def _is_plain(block: Any) -> bool:
    """Return whether a block has nothing but what `BlockParts` knows; not dropout, not a gate."""
    if type(block) is not Block or type(block.attn) is not Attention:
        return False
    attention = block.attn
    # `Block` hands the rate of `proj_drop` on to its MLP.
    return (
        getattr(attention, "gate", None) is None  # not in every version
        and attention.attn_drop.p == attention.proj_drop.p == 0
        and isinstance(block.drop_path1, nn.Identity)
        and isinstance(block.drop_path2, nn.Identity)
    )


def _pooled_tokens(trunk: VisionTransformer, x: Tensor) -> Tensor:
    return x if trunk.pool_include_prefix else x[:, trunk.num_prefix_tokens :]


def _pool(trunk: VisionTransformer, x: Tensor, key_mask: Tensor) -> Tensor:
    """Pool as the trunk does, over the valid tokens alone."""
    if trunk.attn_pool is not None:
        pool_mask = _pooled_tokens(trunk, key_mask[:, 0, 0])[:, None, None, :]
        return trunk.attn_pool(_pooled_tokens(trunk, x), attn_mask=logit_mask(pool_mask, x.dtype))
    valid_BT1 = key_mask[:, 0, 0, :, None]
    if trunk.global_pool == "token":
        return x[:, 0]
    if not trunk.global_pool:
        return torch.where(valid_BT1, x, 0.0)
    x, valid_BT1 = _pooled_tokens(trunk, x), _pooled_tokens(trunk, valid_BT1)
    mean = torch.where(valid_BT1, x, 0.0).sum(dim=1) / valid_BT1.sum(dim=1)
    if trunk.global_pool == "avg":
        return mean
    highest = torch.where(valid_BT1, x, float("-inf")).amax(dim=1)
    return highest if trunk.global_pool == "max" else 0.5 * (highest + mean)
