"""Captions at the cost of their own lengths instead of the text tower's context.

In a causal text tower that pools at the end-of-text token, nothing behind that token reaches the
features. So a batch needs no more columns than its longest caption has tokens; and since one
caption in a few hundred fills the context on the web, captions of about one length run together.
The rows of the batch keep their places.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import torch
from open_clip import CoCa
from open_clip.model import CLIP, CustomTextCLIP
from open_clip.transformer import TextTransformer, Transformer, text_global_pool
from torch import Tensor, nn
from torch.nn import functional

from clip_pgs.integrations.masked_tower import unwrap

Model = TypeVar("Model", bound=nn.Module)

# Pooling that reads the end-of-text token alone, wherever it stands.
_END_OF_TEXT_POOLS = ("argmax", "eos")

# Few lengths, so that a compiled model sees few shapes. The context itself is always one more.
LENGTHS = (8, 16, 24, 32, 40, 48, 64)

# How a batch divides, from the shortest captions to the longest. The parts depend on its size
# alone, again for the compiler's sake.
GROUP_SHARES = (0.5, 0.375, 0.125)

_MIN_GROUPED = 16  # captions, below which parts would be too small to pay


def allow_short_text(model: Model) -> Model:
    """Let the text tower take token tensors shorter than its context length.

    OpenCLIP's `CLIP` adds all positions and masks the whole context; after this it takes the first
    T of both. A tower that is causal and pools at the end-of-text token then gives the features
    of the padded caption (`is_text_trimming_lossless`), and `CaptionGroups` in place of token ids
    are encoded group by group. Weights, state dict and the features of
    full-length captions stay as they are. Hugging Face towers and CoCa's, which appends a class
    token to whatever it is given, take short captions by themselves.

    Args:
        model: An OpenCLIP model, also wrapped; changed in place. A second call changes nothing.

    Returns:
        The same model.
    """
    plain = unwrap(model)
    if type(plain) is CLIP:
        plain.__class__ = ShortTextCLIP
    text: Any = getattr(plain, "text", None)
    if type(text) is TextTransformer and type(text.transformer) is Transformer:
        text.transformer.__class__ = ShortTextTransformer
        if type(plain) is CustomTextCLIP:
            plain.__class__ = ShortTextCustomTextCLIP
    return model


def caption_trimmer(
    model: nn.Module, *, shares: Sequence[float] = GROUP_SHARES
) -> CaptionTrimmer | None:
    """Return what cuts captions to the tokens that reach a model's features.

    Args:
        model: An OpenCLIP model, also wrapped; `allow_short_text` lets it take what comes out.
        shares: See `CaptionTrimmer`.

    Returns:
        None where trimming would change features (`is_text_trimming_lossless`), and for CoCa,
        whose decoder takes the tokens of a batch as one tensor.
    """
    plain: Any = unwrap(model)
    if isinstance(plain, CoCa) or not is_text_trimming_lossless(model):
        return None
    if isinstance(plain, CLIP):
        return CaptionTrimmer(plain.text_pool_type, plain.text_eos_id, shares=shares)
    return CaptionTrimmer(plain.text.pool_type, plain.text.eos_id, shares=shares)


def is_text_trimming_lossless(model: nn.Module) -> bool:
    """Return whether padding behind the end-of-text token never reaches the text features.

    Args:
        model: An OpenCLIP model, also wrapped.

    Returns:
        True for a causal tower that pools at the end-of-text token; False for others, and where
        it is not known, as with Hugging Face towers.
    """
    model = unwrap(model)
    if isinstance(model, CLIP):
        return model.attn_mask is not None and model.text_pool_type in _END_OF_TEXT_POOLS
    text = getattr(model, "text", None)
    return (
        isinstance(text, TextTransformer)
        and text.attn_mask is not None
        and text.cls_emb is None
        and text.pool_type in _END_OF_TEXT_POOLS
    )


class ShortTextCLIP(CLIP):
    """A `CLIP` whose captions may be shorter than its context; never constructed."""

    def encode_text(self, text: Tensor | CaptionGroups, normalize: bool = False) -> Tensor:
        """Encode captions.

        Args:
            text: Token ids of shape (B, T), T up to the context length; or groups of them.
            normalize: Return features of length 1.

        Returns:
            Features of shape (B, D).
        """
        if isinstance(text, CaptionGroups):
            return text.encode(lambda tokens: self.encode_text(tokens, normalize))
        num_tokens = text.shape[1]
        dtype = self.transformer.get_cast_dtype()
        x = self.token_embedding(text).to(dtype)
        x = x + self.positional_embedding[:num_tokens].to(dtype)
        x = self.transformer(x, attn_mask=_short_mask(self.attn_mask, num_tokens))
        x = text_global_pool(
            self.ln_final(x), text, self.text_pool_type, eos_token_id=self.text_eos_id
        )
        if isinstance(self.text_projection, nn.Linear):
            x = self.text_projection(x)
        elif self.text_projection is not None:
            x = x @ self.text_projection
        return functional.normalize(x, dim=-1) if normalize else x


class ShortTextCustomTextCLIP(CustomTextCLIP):
    """A `CustomTextCLIP` that also takes captions in groups; never constructed."""

    def encode_text(self, text: Tensor | CaptionGroups, normalize: bool = False) -> Tensor:
        """Encode captions; see `ShortTextCLIP`."""
        if isinstance(text, CaptionGroups):
            return text.encode(lambda tokens: self.encode_text(tokens, normalize))
        return super().encode_text(text, normalize)


class ShortTextTransformer(Transformer):
    """A text `Transformer` that cuts a causal mask to the tokens it gets; never constructed."""

    def forward(self, x: Tensor, attn_mask: Tensor | None = None) -> Tensor:
        """Run the blocks over tokens (B, T, D) with the first T rows and columns of a mask."""
        return super().forward(x, attn_mask=_short_mask(attn_mask, x.shape[1]))


def _short_mask(attn_mask: Tensor | None, num_tokens: int) -> Tensor | None:
    return None if attn_mask is None else attn_mask[..., :num_tokens, :num_tokens]


class CaptionGroups(NamedTuple):
    """The captions of a batch in groups of about one length; a model takes it as its text.

    A named tuple of tensors passes through DDP and `torch.compile` as a tensor does.

    Args:
        tokens: Token ids of each group, shape (B_g, T_g), the shortest captions first.
        order: Where each caption of the batch stands among those of all groups. Shape (B,), int64.
    """

    tokens: tuple[Tensor, ...]
    order: Tensor

    def to(self, device: torch.device, *, non_blocking: bool = False) -> CaptionGroups:
        """Return the groups on a device."""
        tokens = tuple(group.to(device, non_blocking=non_blocking) for group in self.tokens)
        return CaptionGroups(tokens, self.order.to(device, non_blocking=non_blocking))

    def encode(self, encode: Callable[[Tensor], Tensor]) -> Tensor:
        """Encode each group and return the features in the order of the batch.

        Args:
            encode: Turns token ids (B_g, T_g) into features (B_g, D).
        """
        return torch.cat([encode(group) for group in self.tokens]).index_select(0, self.order)

    def mean_length(self) -> float:
        """Return how many tokens the tower reads per caption."""
        return sum(group.numel() for group in self.tokens) / len(self.order)


@dataclass(frozen=True)
class CaptionTrimmer:
    """Drops what no feature depends on from a batch of captions.

    It looks at the token ids, so that it belongs in front of the copy to the device.

    Args:
        pool_type: How the text tower pools, "argmax" or "eos".
        end_of_text: The end-of-text token's id, for "eos".
        shares: Parts of a batch that run together, of the shortest captions first; they add up to
            1. `(1.0,)` cuts the whole batch to its longest caption.
        lengths: Numbers of tokens that captions are cut to, ascending.
    """

    pool_type: str
    end_of_text: int | None = None
    shares: Sequence[float] = GROUP_SHARES
    lengths: Sequence[int] = LENGTHS

    def __call__(self, texts: Tensor) -> Tensor | CaptionGroups:
        """Trim a batch.

        Args:
            texts: Token ids of shape (B, T), on the CPU.

        Returns:
            Token ids of shape (B, T') with T' <= T; or groups, where they are shorter on the whole.
        """
        needed_B = self.needed_tokens(texts)
        sizes = self._group_sizes(len(texts))
        by_length = needed_B.argsort(stable=True)
        rows = by_length.split(sizes)
        # The last of a group is its longest.
        widths = [self._width(int(needed_B[part[-1]]), texts.shape[1]) for part in rows]
        if len(set(widths)) == 1:
            return texts[:, : widths[-1]].contiguous()
        tokens = tuple(texts[part, :width] for part, width in zip(rows, widths, strict=True))
        return CaptionGroups(tokens, by_length.argsort())

    def needed_tokens(self, texts: Tensor) -> Tensor:
        """Return how many tokens of each caption reach its features, shape (B,), int64."""
        position_BT = torch.arange(texts.shape[1]).expand_as(texts)
        # OpenCLIP's own rule, which also says what becomes of a caption without an end.
        return 1 + text_global_pool(
            position_BT, texts, self.pool_type, eos_token_id=self.end_of_text
        )

    def _group_sizes(self, batch_size: int) -> list[int]:
        if batch_size < _MIN_GROUPED:
            return [batch_size]
        sizes = [round(share * batch_size) for share in self.shares[:-1]]
        return [size for size in (*sizes, batch_size - sum(sizes)) if size > 0]

    def _width(self, needed: int, context_length: int) -> int:
        return next((n for n in self.lengths if needed <= n <= context_length), context_length)
