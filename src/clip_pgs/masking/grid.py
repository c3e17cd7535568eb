"""How an image divides into patches."""

from __future__ import annotations


def patch_sides(patch_size: int | tuple[int, int]) -> tuple[int, int]:
    """Return (height, width) of a patch given as one side or as both.

    Raises:
        ValueError: If a side is below 1.
    """
    height, width = (patch_size, patch_size) if isinstance(patch_size, int) else patch_size
    if height < 1 or width < 1:
        raise ValueError(f"patch_size must be at least 1, got {(height, width)}")
    return height, width


def patch_grid(image_size: tuple[int, int], sides: tuple[int, int]) -> tuple[int, int]:
    """Return how many patches of these sides lie below and beside each other in an image.

    Args:
        image_size: (height, width) in pixels.
        sides: (height, width) of a patch.

    Raises:
        ValueError: If the patch does not divide the image.
    """
    (height, width), (patch_height, patch_width) = image_size, sides
    if height % patch_height or width % patch_width:
        raise ValueError(
            f"patch_size must divide the image: {height} x {width} pixels "
            f"in patches of {patch_height} x {patch_width}"
        )
    return height // patch_height, width // patch_width
