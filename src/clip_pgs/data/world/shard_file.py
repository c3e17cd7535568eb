"""Draw samples into a tar file, and sum up what was drawn in a digest."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from clip_pgs.data.world.draw import Drawing
from clip_pgs.data.world.scene import Scene
from clip_pgs.data.world.splits import Sample

_JPEG_QUALITY = 92


class Digest:
    """SHA-256 over texts, pixels and masks, before any file format touches them.

    File bytes can change with the release of the image library; this cannot.
    """

    def __init__(self) -> None:
        self._hash = hashlib.sha256()

    def add_text(self, text: str) -> None:
        """Add a text."""
        self._hash.update(f"{len(text)}:{text}".encode())

    def add_sample(self, sample: Sample, drawing: Drawing) -> None:
        """Add a sample's key, caption, label, pixels and mask."""
        self.add_text(f"{sample.key}|{sample.caption}|{sample.label}")
        self._hash.update(drawing.pixels.tobytes())
        self._hash.update(np.packbits(drawing.foreground).tobytes())

    def hexdigest(self) -> str:
        """Return the digest of all that was added."""
        return self._hash.hexdigest()


def write_shard(
    path: Path,
    samples: Iterable[Sample],
    *,
    draw: Callable[[Scene], Drawing],
    digest: Digest,
    tick: Callable[[], None],
) -> int:
    """Draw samples into a tar file.

    Members of a sample: `jpg`, `txt` (caption), `cls` (label, where there is one), `json` (the
    scene) and `mask.png` (white where objects are). The same samples give the same bytes.

    Args:
        path: File to write; its folder exists.
        samples: What to draw.
        draw: Draws a scene.
        digest: Gets every sample.
        tick: Called after every sample.

    Returns:
        Number of samples.
    """
    from webdataset import TarWriter

    count = 0
    # A file handle, as TarWriter takes a path for a URL.
    with (
        path.open("wb") as file,
        TarWriter(file, encoder=False, mtime=0, user="", group="", mode=0o644) as writer,
    ):
        for sample in samples:
            drawing = draw(sample.scene)
            digest.add_sample(sample, drawing)
            writer.write({"__key__": sample.key, **_members(sample, drawing)})
            count += 1
            tick()
    return count


def jpeg_bytes(drawing: Drawing) -> bytes:
    """Return a drawing as a JPEG file."""
    file = io.BytesIO()
    # Full colour resolution: chroma of half the size would wash out a small object.
    Image.fromarray(drawing.pixels).save(file, "JPEG", quality=_JPEG_QUALITY, subsampling=0)
    return file.getvalue()


def png_bytes(image: Image.Image) -> bytes:
    """Return an image as a PNG file."""
    file = io.BytesIO()
    image.save(file, format="PNG")
    return file.getvalue()


def mask_image(drawing: Drawing) -> Image.Image:
    """Return the foreground as a one-bit image, white where objects are."""
    return Image.fromarray(drawing.foreground.astype(np.uint8) * 255).convert("1")


def _members(sample: Sample, drawing: Drawing) -> dict[str, bytes]:
    members = {
        "jpg": jpeg_bytes(drawing),
        "txt": sample.caption.encode(),
        "json": json.dumps(_plain(sample.scene)).encode(),
        "mask.png": png_bytes(mask_image(drawing)),
    }
    if sample.label is not None:
        members["cls"] = str(sample.label).encode()
    return members


def _plain(scene: Scene) -> dict[str, Any]:
    # dataclasses.asdict copies deeply, which takes longer than drawing the background.
    return {**vars(scene), "things": [vars(thing) for thing in scene.things]}
