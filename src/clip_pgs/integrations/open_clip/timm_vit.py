"""timm's vision transformers inside OpenCLIP's `TimmModel`, masked.

They are three: `VisionTransformer` (SigLIP, ViTamin, MobileCLIP-B), `VisionTransformerDistilled`
(DeiT) and `Eva` (EVA01, EVA02, PE-Core, DINOv3, RoPE-ViT), whose rotary positions go with the
patches that stay. Where a convolutional stem makes the tokens (`HybridEmbed`), they are dropped
behind it: the stem sees the whole image, and the blocks see what stays.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from open_clip.timm_model import TimmModel
from timm.layers import (
    Attention,
    AttentionPoolLatent,
    AttentionRope,
    HybridEmbed,
    PatchEmbed,
    apply_rot_embed_cat,
)
from timm.models.deit import VisionTransformerDistilled
from timm.models.eva import Eva, EvaAttention, EvaBlock
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn

from clip_pgs.integrations.masked_tower import (
    MaskedTower,
    PatchGrid,
    has_hooks,
    has_plain_weights,
    is_exactly,
    valid_mean,
)
from clip_pgs.integrations.open_clip.conv import MaskedConvNeXt
from clip_pgs.integrations.varlen_tokens import BlockParts, logit_mask, query_attention

_TRUNKS = (VisionTransformer, VisionTransformerDistilled, Eva)
# What the most usual of the others lack.
_WOULD_NEED = {
    "FastVit": "squeeze-excitation and attention over what is visible of a convolution's map",
    "NaFlexVit": "positions apart from its patch embedding",
    "ResNet": "its blocks with normalization over what is visible, as OpenCLIP's own ResNet has",
    "SwinTransformer": "windows over what is left of the grid",
    "VisionTransformerRelPos": "relative positions gathered for each image",
}


class MaskedTimmModel(MaskedTower, TimmModel):
    """A `TimmModel` with a vision transformer of timm that sees a selection of its patches."""

    plain_class = TimmModel
    supported = "timm's vision transformers in OpenCLIP's TimmModel"

    @staticmethod
    def takes(tower: TimmModel) -> bool:
        """Return whether the tower is none of convolutions."""
        return not MaskedConvNeXt.takes(tower)

    @staticmethod
    def refusal(tower: TimmModel) -> str | None:
        """Return why a tower cannot be masked, None where it can."""
        trunk = tower.trunk
        # A subclass may have a forward pass of its own, which masking would undo without a word.
        if type(trunk) not in _TRUNKS:
            kind = type(trunk).__name__
            needed = _WOULD_NEED.get(kind, "blocks that take any subset of the patches")
            return (
                f"the image tower is timm's {kind}, and masking would need {needed}; of timm's "
                f"models it supports {', '.join(kind.__name__ for kind in _TRUNKS)} and ConvNeXt"
            )
        embed = trunk.patch_embed
        if type(embed) not in (PatchEmbed, HybridEmbed) or embed.dynamic_img_pad:
            return (
                f"the image tower embeds patches by timm's {type(embed).__name__}; masking needs "
                "PatchEmbed or HybridEmbed, without dynamic_img_pad"
            )
        if (
            trunk.pos_embed is None
            and getattr(trunk, "rope", None) is None
            and type(embed) is PatchEmbed
        ):
            return "the image tower has no position embedding, without which patches have no place"
        if not isinstance(trunk.patch_drop, nn.Identity | None):
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
    def attention_refusal(tower: TimmModel) -> str | None:
        """Return why no token's or query's attention makes the feature, None where one does."""
        trunk = tower.trunk
        if trunk.attn_pool is not None:
            return None
        if trunk.global_pool != "token":
            return f"the image tower pools by {trunk.global_pool!r}"
        for block in trunk.blocks:
            if _stacked_qkv(block) is None:
                return f"the image tower is built of {type(block).__name__} without plain attention"
        return None

    @staticmethod
    def patch_grid(tower: TimmModel) -> PatchGrid:
        """Return how a tower cuts its images."""
        embed = tower.trunk.patch_embed
        return PatchGrid(tuple(embed.grid_size), embed.feat_ratio(as_scalar=False))

    @staticmethod
    def patch_weight(tower: TimmModel) -> Tensor:
        """Return the weight that meets the pixels first."""
        return next(tower.trunk.patch_embed.parameters())

    def embed_patches(self, pixels: Tensor) -> Tensor:
        """Return patch embeddings without positions, shape (B, N, D)."""
        embed = self.trunk.patch_embed
        if isinstance(embed, HybridEmbed):
            x = embed(pixels)
            return x if x.ndim == 3 else x.flatten(1, 2)
        # `PatchEmbed` itself refuses the smaller images of a teacher.
        return embed.norm(embed.proj(pixels).flatten(2).transpose(1, 2))

    def patch_positions(self, dtype: torch.dtype) -> Tensor | None:
        """Return the patches' position embeddings, shape (N, D); timm adds them uncast."""
        if self.trunk.pos_embed is None:
            return None
        return self.trunk.pos_embed[0, self._num_placed_prefix() :]

    def rotations(self) -> Tensor | None:
        """Return the rotary embeddings of the prefix and of all patches, (1, P + N, L, H, R)."""
        rope = getattr(self.trunk, "rope", None)
        if rope is None:
            return None
        # As the trunk asks for them, so that they are the same, and drawn as often, in training.
        has_own_grid = getattr(rope, "feat_shape", None) is not None
        embedding = rope.get_embed() if has_own_grid else rope.get_embed(self.patch_grid(self).size)
        # (N, R), or (L, H, N, R) where blocks and heads have their own
        embedding = embedding.movedim(-2, 0)
        if embedding.ndim == 2:
            embedding = embedding[:, None, None]
        still = torch.zeros_like(embedding[:1]).expand(self.trunk.num_prefix_tokens, -1, -1, -1)
        sine, cosine = still.chunk(2, dim=-1)
        return torch.cat([torch.cat([sine, cosine + 1], dim=-1), embedding])[None]

    def add_prefix(self, patches: Tensor) -> Tensor:
        """Put class token and registers in front, shape (B, P + K, D)."""
        trunk = self.trunk
        every = (trunk.cls_token, getattr(trunk, "dist_token", None), trunk.reg_token)
        prefix = [token for token in every if token is not None]
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

    def run_block(
        self,
        block: nn.Module,
        x: Tensor,
        attn_mask: Tensor | None,
        rotation: Tensor | None = None,
    ) -> Tensor:
        """Run a block over tokens (B, T, D), leaving out keys that are padding."""
        options: dict[str, Tensor] = {}
        if attn_mask is not None:
            # Without the fused kernel, timm adds its mask to the logits, of any dtype.
            is_key_mask = attn_mask.dtype == torch.bool
            options["attn_mask"] = logit_mask(attn_mask, x.dtype) if is_key_mask else attn_mask
        if rotation is not None:
            options["rope"] = rotation[:, self.trunk.num_prefix_tokens :].transpose(1, 2)
        return block(x, **options)

    def block_parts(self, block: Any, rotation: Tensor | None = None) -> BlockParts | None:
        """Return the parts of timm's usual blocks with their usual attention."""
        stacked = _stacked_qkv(block)
        if stacked is None:
            return None
        attention = block.attn
        if isinstance(block, EvaBlock):
            scale_1, scale_2 = _scaled_by(block.gamma_1), _scaled_by(block.gamma_2)
        else:
            scale_1, scale_2 = block.ls1, block.ls2
        return BlockParts(
            norm=block.norm1,
            qkv_weight=stacked[0],
            qkv_bias=stacked[1],
            num_heads=attention.num_heads,
            head_norms=(attention.q_norm, attention.k_norm),
            after_attention=lambda x: scale_1(attention.proj(attention.norm(x))),
            mlp=lambda x: scale_2(block.mlp(block.norm2(x))),
            rotate=None if rotation is None else lambda x: _rotate(attention, x, rotation),
            is_all=_is_plain(block),
        )

    def reads_first_token(self) -> bool:
        """Return whether the class token is all that is pooled."""
        is_distilled = isinstance(self.trunk, VisionTransformerDistilled)
        return _reads_prefix(self.trunk) and not is_distilled

    def read_out(self, x: Tensor, key_mask: Tensor | None) -> Any:
        """Pool the valid tokens (B, T, D) and project them."""
        trunk = self.trunk
        x = trunk.norm(x)
        if key_mask is None or _reads_prefix(trunk):
            return self.head(trunk.forward_head(x))
        pooled = _pool(trunk, x, key_mask)
        return self.head(trunk.head(trunk.head_drop(trunk.fc_norm(pooled))))

    def feature_attention(self, x: Tensor, rotations: Tensor | None = None) -> Tensor:
        """Return the attention of the class token, or of the query that pools, shape (B, T)."""
        if self.trunk.attn_pool is None:
            return self.class_token_attention(x, rotations)
        for block, rotation in self.turned_blocks(rotations):
            x = self.run_block(block, x, None, rotation)
        pool: AttentionPoolLatent = self.trunk.attn_pool
        x = _pooled_tokens(self.trunk, self.trunk.norm(x))
        # The first latent query is the one whose output timm's "token" pooling takes.
        query = pool.q(pool.latent[:, :1].expand(len(x), -1, -1))
        key = pool.kv(x).chunk(2, dim=-1)[0]
        query, key = (part.unflatten(-1, (pool.num_heads, -1)) for part in (query, key))
        return query_attention(pool.q_norm(query), pool.k_norm(key))

    def _num_placed_prefix(self) -> int:
        """Return how many prefix tokens have positions of their own."""
        trunk = self.trunk
        return 0 if trunk.no_embed_class or trunk.pos_embed is None else trunk.num_prefix_tokens


