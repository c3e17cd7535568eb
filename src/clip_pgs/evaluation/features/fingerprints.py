"""What features depend on, as short texts: weights, architecture, transform and data."""

from __future__ import annotations

import functools
import hashlib
import json
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from torch import nn

from clip_pgs.evaluation.datasets.caption_pairs import image_paths
from clip_pgs.evaluation.datasets.datasets import CAPTION_PAIR_SPLITS
from clip_pgs.evaluation.models.weights import weights_digest

# Files above this size are sampled: reading all of ImageNet would take as long as encoding it.
_WHOLE_FILE_BYTES = 256 * 2**20
_BLOCK_BYTES, _NUM_BLOCKS = 2**20, 64


def content_digest(content: Any) -> str:
    """Return the SHA-256 of lists, dicts and plain values, as 64 hexadecimal digits."""
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def model_fingerprint(model: nn.Module) -> str:
    """Return a digest of all that makes a model's features.

    Two models with the same weights may still differ, in an activation or in the pooling: so the
    classes of the modules and their plain attributes count too.

    Args:
        model: The model to be scored.

    Returns:
        64 hexadecimal digits.
    """
    lines = [weights_digest(model)]
    for name, module in model.named_modules():
        plain = {
            key: value
            for key, value in sorted(vars(module).items())
            if not key.startswith("_") and key != "training" and _is_plain(value)
        }
        lines.append(f"{name} {type(module).__module__}.{type(module).__qualname__} {plain}")
    return _digest_of(lines)


def transform_description(transform: Callable[[Any], Any]) -> str | None:
    """Describe an image transform by its printed form.

    Args:
        transform: Such as torchvision's `Compose`.

    Returns:
        A text that is equal for equal transforms of any process, or None if the printed form
        does not tell one from another, as that of a lambda.
    """
    text = re.sub(r"<function ([\w.]+) at 0x[0-9a-fA-F]+>", r"\1", repr(transform))
    return None if "at 0x" in text or "<lambda>" in text else text


def data_fingerprint(location: str, split: str) -> str | None:
    """Return a digest of a split of a data set: its shards, or its caption pairs and images.

    Args:
        location: Folder or URL of the data set.
        split: "test", "train" or one of `CAPTION_PAIR_SPLITS`.

    Returns:
        64 hexadecimal digits, the same wherever the folder lies, or None for a URL, of whose
        content nothing is known. See `files_fingerprint`.

    Raises:
        OSError: If a file is not there or cannot be read.
        ValueError: If the file of a split of caption pairs is malformed.
    """
    if "://" in location:
        return None
    folder = Path(location)
    if split in CAPTION_PAIR_SPLITS:
        pairs_file = folder / f"{split}.json"
        return files_fingerprint(folder, [*image_paths(folder, split), pairs_file])
    paths = [*folder.joinpath(split).glob("*.tar"), folder / split / "nshards.txt"]
    paths += folder.glob("dataset_type.txt")
    return files_fingerprint(folder, paths)


def files_fingerprint(folder: Path, paths: Iterable[Path]) -> str:
    """Return a digest of some files: their names, sizes and bytes.

    Of a file above 256 MiB, 64 blocks of 1 MiB and the time of its last change stand for all.

    Args:
        folder: What the names are relative to.
        paths: The files, in any order.

    Raises:
        OSError: If a file cannot be read.
    """
    lines = []
    for path in sorted(paths):
        status = path.stat()
        digest = _file_digest(path.resolve(), status.st_size, status.st_mtime_ns)
        lines.append(f"{path.relative_to(folder).as_posix()} {status.st_size} {digest}")
    return _digest_of(lines)


# One call reads a data set for several suites; a file that changes has another time or size.
@functools.lru_cache(maxsize=65536)
def _file_digest(path: Path, size: int, mtime_ns: int) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        if size <= _WHOLE_FILE_BYTES:
            while block := file.read(_BLOCK_BYTES):
                digest.update(block)
        else:
            digest.update(str(mtime_ns).encode())
            for number in range(_NUM_BLOCKS):
                file.seek((size - _BLOCK_BYTES) * number // (_NUM_BLOCKS - 1))
                digest.update(file.read(_BLOCK_BYTES))
    return digest.hexdigest()


def _is_plain(value: object) -> bool:
    if isinstance(value, (tuple, list)):
        return all(_is_plain(item) for item in value)
    return value is None or isinstance(value, (bool, int, float, str))


def _digest_of(lines: Iterable[str]) -> str:
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()
