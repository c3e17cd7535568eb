"""SugarCrepe's files: an image, its caption and a hard negative that differs in a word or two.

The folder is clip_benchmark's: `add_att.json`, ... beside `val2017/` with the images.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from clip_pgs.evaluation.datasets.datasets import CAPTION_PAIR_SPLITS, DamagedDataError

IMAGE_FOLDER = "val2017"
_MAX_BYTES = 2**26
_KEYS = ("filename", "caption", "negative_caption")


@dataclass(frozen=True)
class CaptionPair:
    """One item.

    Attributes:
        file_name: Of the image, in `IMAGE_FOLDER`.
        caption: What it shows.
        negative: What it does not.
    """

    file_name: str
    caption: str
    negative: str


def read_pairs(folder: Path, split: str) -> list[CaptionPair]:
    """Read the items of a split.

    Args:
        folder: With `SPLIT.json`.
        split: One of `CAPTION_PAIR_SPLITS`.

    Raises:
        FileNotFoundError: If the file is not there.
        ValueError: If there is no such split, or the file is malformed or empty.
    """
    if split not in CAPTION_PAIR_SPLITS:
        choices = ", ".join(CAPTION_PAIR_SPLITS)
        raise ValueError(f"SugarCrepe has no split {split!r}; choose from {choices}")
    path = folder / f"{split}.json"
    if not path.is_file():
        raise FileNotFoundError(f"no file {path}")
    if path.stat().st_size > _MAX_BYTES:
        raise DamagedDataError(f"{path} is larger than {_MAX_BYTES} bytes")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    # The last where it nests too deep.
    except (ValueError, RecursionError) as error:
        raise DamagedDataError(f"{path} is not JSON: {error}") from error
    items = list(content.values()) if isinstance(content, dict) else content
    if not isinstance(items, list) or not items or not all(_is_item(item) for item in items):
        raise DamagedDataError(f"{path} must hold items with {', '.join(_KEYS)}")
    pairs = [CaptionPair(*(item[key] for key in _KEYS)) for item in items]
    for pair in pairs:
        if Path(pair.file_name).name != pair.file_name or "\0" in pair.file_name:
            raise DamagedDataError(
                f"{path} must name images in {IMAGE_FOLDER}, got {pair.file_name[:80]!r}"
            )
    return pairs


def image_paths(folder: Path, split: str) -> list[Path]:
    """Return the images of a split, each once, in the order of their names.

    Args:
        folder: With `SPLIT.json` and the images.
        split: One of `CAPTION_PAIR_SPLITS`.

    Raises:
        FileNotFoundError: If the split or an image is not there.
        ValueError: As `read_pairs`.
    """
    names = sorted({pair.file_name for pair in read_pairs(folder, split)})
    absent = [name for name in names if not (folder / IMAGE_FOLDER / name).is_file()]
    if absent:
        raise FileNotFoundError(
            f"{folder} lacks {IMAGE_FOLDER}/{absent[0]} ({len(absent)} of {len(names)} images)"
        )
    return [folder / IMAGE_FOLDER / name for name in names]


def _is_item(item: object) -> bool:
    return isinstance(item, dict) and all(isinstance(item.get(key), str) for key in _KEYS)