def _stacked_qkv(block: Any) -> tuple[Tensor, Tensor | None] | None:
    """Return weight and bias of a block's projection to queries, keys and values, stacked.

    None for blocks of another kind, where the weights do not say all that the projection does, and
    where groups of heads share keys.
    """
    attention: Any = getattr(block, "attn", None)
    is_eva = is_exactly(block, EvaBlock)
    kinds = (EvaAttention, AttentionRope) if is_eva else (Attention,)
    if not (is_eva or is_exactly(block, Block)) or not has_plain_weights(attention, *kinds):
        return None
    parts = _projections(attention)
    if not all(has_plain_weights(part, nn.Linear) for part in parts):
        return None
    if len(parts) == 1:
        bias = attention.qkv.bias
        if getattr(attention, "q_bias", None) is not None:
            bias = torch.cat([attention.q_bias, attention.k_bias, attention.v_bias])
        return attention.qkv.weight, bias
    if len({len(part.weight) for part in parts}) > 1:
        return None
    # EVA's keys have no bias.
    zeros = torch.zeros_like(attention.q_proj.weight[:, 0])
    biases = [zeros if part.bias is None else part.bias for part in parts]
    return torch.cat([part.weight for part in parts]), torch.cat(biases)


def _projections(attention: Any) -> list[Any]:
    """Return what makes queries, keys and values: one module, or one for each."""
    if attention.qkv is not None:
        return [attention.qkv]
    return [attention.q_proj, attention.k_proj, attention.v_proj]


