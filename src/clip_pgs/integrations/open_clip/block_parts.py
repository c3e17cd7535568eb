"""A transformer block taken apart where attention stands.

Two savings need its parts. Packed tokens meet only those of their own image (`packing`). And the
last block of a tower whose feature is its class token's owes the patches keys and values alone:
nothing reads what it makes of them, which is five sixths of its work.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor
from torch.nn import functional


class TokenLayout(Protocol):
    """How the tokens of several images lie in one tensor."""

    def first_tokens(self, x: Tensor) -> Tensor:
        """Return the first token of each image."""

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Let each query attend to the valid keys of its image.

        Args:
            query: Of every token or of the first tokens, shape (..., H, W / H).
            key: Of every token.
            value: Of every token.

        Returns:
            What the queries read, shaped as they are.
        """


@dataclass(frozen=True)
class BlockParts:
    """A block that normalises its input and draws no random numbers.

    Attributes:
        norm: Normalises tokens in front of attention.
        qkv_weight: Projection to queries, keys and values, stacked. Shape (3 W, D).
        qkv_bias: Its bias, shape (3 W,).
        num_heads: Heads H that W divides into.
        head_norms: Normalise queries and keys per head; None leaves them.
        after_attention: Turns what attention read, (..., W), into what is added, (..., D).
        mlp: Turns tokens (..., D) into what is added to them then.
    """

    norm: Callable[[Tensor], Tensor]
    qkv_weight: Tensor
    qkv_bias: Tensor | None
    num_heads: int
    head_norms: tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]] | None
    after_attention: Callable[[Tensor], Tensor]
    mlp: Callable[[Tensor], Tensor]

    @property
    def head_width(self) -> int:
        """Width of an attention head."""
        return len(self.qkv_weight) // 3 // self.num_heads

    def run(self, x: Tensor, layout: TokenLayout) -> Tensor:
        """Run the block over tokens (..., D) of some layout."""
        query, key, value = self._project(self.norm(x), 0, 3)
        return self._finish(x, query, key, value, layout)

    def run_for_first_tokens(self, x: Tensor, layout: TokenLayout) -> Tensor:
        """Return what the block makes of each image's first token; see `run`."""
        normed = self.norm(x)
        (query,) = self._project(layout.first_tokens(normed), 0, 1)
        key, value = self._project(normed, 1, 3)
        return self._finish(layout.first_tokens(x), query, key, value, layout)

    def _project(self, x: Tensor, start: int, stop: int) -> tuple[Tensor, ...]:
        """Project to queries (0), keys (1) and values (2), each of shape (..., H, W / H)."""
        width = len(self.qkv_weight) // 3
        rows = slice(start * width, stop * width)
        bias = None if self.qkv_bias is None else self.qkv_bias[rows]
        stacked = functional.linear(x, self.qkv_weight[rows], bias)
        return stacked.unflatten(-1, (stop - start, self.num_heads, -1)).unbind(-3)

    def _finish(
        self, x: Tensor, query: Tensor, key: Tensor, value: Tensor, layout: TokenLayout
    ) -> Tensor:
        if self.head_norms is not None:
            query, key = self.head_norms[0](query), self.head_norms[1](key)
        x = x + self.after_attention(layout.attend(query, key, value).flatten(-2))
        return x + self.mlp(x)
