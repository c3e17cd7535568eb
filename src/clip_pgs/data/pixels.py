"""Images cross over to the device as bytes, a quarter of their size, and become floats there."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from clip_pgs.data.decoding import RandomCrop, faster_transform


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
        """Normalise images.

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
        What normalises them, or None where the stream gives floats, as it does with any transform
        that `faster_transform` has no other for.
    """
    crop = faster_transform(transform)
    if isinstance(crop, RandomCrop):
        return PixelNormalizer(crop.mean, crop.std, device=device)
    return None
