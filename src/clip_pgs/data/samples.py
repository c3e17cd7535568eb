"""One image with its captions: the bytes as stored, and the tensors made of them."""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from clip_pgs.data.bad_samples import BadSampleError, Skip
from clip_pgs.data.decoding import (
    RandomCrop,
    UnreadableImageError,
    check_resized,
    opened_image,
    rgb_pixels,
    to_rgb,
)
from clip_pgs.data.order import stable_seed

IMAGE_SUFFIXES = ("jpg", "png", "jpeg", "webp")
CAPTION_SUFFIX = "txt"
JSON_SUFFIX = "json"
# Of one sample, all captions together. Data sets have some, of a few kB with a side-car JSON.
MAX_CAPTION_BYTES, MAX_CAPTIONS = 2**22, 1000

Transform = Callable[[Image.Image], Tensor]
Tokenize = Callable[[list[str]], Tensor]

# Many times what a text tower takes. A tokenizer's time grows with the square of a word's length.
MAX_CHARACTERS = 2000
# Of a side-car JSON's fields.
_MAX_NAMED, _MAX_NAME = 12, 50


def is_image(suffix: str) -> bool:
    """Return whether a suffix ends as an image's does, such as `b.jpg` of `a.b.jpg`."""
    return suffix.rpartition(".")[2] in IMAGE_SUFFIXES


@dataclass(frozen=True)
class RawSample:
    """The bytes of one pair.

    Args:
        shard: Where it comes from: a shard or a table.
        key: Its name there.
        image: An encoded image, or None if there is none.
        captions: UTF-8 texts, of which one is drawn each epoch; or one side-car JSON.
        repeat: How often this epoch came to the shard before; tells repetitions apart.
        suffixes: What members there are in a shard, for messages: ".jpg .txt".
        path: The image's file, where it is one of its own.
    """

    shard: str
    key: str
    image: bytes | None
    captions: tuple[bytes, ...]
    repeat: int = 0
    suffixes: str = ""
    path: str = ""

    def skip(self, error: BadSampleError) -> Skip:
        """Return what tells that it cannot be used, and why."""
        detail = ": ".join(filter(None, (self.path and repr(self.path), error.detail)))
        return Skip(self.shard, self.key, error.reason, detail)


@dataclass(frozen=True)
class SampleDecoder:
    """Turn bytes into tensors, with augmentation drawn from the sample alone.

    Args:
        transform: RGB image to a tensor of shape (3, H, W): floats, or bytes from a `RandomCrop`,
            for which only what it needs is decoded.
        tokenize: List of B captions to a long tensor of shape (B, T); may draw words at random.
        seed: Seed of the run.
        caption_key: Fields of the side-car JSON that hold captions, as `--caption-key` names
            them; None where captions are texts.
        with_captions: Whether a sample needs captions; else nobody reads any.
    """

    transform: Transform
    tokenize: Tokenize
    seed: int
    caption_key: str | None = None
    with_captions: bool = True

    def __call__(self, raw: RawSample, *, epoch: int) -> tuple[Tensor, Tensor]:
        """Decode one pair; the process's generators, which both parts draw from, are seeded.

        Image and text have a seed each, so that neither's draws depend on the other's. Of several
        captions one is drawn.

        Returns:
            The image (3, H, W) and the tokens (T,): a function of seed, epoch and sample, in
            whatever process and whatever was decoded before.

        Raises:
            BadSampleError: If image or caption is missing or cannot be read.
        """
        captions = [""]
        if self.with_captions:
            captions = decode_captions(raw, caption_key=self.caption_key)
        # The folder is left out, so that a data set may move.
        shard_name = raw.shard.rpartition("/")[2]
        place = (self.seed, epoch, shard_name, raw.key, raw.repeat)
        caption = captions[0]
        if len(captions) > 1:
            caption = captions[stable_seed("caption", *place) % len(captions)]
        _seed_generators(stable_seed(*place))
        if isinstance(self.transform, RandomCrop):
            pixels = decode_crop(raw, self.transform)
        else:
            pixels = self.transform(decode_image(raw, self.transform))
        _seed_generators(stable_seed("text", *place))
        return pixels, self.tokenize([cut_caption(caption)])[0]


def caption_fields(caption_key: str) -> list[str]:
    """Return the fields of a side-car JSON that `--caption-key` names, parted by commas.

    Raises:
        ValueError: If one of the names is empty.
    """
    fields = [name.strip() for name in caption_key.split(",")]
    if not all(fields):
        raise ValueError(f"--caption-key takes fields, parted by commas, got {caption_key!r}")
    return fields


def missing_fields(caption_key: str | None, found: Counter[str]) -> str:
    """Say which fields of `--caption-key` none of many samples had; "" where there are none.

    Args:
        caption_key: See `SampleDecoder`.
        found: What `decode_captions` counted. Where it is empty, each sample was bad.
    """
    fields = [] if caption_key is None else caption_fields(caption_key)
    missing = [name for name in fields if name not in found]
    if not found or not missing:
        return ""
    return (
        f"--caption-key {caption_key}: no sample that was looked at has "
        f"{' or '.join(map(repr, missing))}, and captions come from {' and '.join(found)} alone"
    )


