"""Images out of files: which formats are opened, at what cost, and random crops of them.

A file may come from anybody. Only the decoders of `IMAGE_FORMATS` ever see it, what would take
unusual effort is refused, and whatever a decoder raises is an `UnreadableImageError`.

Random crops are those that OpenCLIP trains on, in a fraction of the time.
Decoding a JPEG file takes half of the time, and resizing the crop most of the rest. So torch
resizes, several times as fast as Pillow and by the same filter; and a file several times larger
than needed is decoded at a half, a quarter or an eighth of its size, which decoders do on the way.
Boxes are torchvision's own, drawn from the same numbers. What comes out are bytes, which
`PixelNormalizer` turns into floats on the device that trains.
"""

from __future__ import annotations

import io
import os
import re
import signal
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torch.nn import functional
from torchvision.io import ImageReadMode, decode_jpeg
from torchvision.transforms import (
    Compose,
    InterpolationMode,
    Normalize,
    RandomResizedCrop,
    Resize,
)
from torchvision.transforms.functional import pil_to_tensor

from clip_pgs.common import Pauses, one_sentence
from clip_pgs.data.bad_samples import StalledDataError
from clip_pgs.files import regular_file

Box = tuple[int, int, int, int]  # top, left, height, width in pixels

# What data sets of photographs hold. Others (EPS, PDF, WMF, FITS, ...) start programs, or are
# decoded by code that few have looked at.
IMAGE_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")

# What an image may take. A file's size bounds the rest of what its header declares.
MAX_IMAGE_BYTES = 2**28
# Encoders make about ten; libtiff allows as many. Each costs a pass over all pixels.
MAX_JPEG_SCANS = 100
MAX_SCANNED_PIXELS = 2**31
# A model's transform brings the shorter side to the input's, and the longer one grows with it, all
# of it before the crop: 30,000 x 1 pixels become 6,720,000 x 224.
MAX_ASPECT_RATIO = 100
# Of a large input less is left: so many pixels before the crop, or so many times the input's.
MAX_RESIZED_PIXELS = 2**28
_MAX_SURPLUS = 4
# Of processor time, where a decoder gets lost between its blocks.
MAX_DECODING_SECONDS = 20.0
_SECONDS_BETWEEN_SIGNALS = 0.5
# A marker of a JPEG file that is followed by the length of its segment.
_MARKER = re.compile(rb"\xff([^\x00\x01\xff\xd0-\xd8])")
_START_OF_SCAN, _END_OF_IMAGE = b"\xda", b"\xd9"

_REDUCTIONS = (8, 4, 2)  # what JPEG decoders offer

# A reduced crop stays this much larger than what it is resized to: the last halving is left to the
# filter, since decoders halve by cutting off frequencies, which rings at sharp edges.
_ROOM = 2

_RGB = ImageReadMode.RGB


class UnreadableImageError(ValueError):
    """An image that cannot be decoded, or not at a usual cost; says why, in one line."""


def read_image_file(path: str | Path) -> bytes:
    """Return an image file's content.

    Raises:
        OSError: If it cannot be read, or is no regular file.
        UnreadableImageError: If it has more than `MAX_IMAGE_BYTES`.
    """
    # A Path would take a slash out of a URL.
    _check_size(os.path.getsize(path))
    with open(regular_file(Path(path)), "rb") as file:
        return file.read(MAX_IMAGE_BYTES + 1)


def _check_size(num_bytes: int) -> None:
    if num_bytes > MAX_IMAGE_BYTES:
        raise UnreadableImageError(f"{num_bytes} bytes, more than {MAX_IMAGE_BYTES}")


def open_image(source: bytes | str | Path) -> Image.Image:
    """Decode an image of one of `IMAGE_FORMATS`; of an animation, its first picture.

    Args:
        source: A file's content, or its path.

    Returns:
        The decoded image, in whatever mode the file has; see `to_rgb`.

    Raises:
        UnreadableImageError: If it cannot be read, is of another format, damaged, cut short, has
            more pixels than Pillow takes (twice `Image.MAX_IMAGE_PIXELS`), a side of more than
            `MAX_ASPECT_RATIO` times the other, more than `MAX_IMAGE_BYTES`, `MAX_JPEG_SCANS` or
            `MAX_SCANNED_PIXELS` over all scans, or takes more than `MAX_DECODING_SECONDS` of
            processor time.
    """
    with opened_image(source) as image:
        image.load()
    return image


