"""Masking inside Hugging Face models (https://github.com/huggingface/transformers).

`apply_masking` takes CLIP, SigLIP, SigLIP 2 (also NaFlex) and Chinese CLIP: whole models, vision
models, and others that hold one as `vision_model`. open_clip is not needed. A masked vision model
goes by the names of its plain class, by which transformers saves it and finds its records.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import transformers
from torch import Tensor, nn

if tuple(int(part) for part in transformers.__version__.split(".")[:2]) < (5, 6):
    # Before, the vision models wrapped another class, with other arguments in its blocks.
    raise ImportError(
        "clip_pgs.integrations.transformers needs transformers 5.6 or newer, "
        f"got {transformers.__version__}"
    )

from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.chinese_clip import modeling_chinese_clip
from transformers.models.clip import modeling_clip
from transformers.models.siglip import modeling_siglip
from transformers.models.siglip2 import modeling_siglip2
from transformers.utils.output_capturing import capture_outputs

from clip_pgs.integrations import apply
from clip_pgs.integrations.apply import *  # noqa: F403
from clip_pgs.integrations.masked_tower import MaskedTower, PatchGrid, unwrap
from clip_pgs.integrations.varlen_tokens import logit_mask, query_attention
from clip_pgs.masking import MaskingStrategy, PatchInputs, PatchSelection
from clip_pgs.masking.merge import Merge

__all__ = apply.__all__


class MaskedVisionModel(MaskedTower):
    """A vision model of Hugging Face that sees a selection of its patches.

    Blocks run whole, as they are, so that adapters inside them and their own gradient checkpointing
    stay. The output has the tokens of the kept patches, zero in padding slots.
    """

    supported = "CLIP, SigLIP, SigLIP 2 and Chinese CLIP of transformers"
    takes_smaller_images = False
    casts_images = True
    # Of the plain class.
    config: Any
    embeddings: Any
    encoder: Any
    post_layernorm: Any

    def forward(  # type: ignore[override]
        self, pixel_values: Tensor, interpolate_pos_encoding: bool = False, **options: Any
    ) -> Any:
        """Encode images.

        Args:
            pixel_values: Images of shape (B, 3, H, W).
            interpolate_pos_encoding: Must be False where patches are dropped.
            **options: As the plain model takes them.

        Raises:
            ValueError: If images are of another size than the model's and patches are dropped.
        """
        if not self.masking.is_active(training=self.training):
            options["interpolate_pos_encoding"] = interpolate_pos_encoding
            return super(MaskedTower, self).forward(pixel_values, **options)  # type: ignore[misc]
        side = self.config.image_size
        if interpolate_pos_encoding or tuple(pixel_values.shape[-2:]) != (side, side):
            raise ValueError(
                f"a masked {type(self).__name__} takes images of {side} x {side} without "
                f"interpolate_pos_encoding, got {tuple(pixel_values.shape[-2:])}"
            )
        return self._encode(pixel_values, **options)

    @capture_outputs(tie_last_hidden_states=False)
    def _encode(self, pixel_values: Tensor, **_: Any) -> BaseModelOutputWithPooling:
        return MaskedTower.forward(self, pixel_values)

    def __reduce__(self) -> tuple[Any, ...]:
        """Let pickle, which finds the plain class by these names, make a masked one again."""
        return _new, (type(self).plain_class,), self.__dict__

    @staticmethod
    def refusal(tower: Any) -> str | None:
        """Return why a vision model cannot be masked, None where it can."""
        if tower.config._attn_implementation == "flex_attention":
            return (
                "the vision model's attention is flex_attention, which takes no mask of padding "
                'here; build it with attn_implementation="sdpa"'
            )
        return None

    @staticmethod
    def check_model(model: nn.Module, strategy: MaskingStrategy, merge: Merge | None) -> None:
        """Refuse padding where a classifier would average it, and counts for flash attention."""
        plain: Any = unwrap(model)
        name = type(plain).__name__
        pads = strategy.keeps_different_counts() or merge is not None
        if name.endswith("ForImageClassification") and pads:
            raise ValueError(
                f"{name} averages all tokens, also the padding of merge and of different counts, "
                "which an adaptive pgs and cluster keep; take a masking that keeps as many "
                "patches of every image and leave out merge"
            )
        if merge is not None and merge.counts and "flash" in plain.config._attn_implementation:
            raise ValueError("merge_counts needs eager or sdpa attention, got flash attention")

    @staticmethod
    def patch_grid(tower: Any) -> PatchGrid:
        """Return how a vision model cuts its images."""
        patch = tower.config.patch_size
        side = tower.config.image_size // patch
        return PatchGrid((side, side), (patch, patch))

    @staticmethod
    def patch_weight(tower: Any) -> Tensor:
        """Return the weight that meets the pixels first."""
        return tower.embeddings.patch_embedding.weight

    def embed_patches(self, pixels: Tensor) -> Tensor:
        """Return patch embeddings without positions, shape (B, N, D)."""
        embed = self.embeddings.patch_embedding
        return embed(pixels.to(embed.weight.dtype)).flatten(2).transpose(1, 2)

    def blocks(self) -> Sequence[nn.Module]:
        """Return the transformer's blocks, in order."""
        return self.encoder.layers

    def run_block(
        self,
        block: nn.Module,
        x: Tensor,
        attn_mask: Tensor | None,
        rotation: Tensor | None = None,
    ) -> Tensor:
        """Run a block over tokens (B, T, D), leaving out keys that are padding."""
        if attn_mask is not None and attn_mask.dtype == torch.bool:
            attention = self.config._attn_implementation
            if "flash" in attention:
                attn_mask = attn_mask[:, 0, 0]
            elif attention != "sdpa":
                attn_mask = logit_mask(attn_mask, x.dtype)
        return block(x, attn_mask)

    def first_row(self, block: Any, x: Tensor, rotation: Tensor | None) -> Tensor:
        """Return a block's attention of the first token to all, mean over heads, (B, T)."""
        attention, x = block.self_attn, block.layer_norm1(x)
        heads = (attention.num_heads, -1)
        query, key = attention.q_proj(x[:, :1]), attention.k_proj(x)
        return query_attention(query.unflatten(-1, heads), key.unflatten(-1, heads))