def decode_captions(
    raw: RawSample, *, caption_key: str | None = None, found: Counter[str] | None = None
) -> list[str]:
    """Decode the captions of a pair; blank ones among several are left out.

    Args:
        raw: The pair.
        caption_key: See `SampleDecoder`; several fields are joined by commas. A field holds a
            text or a list of texts.
        found: Counts the fields that were there.

    Returns:
        At least one caption.

    Raises:
        BadSampleError: If there is none, or none that is no blank, or more than `MAX_CAPTIONS` or
            `MAX_CAPTION_BYTES` of all, or one is not UTF-8.
    """
    if not raw.captions:
        suffix = CAPTION_SUFFIX if caption_key is None else JSON_SUFFIX
        hint = "; --caption-key KEY reads a field of the .json" if caption_key is None else ""
        raise BadSampleError("no caption", _missing(raw, suffix, hint))
    num_bytes = sum(map(len, raw.captions))
    if num_bytes > MAX_CAPTION_BYTES:
        detail = f"{num_bytes} bytes, more than {MAX_CAPTION_BYTES}"
        raise BadSampleError("too large caption", detail)
    if caption_key is None:
        try:
            captions = [data.decode("utf-8-sig") for data in raw.captions]
        except UnicodeDecodeError as error:
            raise BadSampleError("caption is not UTF-8", str(error)) from error
    else:
        captions = _json_captions(raw.captions[0], caption_fields(caption_key), found)
    if len(captions) > MAX_CAPTIONS:
        raise BadSampleError("too many captions", f"{len(captions)}, more than {MAX_CAPTIONS}")
    captions = [caption for caption in captions if caption.strip()]
    if not captions:
        raise BadSampleError("empty caption")
    return captions


def cut_caption(caption: str) -> str:
    """Return what is read of a caption: of a long one, `MAX_CHARACTERS` from its first that shows.

    Tokenizers drop what is blank before it, and nothing would be left of as many blanks.
    """
    return caption if len(caption) <= MAX_CHARACTERS else caption.lstrip()[:MAX_CHARACTERS]


def decode_image(raw: RawSample, transform: Any = None) -> Image.Image:
    """Decode the image of a pair to 8-bit RGB.

    Transparency is dropped, as OpenCLIP drops it. 16-bit gray is scaled to 8 bits.

    Args:
        raw: The pair.
        transform: What it is for, if that is known.

    Raises:
        BadSampleError: If it is missing, damaged or cut short, or too large for the transform.
    """
    with _reading(raw) as (image, _):
        check_resized(image, transform)
        image.load()
        return to_rgb(image)


def decode_crop(raw: RawSample, crop: RandomCrop) -> Tensor:
    """Decode what a random crop of a pair's image needs, and cut it out.

    Returns:
        Pixels of shape (3, H, W), uint8.

    Raises:
        BadSampleError: If the image is missing, damaged or cut short.
    """
    with _reading(raw) as (image, data):
        full_size, box = image.size, crop.draw(image)
        pixels = rgb_pixels(image, data, reduction=crop.reduction(box))
    return crop.cut(pixels, box, full_size=full_size)


@contextmanager
def _reading(raw: RawSample) -> Iterator[tuple[Image.Image, bytes]]:
    """Open an image, whose pixels are to be decoded inside the `with` block, with its bytes."""
    if raw.image is None:
        raise BadSampleError("no image", _missing(raw, ", .".join(IMAGE_SUFFIXES)))
    try:
        with opened_image(raw.image) as image:
            yield image, raw.image
    except UnreadableImageError as error:
        raise BadSampleError("unreadable image", str(error)) from error


def _json_captions(data: bytes, keys: list[str], counts: Counter[str] | None) -> list[str]:
    try:
        record = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise BadSampleError("unreadable JSON", f".{JSON_SUFFIX} member: {error}") from error
    if not isinstance(record, dict):
        detail = f"{_json_kind(record)} in place of an object"
        raise BadSampleError("unreadable JSON", detail)
    present = [key for key in keys if record.get(key) is not None]
    if counts is not None:
        counts.update(present)
    found = [record[key] for key in present]
    if not found:
        nulls = [key for key in keys if key in record]
        fields = [repr(name)[:_MAX_NAME] for name in list(record)[:_MAX_NAMED]]
        reason = f"is no field of the JSON; it has {', '.join(fields) or 'none at all'}"
        if nulls:
            reason = f"leads to null in the JSON: {', '.join(map(repr, nulls))}"
        raise BadSampleError("no caption", f"--caption-key {','.join(keys)} {reason}")
    captions = [text for value in found for text in (value if isinstance(value, list) else [value])]
    for caption in captions:
        if not isinstance(caption, str):
            detail = f"--caption-key leads to {_json_kind(caption)}"
            raise BadSampleError("caption is no text", detail)
        if not caption.isascii() and any("\ud800" <= letter <= "\udfff" for letter in caption):
            raise BadSampleError("caption is not UTF-8", "the JSON escapes half a character")
    return captions


def _json_kind(value: object) -> str:
    """Return what JSON calls a value, with its article."""
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    kinds: dict[type, str] = {str: "a text", list: "a list", dict: "an object"}
    return kinds.get(type(value), "a number")


def _missing(raw: RawSample, wanted: str, hint: str = "") -> str:
    """Say what is there in place of a member, and by what rule that is none."""
    rule = "members of a pair share a name up to its first dot and follow one another"
    return f"no .{wanted} member but {raw.suffixes or 'none'}; {rule}{hint}"


def _seed_generators(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed % 2**32)
    # torch.manual_seed would reseed the accelerators too.
    torch.default_generator.manual_seed(seed)
