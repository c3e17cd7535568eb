"""One query's attention to every token, from the weights of the attention it stands in for."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

HeadNorm = Callable[[Tensor], Tensor]


def first_token_attention(
    x: Tensor,
    qkv_weight: Tensor,
    qkv_bias: Tensor | None,
    *,
    num_heads: int,
    norms: tuple[HeadNorm, HeadNorm] | None = None,
) -> Tensor:
    """Return the first token's attention to all tokens, mean over heads.

    Args:
        x: Normalised tokens of shape (B, T, D).
        qkv_weight: Projection to queries, keys and values, stacked. Shape (3 W, D).
        qkv_bias: Its bias, shape (3 W,).
        num_heads: Heads that W divides into.
        norms: Normalisation of queries and of keys per head, where the block has one.

    Returns:
        Attention of shape (B, T), float32; rows sum to 1.
    """
    weight_q, weight_k, _ = qkv_weight.chunk(3)
    bias_q, bias_k, _ = (None, None, None) if qkv_bias is None else qkv_bias.chunk(3)
    query = functional.linear(x[:, :1], weight_q, bias_q)
    key = functional.linear(x, weight_k, bias_k)
    return query_attention(query, key, num_heads=num_heads, norms=norms)


def query_attention(
    query: Tensor,
    key: Tensor,
    *,
    num_heads: int,
    norms: tuple[HeadNorm, HeadNorm] | None = None,
) -> Tensor:
    """Return the attention of one query to all keys, mean over heads.

    Args:
        query: Shape (B, 1, W).
        key: Shape (B, T, W).
        num_heads: Heads that W divides into.
        norms: Normalisation of queries and of keys per head.

    Returns:
        Attention of shape (B, T), float32; rows sum to 1.
    """
    query, key = _split_heads(query, num_heads), _split_heads(key, num_heads)
    if norms is not None:
        query, key = norms[0](query), norms[1](key)
    logits_BH1T = torch.matmul(query, key.transpose(-2, -1)) * query.shape[-1] ** -0.5
    return logits_BH1T.float().softmax(dim=-1).mean(dim=1)[:, 0]


def _split_heads(x: Tensor, num_heads: int) -> Tensor:
    return x.unflatten(-1, (num_heads, -1)).transpose(1, 2)
