"""One image with its caption: the bytes as stored, and the tensors made of them."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from clip_pgs.data.decoding import (
    RandomCrop,
    UnreadableImageError,
    opened_image,
    rgb_pixels,
    to_rgb,
)
from clip_pgs.data.order import stable_seed

IMAGE_SUFFIXES = ("jpg", "png", "jpeg", "webp")
CAPTION_SUFFIX = "txt"

Transform = Callable[[Image.Image], Tensor]
Tokenize = Callable[[list[str]], Tensor]

# Many times what a text tower takes. A tokenizer's time grows with the square of a word's length.
_MAX_CHARACTERS = 2000


@dataclass(frozen=True)
class RawSample:
    """The bytes of one pair.

    Args:
        shard: Where it comes from: a shard or a table.
        key: Its name there.
        image: An encoded image, or None if there is none.
        caption: UTF-8 text, or None if there is none.
        visit: How often this epoch came to the shard before; tells repetitions apart.
    """

    shard: str
    key: str
    image: bytes | None
    caption: bytes | None
    visit: int = 0


@dataclass(frozen=True)
class Skip:
    """A pair, or with an empty key a whole shard, that cannot be used.

    Args:
        shard: Where it comes from.
        key: Its name there, or "".
        reason: A category, to be counted by.
        detail: What went wrong with this one, or "".
    """

    shard: str
    key: str
    reason: str
    detail: str = ""

    def __str__(self) -> str:
        place = f"{self.shard}: {self.key}" if self.key else self.shard
        return f"{place}: {self.reason}" + (f" ({self.detail})" if self.detail else "")


class BadSampleError(ValueError):
    """A pair that cannot be used, with its reason as a category and a detail."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(reason, detail)
        self.reason = reason
        self.detail = detail


class UnusableDataError(ValueError):
    """Data that cannot be trained on; says what was skipped and why."""


class NoUsableSampleError(UnusableDataError):
    """Data without a single usable sample."""


class TooManyBadSamplesError(UnusableDataError):
    """Data of which more is bad than is allowed."""


@dataclass(frozen=True)
class SampleDecoder:
    """Turn bytes into tensors, with augmentation drawn from the sample alone.

    Args:
        transform: RGB image to a tensor of shape (3, H, W): floats, or bytes from a `RandomCrop`,
            for which only what it needs is decoded.
        tokenize: List of B captions to a long tensor of shape (B, T); may draw words at random.
        seed: Seed of the run.
    """

    transform: Transform
    tokenize: Tokenize
    seed: int

    def __call__(self, raw: RawSample, *, epoch: int) -> tuple[Tensor, Tensor]:
        """Decode one pair; the process's generators, which both parts draw from, are seeded.

        Image and text have a seed each, so that neither's draws depend on the other's.

        Returns:
            The image (3, H, W) and the tokens (T,): a function of seed, epoch and sample, in
            whatever process and whatever was decoded before.

        Raises:
            BadSampleError: If image or caption is missing or cannot be read.
        """
        caption = decode_caption(raw.caption)[:_MAX_CHARACTERS]
        # The folder is left out, so that a data set may move.
        shard_name = raw.shard.rpartition("/")[2]
        place = (self.seed, epoch, shard_name, raw.key, raw.visit)
        _seed_generators(stable_seed(*place))
        if isinstance(self.transform, RandomCrop):
            pixels = decode_crop(raw.image, self.transform)
        else:
            pixels = self.transform(decode_image(raw.image))
        _seed_generators(stable_seed("text", *place))
        return pixels, self.tokenize([caption])[0]


def decode_caption(data: bytes | None) -> str:
    """Decode a caption.

    Raises:
        BadSampleError: If it is missing, empty or not UTF-8.
    """
    if data is None:
        raise BadSampleError("no caption", f"no .{CAPTION_SUFFIX} member")
    try:
        caption = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise BadSampleError("caption is not UTF-8", str(error)) from error
    if not caption.strip():
        raise BadSampleError("empty caption")
    return caption


def decode_image(data: bytes | None) -> Image.Image:
    """Decode an image to 8-bit RGB.

    Transparency is dropped, as OpenCLIP drops it. 16-bit grey is scaled to 8 bits.

    Raises:
        BadSampleError: If it is missing, damaged or cut short.
    """
    with _reading(data) as image:
        image.load()
        return to_rgb(image)


def decode_crop(data: bytes | None, crop: RandomCrop) -> Tensor:
    """Decode what a random crop of an image needs, and cut it out.

    Returns:
        Pixels of shape (3, H, W), uint8.

    Raises:
        BadSampleError: If the image is missing, damaged or cut short.
    """
    with _reading(data) as image:
        assert data is not None
        full_size, box = image.size, crop.draw(image)
        pixels = rgb_pixels(image, data, reduction=crop.reduction(box))
    return crop.cut(pixels, box, full_size=full_size)


@contextmanager
def _reading(data: bytes | None) -> Iterator[Image.Image]:
    """Open an image whose pixels are to be decoded inside the `with` block."""
    if data is None:
        raise BadSampleError("no image", "no ." + ", .".join(IMAGE_SUFFIXES) + " member")
    try:
        with opened_image(data) as image:
            yield image
    except UnreadableImageError as error:
        raise BadSampleError("unreadable image", str(error)) from error


def _seed_generators(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed % 2**32)
    # torch.manual_seed would reseed the accelerators too.
    torch.default_generator.manual_seed(seed)
