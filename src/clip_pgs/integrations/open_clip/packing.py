"""Tokens of images that keep different numbers of patches, in one sequence without padding.

What runs per token then runs on valid tokens alone. Attention runs inside each image: on CUDA by
the flash kernel for sequences of different lengths (`torch.nn.attention.varlen`), on the CPU one
image after the other.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.attention.varlen import varlen_attn

# What the flash kernel takes.
_KERNEL_DTYPES = (torch.float16, torch.bfloat16)
_MAX_HEAD_WIDTH = 256
_HEAD_WIDTH_STEP = 8

# Below this many numbers per image and layer, calls per image cost a CPU what padding does.
_MIN_IMAGE_SIZE = 8192


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
        num_queries = 1 if is_first_alone else self.lengths
        images = zip(
            query.split(num_queries),
            key.split(self.lengths),
            value.split(self.lengths),
            strict=True,
        )
        return torch.cat([_attend_one(*image) for image in images])


def _has_kernel(device: torch.device) -> bool:
    return torch.cuda.get_device_properties(device).major >= 8


def _runs_kernel(value: Tensor) -> bool:
    return value.is_cuda


def _attend_one(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Attend inside one image: (Q, H, W / H), (L, H, W / H), the same -> (Q, H, W / H)."""
    query, key, value = (part.transpose(0, 1)[None] for part in (query, key, value))
    return functional.scaled_dot_product_attention(query, key, value)[0].transpose(0, 1)