def _is_plain(block: Any) -> bool:
    """Return whether a block has nothing but what `BlockParts` knows; no dropout, gate or hook."""
    attention = block.attn
    # Blocks hand the rate of `proj_drop` on to their MLP.
    return (
        getattr(attention, "gate", None) is None  # not in every version
        and attention.attn_drop.p == attention.proj_drop.p == 0
        and isinstance(block.drop_path1, nn.Identity)
        and isinstance(block.drop_path2, nn.Identity)
        and not any(map(has_hooks, (attention, *_projections(attention))))
    )


def _scaled_by(scale: Tensor | None) -> Callable[[Tensor], Tensor]:
    return lambda x: x if scale is None else scale * x


def _rotate(attention: Any, x: Tensor, rotation: Tensor) -> Tensor:
    """Turn queries or keys by rotations that broadcast against them."""
    half = getattr(attention, "rotate_half", False)  # not in every version
    # Early versions take no such argument, and have no other layout.
    options = {"half": True} if half else {}
    return apply_rot_embed_cat(x, rotation, **options).to(x.dtype)


def _reads_prefix(trunk: Any) -> bool:
    """Return whether the feature is made of the class token, and of the distilled one, alone."""
    if isinstance(trunk, VisionTransformerDistilled):
        return True
    return trunk.attn_pool is None and trunk.global_pool == "token"


def _pooled_tokens(trunk: Any, x: Tensor) -> Tensor:
    # Eva's query reads the prefix, and its means leave it out.
    is_prefix_read = getattr(trunk, "pool_include_prefix", trunk.attn_pool is not None)
    return x if is_prefix_read else x[:, trunk.num_prefix_tokens :]


def _pool(trunk: Any, x: Tensor, key_mask: Tensor) -> Tensor:
    """Pool as the trunk does, over the valid tokens alone."""
    if trunk.attn_pool is not None:
        pool_mask = _pooled_tokens(trunk, key_mask[:, 0, 0])[:, None, None, :]
        return trunk.attn_pool(_pooled_tokens(trunk, x), attn_mask=logit_mask(pool_mask, x.dtype))
    valid_BT = key_mask[:, 0, 0]
    if not trunk.global_pool:
        return torch.where(valid_BT[:, :, None], x, 0.0)
    x, valid_BT = _pooled_tokens(trunk, x), _pooled_tokens(trunk, valid_BT)
    mean = valid_mean(x, valid_BT)
    if trunk.global_pool == "avg":
        return mean
    highest = torch.where(valid_BT[:, :, None], x, float("-inf")).amax(dim=1)
    return highest if trunk.global_pool == "max" else 0.5 * (highest + mean)
