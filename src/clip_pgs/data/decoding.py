"""Random crops of photographs, as OpenCLIP trains on them, in a fraction of the time.

Decoding a JPEG file takes half of the time, and resizing the crop most of the rest. So torch
resizes, several times as fast as Pillow and by the same filter; and a file several times larger
than needed is decoded at a half, a quarter or an eighth of its size, which decoders do on the way.
Boxes are torchvision's own, drawn from the same numbers. What comes out are bytes, which
`PixelNormalizer` turns into floats on the device that trains.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional
from torchvision.io import ImageReadMode, decode_jpeg
from torchvision.transforms import Compose, InterpolationMode, Normalize, RandomResizedCrop
from torchvision.transforms.functional import pil_to_tensor

Box = tuple[int, int, int, int]  # top, left, height, width in pixels

_REDUCTIONS = (8, 4, 2)  # what JPEG decoders offer

# A reduced crop stays this much larger than what it is resized to: the last halving is left to the
# filter, since decoders halve by cutting off frequencies, which rings at sharp edges.
_ROOM = 2

_RGB = ImageReadMode.RGB


@dataclass(frozen=True)
class RandomCrop:
    """A random crop, resized: OpenCLIP's training transform up to its normalisation.

    Args:
        crop: Where boxes come from, and the size they are resized to.
        mean: Of each channel, for images in [0, 1]; what is left to normalise by.
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

    Transparency is dropped, as OpenCLIP drops it. 16-bit grey is scaled to 8 bits.
    """
    if image.mode == "I" or image.mode.startswith("I;16"):
        # Pillow's own conversion clips at 255, which makes nearly every 16-bit image white.
        pixels = (np.asarray(image) >> 8).clip(0, 255)
        return Image.fromarray(pixels.astype(np.uint8)).convert("RGB")
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")
    return image.convert("RGB")
