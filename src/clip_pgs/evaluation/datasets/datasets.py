"""Where the data sets of a list are: folders in clip_benchmark's layouts, on disk or on the hub.

A data set is a folder with `test/nshards.txt`, `test/0.tar`, ... and, beside them,
`dataset_type.txt`, `classnames.txt` and `zeroshot_classification_templates.txt`. SugarCrepe's
seven splits are one folder with `add_att.json`, ... and the images in `val2017/`.

One rule leads from a name and a data root to the folder:

- a root with `{dataset}` or `{dataset_cleaned}` is a template, filled in as clip_benchmark does
  (`vtab/cifar10` and `vtab-cifar10`); it may be a URL, and `hub` is short for `HUB_ROOT`;
- under any other root it is the first folder that exists of `NAME`, `CLEANED` and `wds_CLEANED`
  (the name of a clone from the hub). `NAME` may be a path of its own;
- `sugar_crepe/SPLIT` is a split of the folder `sugar_crepe`, or of the data root itself where that
  holds `SPLIT.json`. The hub has no copy of it, so that it is looked for in `data/eval` there.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

PAIRS_TYPE = "caption pairs"
CAPTION_PAIR_SPLITS = (
    "add_att",
    "add_obj",
    "replace_att",
    "replace_obj",
    "replace_rel",
    "swap_att",
    "swap_obj",
)
HUB_ROOT = "https://huggingface.co/datasets/clip-benchmark/wds_{dataset_cleaned}/tree/main"
_LOCAL_ROOT = "data/eval"
_HUB_TIMEOUT_S = 20


@dataclass(frozen=True)
class EvalSet:
    """One data set as one suite evaluates it.

    Attributes:
        name: Its name without `wds/`, as results show it.
        location: Folder or URL; the place that was looked in if there is none.
        suite: Name of the suite, such as "zeroshot-classification".
        task: clip_benchmark's name of the task, such as "zeroshot_classification".
        is_reference: Whether the suite's other sets are variants of this one.
    """

    name: str
    location: str
    suite: str
    task: str
    is_reference: bool = False

    @property
    def splits(self) -> tuple[str, ...]:
        """Parts of the data set that are read: webdataset splits, or SugarCrepe's split."""
        if self.task == "image_caption_selection":
            return (self.name.rsplit("/", 1)[-1],)
        return ("train", "test") if self.task == "linear_probe" else ("test",)

    @property
    def file_stem(self) -> str:
        """Name of this set's result file, without ending; unique within a suite."""
        return f"{self.suite.replace('-', '_')}_{clean_name(self.name)}"


def clean_name(name: str) -> str:
    """Return a name as one part of a file name."""
    return re.sub(r"[^\w.-]+", "-", name).strip("-.")


def locate(name: str, data_root: str) -> tuple[str, str]:
    """Resolve a line of a data set list.

    Args:
        name: `wds/vtab/cifar10`, `vtab/cifar10`, or the path of a folder.
        data_root: A folder, or a template with `{dataset}` or `{dataset_cleaned}`, or "hub".

    Returns:
        The name to show, and the folder or URL where the data set should be.
    """
    short_name = name.removeprefix("wds/").rstrip("/")
    if is_caption_pairs(short_name):
        return _locate_caption_pairs(short_name, data_root)
    cleaned = short_name.replace("/", "-")
    if data_root == "hub":
        data_root = HUB_ROOT
    if is_template(data_root):
        filled = data_root.replace("{dataset_cleaned}", cleaned).replace("{dataset}", short_name)
        return short_name, filled

    candidates = [Path(data_root, part).expanduser() for part in (short_name, cleaned)]
    candidates.append(Path(data_root, f"wds_{cleaned}"))
    folder = next((path for path in candidates if path.is_dir()), candidates[0])
    if short_name.startswith((".", "/", "~")):
        short_name = folder.resolve().name
    return short_name, str(folder)


def is_caption_pairs(name: str) -> bool:
    """Say whether a line names a split of SugarCrepe, or of a folder in its layout."""
    folder, _, split = name.rpartition("/")
    return bool(folder) and split in CAPTION_PAIR_SPLITS


def _locate_caption_pairs(name: str, data_root: str) -> tuple[str, str]:
    folder_name, _, split = name.rpartition("/")
    shown = f"{Path(folder_name).name}/{split}"
    if data_root == "hub":
        data_root = _LOCAL_ROOT
    if is_template(data_root):
        filled = data_root.replace("{dataset_cleaned}", folder_name)
        return shown, filled.replace("{dataset}", folder_name)
    candidates = [Path(data_root, folder_name).expanduser(), Path(data_root)]
    holders = (path for path in candidates if (path / f"{split}.json").is_file())
    return shown, str(next(holders, candidates[0]))


def is_template(data_root: str) -> bool:
    """Say whether a data root is filled in for each data set, rather than a folder of them."""
    return "{dataset}" in data_root or "{dataset_cleaned}" in data_root


def read_metadata(location: str, file_name: str) -> str | None:
    """Read one of a data set's small text files.

    Args:
        location: Folder or URL of the data set.
        file_name: Such as "dataset_type.txt" or "test/nshards.txt".

    Returns:
        The stripped text, or None if the file does not exist.

    Raises:
        OSError: If the file cannot be read, or the server cannot be reached.
    """
    if "://" not in location:
        path = Path(location, file_name)
        return path.read_text(encoding="utf-8").strip() if path.is_file() else None

    import requests

    # The hub serves plain files under `raw`, and links to the large ones under `resolve`.
    url = location.replace("/tree/", "/raw/", 1) if "huggingface.co" in location else location
    response = requests.get(f"{url}/{file_name}", timeout=_HUB_TIMEOUT_S)
    # The hub answers 401, not 404, where there is no such data set.
    if response.status_code in (401, 403, 404):
        return None
    response.raise_for_status()
    return response.text.strip()


def dataset_type(location: str) -> str | None:
    """Return the type a data set declares: "classification", "multilabel" or "retrieval".

    Args:
        location: Folder or URL of the data set.

    Returns:
        The type, or None if the data set is not there or declares none, as many on the hub do.
    """
    try:
        declared = read_metadata(location, "dataset_type.txt")
    except OSError:
        return None
    return declared.lower() if declared else None


def count_shards(location: str, split: str = "test") -> int:
    """Return how many shards a split of a data set has.

    Args:
        location: Folder or URL of the data set.
        split: "test" or "train".

    Raises:
        FileNotFoundError: If there is no such split, or it lacks a shard, with the reason as its
            message.
        ValueError: If `SPLIT/nshards.txt` holds no positive number.
    """
    is_url = "://" in location
    if not is_url and not Path(location).is_dir():
        raise FileNotFoundError(f"no folder {location}")
    try:
        text = read_metadata(location, f"{split}/nshards.txt")
    except OSError as error:
        raise FileNotFoundError(f"cannot reach {location} ({type(error).__name__})") from error
    if text is None:
        raise FileNotFoundError(f"{location} has no {split}/nshards.txt")
    if not text.isdecimal() or int(text) < 1:
        raise ValueError(f"{location}/{split}/nshards.txt must hold a number >= 1, got {text!r}")

    if not is_url:
        absent = [i for i in range(int(text)) if not Path(location, split, f"{i}.tar").is_file()]
        if absent:
            raise FileNotFoundError(
                f"{location} lacks {split}/{absent[0]}.tar ({len(absent)} of {text} shards)"
            )
    return int(text)