@contextmanager
def opened_image(source: bytes | str | Path) -> Iterator[Image.Image]:
    """Open an image whose pixels are decoded inside the `with` block; see `open_image`.

    Raises:
        UnreadableImageError: Also for whatever is raised inside the block.
    """
    try:
        data = source if isinstance(source, bytes) else read_image_file(source)
        _check_size(len(data))
        with time_limit(MAX_DECODING_SECONDS, _OutOfTimeError(), of_processor=True), _no_warnings():
            image = Image.open(io.BytesIO(data), formats=IMAGE_FORMATS)
            check_aspect_ratio(image)
            _check_scans(data, image.width * image.height)
            yield image
    except (UnreadableImageError, StalledDataError):
        raise
    except UnidentifiedImageError as error:
        raise UnreadableImageError(f"no {', '.join(IMAGE_FORMATS)} file") from error
    except _OutOfTimeError as error:
        limit = f"{MAX_DECODING_SECONDS:g} seconds of processor time"
        raise UnreadableImageError(f"it takes more than {limit}") from error
    # Decoders raise anything on bytes that are no image, or not all of one.
    except Exception as error:
        raise UnreadableImageError(one_sentence(error)) from error


@contextmanager
def _no_warnings() -> Iterator[None]:
    """Hide oddities of a file's metadata, of which those that matter raise."""
    # The filters are those of the whole process: threads would restore each other's, for good.
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def check_aspect_ratio(image: Image.Image) -> None:
    """Refuse an image that no transform for evaluation resizes at a usual cost.

    Raises:
        UnreadableImageError: If a side is more than `MAX_ASPECT_RATIO` times the other.
    """
    if max(image.size) > MAX_ASPECT_RATIO * min(image.size):
        rule = f"a side can be at most {MAX_ASPECT_RATIO} times the other"
        raise UnreadableImageError(f"{rule}, got {image.width} x {image.height} pixels")


def check_resized(image: Image.Image, transform: Any) -> None:
    """Refuse an image that a transform would make too large before it crops.

    Args:
        image: Its size alone is looked at.
        transform: OpenCLIP's for evaluation, or any other; of a `Compose` alone the steps are seen.

    Raises:
        UnreadableImageError: If it would have more than `MAX_RESIZED_PIXELS`, and more than four
            times the pixels of the model's input.
    """
    for step in getattr(transform, "transforms", ()):
        if isinstance(step, Resize) and isinstance(step.size, int):
            rows = columns = step.size
        elif getattr(step, "longest", None) == 0:
            rows, columns = step.size
        else:
            # Others crop, or make nothing larger than the input.
            continue
        scale = max(rows / image.height, columns / image.width)
        num_pixels = round(image.height * scale) * round(image.width * scale)
        most = max(MAX_RESIZED_PIXELS, _MAX_SURPLUS * rows * columns)
        if num_pixels > most:
            raise UnreadableImageError(
                f"resized for an input of {rows} x {columns} pixels, an image can have at most "
                f"{most}, got {num_pixels} of {image.width} x {image.height} pixels"
            )