class MaskedClassTokenModel(MaskedVisionModel):
    """A vision model whose class token is the image feature: CLIP's and Chinese CLIP's."""

    pre_layrnorm: Any

    def patch_positions(self, dtype: torch.dtype) -> Tensor:
        """Return the patches' position embeddings, shape (N, D); they are added uncast."""
        return self.embeddings.position_embedding.weight[1:]

    def add_prefix(self, patches: Tensor) -> Tensor:
        """Put the class token in front, shape (B, 1 + K, D)."""
        embeddings = self.embeddings
        class_token = embeddings.class_embedding + embeddings.position_embedding.weight[0]
        x = torch.cat([class_token.expand(len(patches), 1, -1), patches], dim=1)
        return self.pre_layrnorm(x)

    def read_out(self, x: Tensor, key_mask: Tensor | None) -> BaseModelOutputWithPooling:
        """Return the tokens (B, T, D), and the class token after its norm, (B, D)."""
        pooled = self.post_layernorm(x[:, 0])
        return BaseModelOutputWithPooling(_without_padding(x, key_mask), pooled)

    def feature_attention(self, x: Tensor, rotations: Tensor | None = None) -> Tensor:
        """Return the attention of the class token, shape (B, T)."""
        return self.class_token_attention(x)


class MaskedQueryModel(MaskedVisionModel):
    """A vision model whose tokens a query pools, if anything does: SigLIP's."""

    use_head: bool
    head: Any

    @staticmethod
    def attention_refusal(tower: Any) -> str | None:
        """Return why no query's attention makes the feature, None where one does."""
        return None if tower.use_head else "the vision model has no head that pools its tokens"

    def patch_positions(self, dtype: torch.dtype) -> Tensor:
        """Return the patches' position embeddings, shape (N, D); they are added uncast."""
        return self.embeddings.position_embedding.weight

    def add_prefix(self, patches: Tensor) -> Tensor:
        """Return the patches: nothing stands in front of them."""
        return patches

    def read_out(self, x: Tensor, key_mask: Tensor | None) -> BaseModelOutputWithPooling:
        """Return the normalized tokens (B, T, D), and what the query pools of them, (B, D)."""
        x = self.post_layernorm(x)
        pooled = None
        if self.use_head and key_mask is None:
            pooled = self.head(x)
        elif self.use_head and key_mask is not None:
            padding_BT = ~key_mask[:, 0, 0]
            query = self.head.probe.expand(len(x), -1, -1)
            attended = self.head.attention(
                query, x, x, key_padding_mask=padding_BT, need_weights=False
            )[0]
            pooled = (attended + self.head.mlp(self.head.layernorm(attended)))[:, 0]
        return BaseModelOutputWithPooling(_without_padding(x, key_mask), pooled)

    def feature_attention(self, x: Tensor, rotations: Tensor | None = None) -> Tensor:
        """Return the attention of the query that pools, shape (B, T)."""
        for block in self.blocks():
            x = self.run_block(block, x, None)
        x = self.post_layernorm(x)
        query = self.head.probe.expand(len(x), -1, -1)
        return self.head.attention(query, x, x, need_weights=True)[1][:, 0].float()


