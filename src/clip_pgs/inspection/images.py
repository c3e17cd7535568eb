"""Image files, and folders that stand for the images in them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from PIL import Image


def list_images(paths: Sequence[str | Path]) -> list[Path]:
    """Return image files, a folder replaced by the images in it, sorted by name.

    Raises:
        ValueError: If a folder holds none.
    """
    endings = Image.registered_extensions()
    found: list[Path] = []
    for path in map(Path, paths):
        if not path.is_dir():
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
        ValueError: If it is not there or cannot be read.
    """
    try:
        with Image.open(path) as image:
            image.load()
            return image
    except FileNotFoundError:
        raise ValueError(f"there is no image {path}") from None
    # A damaged PNG is a SyntaxError, and one of a billion pixels is none of these.
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"cannot read the image {path}: {error}") from None
