"""The attention bias of the released CLIP-PGS code, reproduced with its errors.

That code (snapshot cdeb109 of November 2024) meant to keep patches that resemble a candidate from
attending and from being attended to. What it computes is a bias of +1 on the attention logits of
all other pairs, with heads and images interleaved in the wrong order, so that an image is given
the bias of another one. It is an option of `pgs-released` alone, off by default.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional


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
