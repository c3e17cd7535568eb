"""The tokens of images that keep different numbers of patches, and attention over them.

Images are padded to the longest, and padding is left out by a key mask; or their tokens run as one
sequence without padding, each attending to those of its own image. What runs per token then runs
on valid tokens alone: attention on CUDA by the flash kernel for sequences of different lengths
(`torch.nn.attention.varlen`), on the CPU one image after the other.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from torch.nn import functional

try:
    from torch.nn.attention.varlen import varlen_attn
except ImportError:  # older releases of torch
    varlen_attn = None  # type: ignore[assignment]

HeadNorm = Callable[[Tensor], Tensor]

# What the flash kernel takes.
_KERNEL_DTYPES = (torch.float16, torch.bfloat16)
_MAX_HEAD_WIDTH = 256
_HEAD_WIDTH_STEP = 8

# Below this many numbers per image and layer, calls per image cost a CPU what padding does.
_MIN_IMAGE_SIZE = 8192


@dataclass(frozen=True)
class PaddedTokens:
    """Tokens (B, T, D) of which some may be padding; a layout for `BlockParts`.

    Attributes:
        key_mask: True where a token may be attended to, or what is added to its logits, shape
            (B, 1, 1, T); None for all.
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


def logit_mask(key_mask: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a boolean mask as what is added to logits, for attention that adds any mask.

    Args:
        key_mask: True where a token may be attended to, of any shape.
        dtype: Of the activations.
    """
    return torch.zeros_like(key_mask, dtype=dtype).masked_fill(~key_mask, float("-inf"))


def packs_by_default(x: Tensor) -> bool:
    """Return whether packing is measured to be faster: on the CPU, unless tokens are few and small.

    Args:
        x: Padded tokens in front of the blocks, shape (B, T, D).
    """
    return x.device.type == "cpu" and x.shape[1] * x.shape[2] >= _MIN_IMAGE_SIZE


def can_pack(x: Tensor, *, head_width: int) -> bool:
    """Return whether there is a quick way to run attention over packed tokens.

    On CUDA it is the kernel, which takes half precision (the tokens' own or autocast's) on GPUs
    since Ampere. On the CPU it needs the lengths on the host, for which a compiled model would
    compile anew in every step.

    Args:
        x: Tokens in front of the blocks.
        head_width: Width of an attention head.
    """
    kind = x.device.type
    if kind == "cpu":
        return not torch.compiler.is_compiling()
    if kind != "cuda":
        return False
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
    is_head_taken = head_width <= _MAX_HEAD_WIDTH and head_width % _HEAD_WIDTH_STEP == 0
    return dtype in _KERNEL_DTYPES and is_head_taken and _has_kernel(x.device)


@dataclass(frozen=True)
class PackedTokens:
    """Where each image's tokens stand in the sequence of all.

    Attributes:
        slots: Place of each token among the B * T slots of padded images, ascending. Shape
            (total,), int64.
        offsets: Where each image starts, and the total at the end. Shape (B + 1,), int32.
        max_length: Most tokens that an image may have, T.
    """

    slots: Tensor
    offsets: Tensor
    max_length: int

    @classmethod
    def of(cls, valid: Tensor) -> PackedTokens:
        """Return the layout of images whose valid tokens are given.

        The number of valid tokens is read on the host.

        Args:
            valid: True where a slot holds a token, False where it is padding. Shape (B, T); each
                image has a token.
        """
        ends_B = valid.sum(dim=1).cumsum(dim=0)
        return cls(
            slots=valid.flatten().nonzero()[:, 0],
            offsets=functional.pad(ends_B, (1, 0)).int(),
            max_length=valid.shape[1],
        )

    @property
    def num_images(self) -> int:
        """Number of images, B."""
        return len(self.offsets) - 1

    @cached_property
    def lengths(self) -> list[int]:
        """Tokens of each image; read on the host."""
        return self.offsets.diff().tolist()

    def pack(self, x: Tensor) -> Tensor:
        """Turn padded tokens (B, T, D) into packed ones, (total, D)."""
        return x.flatten(0, 1).index_select(0, self.slots)

    def unpack(self, x: Tensor) -> Tensor:
        """Turn packed tokens (total, D) into padded ones, (B, T, D), zero in padding slots."""
        padded = x.new_zeros(self.num_images * self.max_length, x.shape[1])
        return padded.index_copy(0, self.slots, x).unflatten(0, (self.num_images, -1))

    def first_tokens(self, x: Tensor) -> Tensor:
        """Return the first token of each image, (B, D), of packed ones, (total, D)."""
        return x.index_select(0, self.offsets[:-1])

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Let each query attend to the keys of its image.

        Args:
            query: Of every token, (total, H, W / H), or of each image's first, (B, H, W / H).
            key: Shape (total, H, W / H).
            value: Shape (total, H, W / H).

        Returns:
            What the queries read, shaped as they are, in the dtype of the values.
        """
        is_first_alone = len(query) < len(key)
        if _runs_kernel(value):
            offsets, max_length = self.offsets, self.max_length
            if is_first_alone:
                offsets, max_length = torch.arange(len(offsets), device=offsets.device).int(), 1
            # Autocast does not know this operation, and head norms put out float32.
            query, key = query.to(value.dtype), key.to(value.dtype)
            attended = varlen_attn(
                query, key, value, offsets, self.offsets, max_length, self.max_length
            )
            assert isinstance(attended, Tensor)
            return attended
        queries = query[:, None] if is_first_alone else query.split(self.lengths)
        images = zip(queries, key.split(self.lengths), value.split(self.lengths), strict=True)
        alone = PaddedTokens(None)
        return torch.cat([alone.attend(*(part[None] for part in image))[0] for image in images])


def _has_kernel(device: torch.device) -> bool:
    return varlen_attn is not None and torch.cuda.get_device_properties(device).major >= 8


def _runs_kernel(value: Tensor) -> bool:
    return value.is_cuda


TokenLayout = PaddedTokens | PackedTokens


# ------------------------------------------------------------------------------------------------
# A transformer block taken apart where attention stands
# ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class BlockParts:
    """What a block that normalizes its input is made of.

    Two savings need its parts. Packed tokens meet only those of their own image. And the last block
    of a tower whose feature is its class token's owes the patches keys and values alone: nothing
    reads what it makes of them, which is five sixths of its work.

    Attributes:
        norm: Normalizes tokens in front of attention.
        qkv_weight: Projection to queries, keys and values, stacked. Shape (3 W, D).
        qkv_bias: Its bias, shape (3 W,).
        num_heads: Heads H that W divides into.
        head_norms: Normalize queries and keys per head; None leaves them.
        after_attention: Turns what attention read, (..., W), into what is added, (..., D).
        mlp: Turns tokens (..., D) into what is added to them then.
        rotate: Turns normalized queries or keys of all tokens, (..., H, W / H), by their places,
            and leaves the first token's; None leaves all.
        is_all: Whether the block is no more than that, and draws no random numbers, so that `run`
            may take its place.
    """

    norm: Callable[[Tensor], Tensor]
    qkv_weight: Tensor
    qkv_bias: Tensor | None
    num_heads: int
    head_norms: tuple[HeadNorm, HeadNorm] | None
    after_attention: Callable[[Tensor], Tensor]
    mlp: Callable[[Tensor], Tensor]
    rotate: Callable[[Tensor], Tensor] | None = None
    is_all: bool = True

    @property
    def head_width(self) -> int:
        """Width of an attention head."""
        return len(self.qkv_weight) // 3 // self.num_heads

    def run(self, x: Tensor, layout: TokenLayout) -> Tensor:
        """Run the block over tokens (..., D) of some layout."""
        query, key, value = self._project(self.norm(x), 0, 3)
        return self._finish(x, self._place(query, 0), self._place(key, 1), value, layout)

    def run_for_first_tokens(self, x: Tensor, layout: TokenLayout) -> Tensor:
        """Return what the block makes of each image's first token; see `run`."""
        normed, first_x = self.norm(x), layout.first_tokens(x)
        query = self._query_of_first(layout.first_tokens(normed))
        key, value = self._project(normed, 1, 3)
        return self._finish(first_x, query, self._place(key, 1), value, layout)

    def first_row(self, x: Tensor) -> Tensor:
        """Return the attention of the first of tokens (B, T, D) to all, mean over heads, (B, T)."""
        normed = self.norm(x)
        (key,) = self._project(normed, 1, 2)
        return query_attention(self._query_of_first(normed[:, :1]), self._place(key, 1))

    def _query_of_first(self, x: Tensor) -> Tensor:
        (query,) = self._project(x, 0, 1)
        return query if self.head_norms is None else self.head_norms[0](query)

    def _project(self, x: Tensor, start: int, stop: int) -> tuple[Tensor, ...]:
        """Project to queries (0), keys (1) and values (2), each of shape (..., H, W / H)."""
        width = len(self.qkv_weight) // 3
        rows = slice(start * width, stop * width)
        bias = None if self.qkv_bias is None else self.qkv_bias[rows]
        stacked = functional.linear(x, self.qkv_weight[rows], bias)
        return stacked.unflatten(-1, (stop - start, self.num_heads, -1)).unbind(-3)

    def _place(self, x: Tensor, part: int) -> Tensor:
        """Normalize queries (0) or keys (1) of all tokens per head, and turn them."""
        if self.head_norms is not None:
            x = self.head_norms[part](x)
        return x if self.rotate is None else self.rotate(x)

    def _finish(
        self,
        x: Tensor,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        layout: TokenLayout,
    ) -> Tensor:
        x = x + self.after_attention(layout.attend(query, key, value).flatten(-2))
        return x + self.mlp(x)


def query_attention(query: Tensor, key: Tensor) -> Tensor:
    """Return the attention of one query to all keys, mean over heads.

    Args:
        query: Shape (B, 1, H, W / H).
        key: Shape (B, T, H, W / H).

    Returns:
        Attention of shape (B, T), float32; rows sum to 1.
    """
    query_BH1W, key_BHWT = query.transpose(1, 2), key.permute(0, 2, 3, 1)
    logits_BH1T = torch.matmul(query_BH1W, key_BHWT) * query.shape[-1] ** -0.5
    return logits_BH1T.float().softmax(dim=-1).mean(dim=1)[:, 0]


# ------------------------------------------------------------------------------------------------
# The attention bias of the released CLIP-PGS code, reproduced with its errors
#
# That code (snapshot cdeb109 of November 2024) meant to keep patches that resemble a candidate from
# attending and from being attended to. What it computes is a bias of +1 on the attention logits of
# all other pairs, with heads and images interleaved in the wrong order, so that an image is given
# the bias of another one. It is an option of `pgs-released` alone, off by default.
# ------------------------------------------------------------------------------------------------


def released_attention_bias(similar: Tensor, *, num_heads: int, dtype: torch.dtype) -> Tensor:
    """Return what the released code adds to the attention logits of every block.

    Args:
        similar: True where a kept patch resembles a candidate. Shape (B, K).
        num_heads: Heads H of a block.
        dtype: Of the activations.

    Returns:
        Bias of shape (B, H, 1 + K, 1 + K), 1 or 0: head h of image b is given the pairs of image
        (b * H + h) % B of which neither token is similar; the class token never is.
    """
    similar_BT = functional.pad(similar, (1, 0), value=False)
    is_plain_BTT = ~(similar_BT[:, :, None] | similar_BT[:, None, :])
    batch_size = len(similar)
    image = torch.arange(batch_size * num_heads, device=similar.device) % batch_size
    return is_plain_BTT[image].unflatten(0, (batch_size, num_heads)).to(dtype)
