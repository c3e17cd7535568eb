"""A batch's captions at the cost of their own lengths instead of the context's.

In a causal text tower that pools at the end-of-text token, nothing behind that token reaches the
features. So a batch needs no more columns than its longest caption has tokens; and since one
caption in a few hundred fills the context on the web, captions of about one length run together.
The rows of the batch keep their places.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from open_clip.transformer import text_global_pool
from torch import Tensor

# Few lengths, so that a compiled model sees few shapes. The context itself is always one more.
LENGTHS = (8, 16, 24, 32, 40, 48, 64)

# How a batch divides, from the shortest captions to the longest. The parts depend on its size
# alone, again for the compiler's sake.
GROUP_SHARES = (0.5, 0.375, 0.125)

_MIN_GROUPED = 16  # captions, below which parts would be too small to pay


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
