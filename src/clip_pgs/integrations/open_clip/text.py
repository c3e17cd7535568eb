"""Captions shorter than the text tower's context, at the cost of their own length."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

from open_clip.model import CLIP, CustomTextCLIP
from open_clip.transformer import TextTransformer, Transformer, text_global_pool
from torch import Tensor, nn
from torch.nn import functional

from clip_pgs.integrations.open_clip.captions import GROUP_SHARES, CaptionGroups, CaptionTrimmer
from clip_pgs.integrations.open_clip.towers import unwrap

Model = TypeVar("Model", bound=nn.Module)

# Pooling that reads the end-of-text token alone, wherever it stands.
_END_OF_TEXT_POOLS = ("argmax", "eos")


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
        None where trimming would change features (`is_text_trimming_lossless`).
    """
    if not is_text_trimming_lossless(model):
        return None
    plain: Any = unwrap(model)
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