class MaskedNaflexModel(MaskedQueryModel):
    """SigLIP 2's vision model, whose images have grids of their own (NaFlex).

    A strategy sees the images of one grid at a time, and a mask ratio counts for each image's own
    patches. Noise has the shape (B, N) of the padded patches.
    """

    def forward(  # type: ignore[override]
        self,
        pixel_values: Tensor,
        pixel_attention_mask: Tensor | None,
        spatial_shapes: Tensor,
        **options: Any,
    ) -> Any:
        """Encode images.

        Args:
            pixel_values: Pixels of patches, padded at the end, (B, N, P * P * 3).
            pixel_attention_mask: True where a patch is not padding, (B, N).
            spatial_shapes: Patches per column and per row of each image, (B, 2).
            **options: As the plain model takes them.
        """
        if not self.masking.is_active(training=self.training):
            return super(MaskedTower, self).forward(  # type: ignore[misc]
                pixel_values, pixel_attention_mask, spatial_shapes, **options
            )
        return self._encode_naflex(pixel_values, spatial_shapes, **options)

    @capture_outputs(tie_last_hidden_states=False)
    def _encode_naflex(
        self, pixel_values: Tensor, spatial_shapes: Tensor, **_: Any
    ) -> BaseModelOutputWithPooling:
        embeddings = self.embeddings
        tokens_BND = embeddings.patch_embedding(pixel_values.to(self.patch_weight(self).dtype))
        selection = self.masking.forced_selection
        if selection is None:
            selection = self._select(pixel_values, tokens_BND, spatial_shapes)
        self.masking.last_selection = selection
        side = embeddings.position_embedding_size
        positions_BND = embeddings.resize_positional_embeddings(
            embeddings.position_embedding.weight.reshape(side, side, -1),
            spatial_shapes,
            max_length=pixel_values.shape[1],
        )
        return self.read_out(*self.run_kept(tokens_BND + positions_BND, selection))

    @torch.no_grad()
    def _select(self, pixels: Tensor, tokens: Tensor, spatial_shapes: Tensor) -> PatchSelection:
        """Let the strategy choose among the patches of each image, the images of a grid at a time.

        The grids are read on the host, as the plain model's checks of them are.
        """
        rows_of: dict[tuple[int, int], list[int]] = {}
        for row, (height, width) in enumerate(spatial_shapes.tolist()):
            rows_of.setdefault((height, width), []).append(row)
        masking, side = self.masking, self.config.patch_size
        found: list[PatchSelection] = []
        for (height, width), rows in rows_of.items():
            num_patches = height * width
            images = pixels[rows, :num_patches].unflatten(2, (side, side, -1))
            images = images.unflatten(1, (height, width)).permute(0, 5, 1, 3, 2, 4)
            noise = None if masking.noise is None else masking.noise[rows, :num_patches]
            inputs = PatchInputs(
                images.flatten(4, 5).flatten(2, 3),
                side,
                tokens=tokens[rows, :num_patches],
                progress=masking.progress,
                noise=noise,
            )
            found.append(masking.strategy(inputs))
        if len(found) == 1:
            return found[0]
        order = [row for rows in rows_of.values() for row in rows]
        place_B = torch.tensor(order, device=pixels.device).argsort()
        longest = max(each.index.shape[1] for each in found)
        index_BK = torch.cat([_padded(each.index, longest) for each in found])[place_B]
        slot_K = torch.arange(longest, device=pixels.device)
        counts_B = torch.cat([each.kept_counts() for each in found])[place_B]
        return PatchSelection(index_BK, slot_K < counts_B[:, None])

    @staticmethod
    def check_model(model: nn.Module, strategy: MaskingStrategy, merge: Merge | None) -> None:
        """Refuse what needs one grid for all images, and a classifier that counts the patches."""
        name = type(unwrap(model)).__name__
        if name.endswith("ForImageClassification"):
            raise ValueError(
                f"{name} averages tokens by the mask of all patches; masking supports Siglip2Model "
                "and Siglip2VisionModel"
            )
        what = "merge" if merge is not None else ""
        if strategy.needs_calibration(0.0):
            what = f"{type(strategy).__name__} without a threshold of its own"
        if what:
            raise ValueError(
                f"{what} needs one grid for all images, and those of {name} have grids of their own"
            )

    @staticmethod
    def attention_refusal(tower: Any) -> str | None:
        """Return why there is no teacher: it would need one grid for all images."""
        return "images of the vision model have grids of their own"

    @staticmethod
    def patch_grid(tower: Any) -> PatchGrid:
        """Return the grid of the positions, which are resized to that of each image."""
        side = tower.embeddings.position_embedding_size
        return PatchGrid((side, side), (tower.config.patch_size,) * 2)


def _new(plain: type[nn.Module]) -> Any:
    """Return an empty vision model of the kind that masks a plain class."""
    (kind,) = MaskedTower.kinds[plain]
    return kind.__new__(kind)


def _without_padding(x: Tensor, key_mask: Tensor | None) -> Tensor:
    return x if key_mask is None else torch.where(key_mask[:, 0, 0, :, None], x, 0.0)


def _padded(index: Tensor, length: int) -> Tensor:
    """Repeat the last column until there are `length`."""
    return torch.cat([index, index[:, -1:].expand(-1, length - index.shape[1])], dim=1)


def _enter(base: type[MaskedVisionModel], module: Any, name: str) -> None:
    """Enter the kind of a vision model under that model's names."""
    plain = getattr(module, f"{name}Model")
    names = {key: getattr(plain, key) for key in ("__module__", "__qualname__", "__doc__")}
    type(plain.__name__, (base, plain), {"plain_class": plain, **names})


_enter(MaskedClassTokenModel, modeling_clip, "CLIPVision")
_enter(MaskedClassTokenModel, modeling_chinese_clip, "ChineseCLIPVision")
_enter(MaskedQueryModel, modeling_siglip, "SiglipVision")
_enter(MaskedNaflexModel, modeling_siglip2, "Siglip2Vision")