def _check_scans(data: bytes, num_pixels: int) -> None:
    """Refuse a JPEG file that is decoded over and over."""
    most = min(MAX_JPEG_SCANS, MAX_SCANNED_PIXELS // max(num_pixels, 1))
    # Far more files have such bytes somewhere than have as many scans.
    if data[:2] != b"\xff\xd8" or data.count(b"\xff" + _START_OF_SCAN) <= most:
        return
    num_scans, position = 0, 2
    while (marker := _MARKER.search(data, position)) and marker[1] != _END_OF_IMAGE:
        num_scans += marker[1] == _START_OF_SCAN
        if num_scans > most:
            raise UnreadableImageError(f"a JPEG file of more than {most} scans")
        position = marker.end() + int.from_bytes(data[marker.end() : marker.end() + 2], "big")


class _OutOfTimeError(BaseException):
    """Passes by decoders that catch every Exception."""


@contextmanager
def time_limit(
    seconds: float, error: BaseException, *, of_processor: bool = False
) -> Iterator[None]:
    """Raise an error where the body takes longer; in the main thread alone.

    A timer that somebody has set for themselves goes on afterwards.

    Args:
        seconds: The limit; 0 sets none.
        error: What is raised.
        of_processor: Whether the process's own computing counts, or all time but that in which it
            is suspended.
    """
    if not seconds or threading.current_thread() is not threading.main_thread():
        yield
        return

    number, timer, clock = signal.SIGALRM, signal.ITIMER_REAL, time.monotonic
    if of_processor:
        number, timer, clock = signal.SIGPROF, signal.ITIMER_PROF, time.process_time
    pauses, last, is_over = Pauses(seconds), clock() + seconds, False

    def look(signal_number: int, frame: FrameType | None) -> None:
        nonlocal last
        if is_over:
            return
        if not of_processor and pauses.look():
            last = clock() + seconds
        if clock() < last:
            signal.setitimer(timer, max(min(last - clock(), pauses.interval), 1e-3))
            return
        # Again and again: what is raised in a destructor is lost, and cleaning up may wait too.
        signal.setitimer(timer, _SECONDS_BETWEEN_SIGNALS)
        raise error

    handler = signal.signal(number, look)
    left, interval = signal.setitimer(timer, pauses.interval)
    end = clock() + left
    try:
        yield
    finally:
        is_over = True
        signal.setitimer(timer, 0)
        signal.signal(number, handler)
        if left:
            # 0 would stop it, where its time has come meanwhile.
            signal.setitimer(timer, max(end - clock(), 1e-6), interval)


@dataclass(frozen=True)
class RandomCrop:
    """A random crop, resized: OpenCLIP's training transform up to its normalization.

    Args:
        crop: Where boxes come from, and the size they are resized to.
        mean: Of each channel, for images in [0, 1]; what is left to normalize by.
        std: Of each channel.
    """

    crop: RandomResizedCrop
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __call__(self, image: Image.Image) -> Tensor:
        """Return a random crop of an RGB image, shape (3, H, W), uint8."""
        return self.cut(pil_to_tensor(image), self.draw(image), full_size=image.size)

    def draw(self, image: Image.Image) -> Box:
        """Draw a box from torch's generator; of the image, its size alone is looked at."""
        return self.crop.get_params(image, self.crop.scale, self.crop.ratio)

    def reduction(self, box: Box) -> int:
        """Return by what factor an image may shrink before its box is cut out."""
        rows, columns = self.crop.size
        room = min(box[2] / rows, box[3] / columns) / _ROOM
        return next((factor for factor in _REDUCTIONS if factor <= room), 1)

    def cut(self, pixels: Tensor, box: Box, *, full_size: tuple[int, int]) -> Tensor:
        """Cut a box out of an image and resize it.

        Args:
            pixels: The image at full size or reduced, shape (3, h, w), uint8.
            box: In pixels of the full size; of a reduced image, its edges go to the nearest pixel.
            full_size: (width, height) that the box refers to.

        Returns:
            Pixels of shape (3, H, W), uint8.
        """
        top, left, height, width = box
        down, right = pixels.shape[1] / full_size[1], pixels.shape[2] / full_size[0]
        rows = slice(round(top * down), round((top + height) * down))
        columns = slice(round(left * right), round((left + width) * right))
        resized = functional.interpolate(
            pixels[None, :, rows, columns],
            self.crop.size,
            mode="bicubic",
            antialias=True,
        )
        return resized[0].contiguous()


def faster_transform(transform: Callable[[Image.Image], Tensor]) -> Callable[..., Tensor]:
    """Return a `RandomCrop` for OpenCLIP's training transform, and any other as it is.

    Args:
        transform: RGB image to a float tensor (3, H, W).
    """
    steps = transform.transforms if isinstance(transform, Compose) else []
    # The two in between convert the image's mode and type.
    names = [type(step).__name__ for step in steps]
    if names != ["RandomResizedCrop", "MaybeConvertMode", "MaybeToTensor", "Normalize"]:
        return transform
    crop, normalize = steps[0], steps[-1]
    assert isinstance(crop, RandomResizedCrop)
    assert isinstance(normalize, Normalize)
    if crop.interpolation != InterpolationMode.BICUBIC or not crop.antialias:
        return transform
    return RandomCrop(crop, tuple(normalize.mean), tuple(normalize.std))


def rgb_pixels(image: Image.Image, data: bytes, *, reduction: int = 1) -> Tensor:
    """Decode an opened image to bytes of red, green and blue.

    Args:
        image: As `Image.open` returns it, its pixels not decoded yet.
        data: The file it was opened from.
        reduction: A JPEG file may come out smaller by this factor, 1, 2, 4 or 8.

    Returns:
        Pixels of shape (3, h, w), uint8.

    Raises:
        Exception: Whatever Pillow raises on a file it cannot decode.
    """
    is_jpeg = image.format == "JPEG" and image.mode == "RGB"
    if is_jpeg and reduction == 1:
        try:
            # The same decoder as Pillow's, without a copy to and from four bytes a pixel.
            return decode_jpeg(torch.frombuffer(bytearray(data), dtype=torch.uint8), _RGB)
        except RuntimeError:
            # Pillow has the last word on what is broken.
            pass
    if is_jpeg:
        image.draft("RGB", (image.width // reduction, image.height // reduction))
    image.load()
    return pil_to_tensor(to_rgb(image))


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert a decoded image to 8-bit RGB.

    Transparency is dropped, as OpenCLIP drops it. 16-bit gray is scaled to 8 bits; 32-bit gray is
    taken for 16-bit gray where a pixel is above 255.
    """
    if image.mode == "I" or image.mode.startswith("I;16"):
        pixels = np.asarray(image)
        # Pillow's own conversion clips at 255, which makes nearly every 16-bit image white.
        if image.mode != "I" or pixels.max(initial=0) > 255:
            pixels = pixels >> 8
        pixels = pixels.clip(0, 255)
        return Image.fromarray(pixels.astype(np.uint8)).convert("RGB")
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")
    return image.convert("RGB")


class PixelNormalizer:
    """Turns bytes into what the model receives, by the same operations on every device.

    Args:
        mean: Of each channel, for images in [0, 1].
        std: Of each channel.
        device: Where the images are.
    """

    def __init__(
        self, mean: Sequence[float], std: Sequence[float], *, device: torch.device
    ) -> None:
        mean_C11, std_C11 = (torch.tensor(numbers)[:, None, None] for numbers in (mean, std))
        # Here and not with every batch: the copy to a device waits for it.
        self._factor = (1 / (255 * std_C11)).to(device)
        self._offset = (mean_C11 / std_C11).to(device)

    def __call__(self, pixels: Tensor) -> Tensor:
        """Normalize images.

        Args:
            pixels: Shape (B, 3, H, W) or (3, H, W), uint8.

        Returns:
            The images in float32, of the same shape.

        Raises:
            ValueError: If they are not bytes.
        """
        if pixels.dtype != torch.uint8:
            raise ValueError(f"pixels must be of type uint8, got {pixels.dtype}")
        return pixels.float().mul_(self._factor).sub_(self._offset)


def pixel_normalizer(
    transform: Callable[..., Tensor], *, device: torch.device
) -> PixelNormalizer | None:
    """Return what is left to do to the images of a training stream on their device.

    Args:
        transform: The one that the stream was built with.
        device: Where the images are.

    Returns:
        What normalizes them, or None where the stream gives floats, as it does with any transform
        that `faster_transform` has no other for.
    """
    crop = faster_transform(transform)
    if isinstance(crop, RandomCrop):
        return PixelNormalizer(crop.mean, crop.std, device=device)
    return None
