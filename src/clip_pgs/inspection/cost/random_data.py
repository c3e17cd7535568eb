"""Images, and captions that are as long as real ones, for measurements of time."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional

# Mean and standard deviation of the tokens of a caption, start and end included. Flickr8k's are
# measured (3,000 captions); alt-text has a long tail, so that one caption in a few hundred fills
# the context.
LENGTHS = {"flickr8k": (14.1, 3.9), "web": (27.0, 20.0)}

_SHORTEST = 3


def draw_captions(
    kind: str, *, batch_size: int, context_length: int, vocab_size: int, seed: int = 0
) -> Tensor:
    """Draw captions of log-normal lengths, each ending with the highest token id.

    Args:
        kind: One of `LENGTHS`.
        batch_size: Captions.
        context_length: Columns; longer captions are cut there.
        vocab_size: Token ids are below it.
        seed: Same seed, same captions.

    Returns:
        Token ids of shape (B, context length), zeros behind a caption's end.

    Raises:
        ValueError: If `kind` is unknown.
    """
    if kind not in LENGTHS:
        raise ValueError(f"captions must be one of {', '.join(LENGTHS)}, got {kind!r}")
    mean, deviation = LENGTHS[kind]
    variance = math.log1p((deviation / mean) ** 2)
    generator = torch.Generator().manual_seed(seed)
    normal_B = torch.randn(batch_size, generator=generator)
    lengths_B = (math.log(mean) - variance / 2 + math.sqrt(variance) * normal_B).exp().round()
    last_B = lengths_B.clamp(min(_SHORTEST, context_length), context_length).long() - 1
    ids_BT = torch.randint(
        1, vocab_size - 1, (batch_size, context_length), generator=generator, dtype=torch.int64
    )
    position_T = torch.arange(context_length)
    ids_BT[position_T > last_B[:, None]] = 0
    return ids_BT.scatter(1, last_B[:, None], vocab_size - 1)


def draw_images(image_size: tuple[int, int], *, batch_size: int, seed: int = 0) -> Tensor:
    """Draw smooth random images of about mean 0 and deviation 1, shape (B, 3, H, W)."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randn(batch_size, 3, *(max(2, side // 16) for side in image_size))
    coarse.normal_(generator=generator)
    return functional.interpolate(coarse, size=image_size, mode="bilinear", align_corners=False)
