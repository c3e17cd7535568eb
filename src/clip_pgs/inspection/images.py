"""Image files, and folders that stand for the images in them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from clip_pgs.data.decoding import IMAGE_FORMATS, UnreadableImageError
from clip_pgs.data.decoding import open_image as decode_image


def image_endings() -> set[str]:
    """Return how the names of image files end, in lower case, each with its dot."""
    endings = Image.registered_extensions()
    return {ending for ending, name in endings.items() if name in IMAGE_FORMATS}


def list_images(paths: Sequence[str | Path]) -> list[Path]:
    """Return image files, a folder replaced by the images in it, sorted by name.

    Raises:
        ValueError: If a file is not there, or a folder holds no image.
    """
    endings = image_endings()
    found: list[Path] = []
    for path in map(Path, paths):
        if not path.is_dir():
            if not path.exists():
                raise ValueError(f"there is no image {path}")
            found.append(path)
            continue
        inside = sorted(p for p in path.iterdir() if p.suffix.lower() in endings and p.is_file())
        if not inside:
            raise ValueError(f"there is no image in the folder {path}")
        found += inside
    return found


def open_image(path: Path) -> Image.Image:
    """Read an image file whole, in its own mode.

    Raises:
        ValueError: If it cannot be read, or not at a usual cost.
    """
    try:
        return decode_image(path)
    except UnreadableImageError as error:
        raise ValueError(f"cannot read the image {path}: {error}") from None
