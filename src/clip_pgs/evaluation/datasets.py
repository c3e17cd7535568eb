"""A data set: where it is, which of its files are there, and what its small files say.

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

import contextlib
import json
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, NamedTuple

from clip_pgs.common import expand_home, explained, one_sentence
from clip_pgs.files import list_folder, regular_file

DATA_TYPES = ("classification", "multilabel", "retrieval")
CLASS_NAMES, TEMPLATES = "classnames.txt", "zeroshot_classification_templates.txt"
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
_PAIRS_NAME = "sugar_crepe"
PRESENT, INCOMPLETE, MISSING = "present", "incomplete", "missing"
IMAGE_FOLDER = "val2017"
HUB_ROOT = "https://huggingface.co/datasets/clip-benchmark/wds_{dataset_cleaned}/tree/main"
_LOCAL_ROOT = "data/eval"
_HUB_TIMEOUT_S, _NUM_RETRIES = 20, 5
_MAX_TEXT_BYTES, _MAX_PAIRS_BYTES = 2**24, 2**24
# ImageNet-21k has 21,841 classes, and ImageNet 80 templates. Each class takes kB as a feature.
_MAX_CLASSES, _MAX_TEMPLATES = 100_000, 1000
# Many times what a text tower takes. A tokenizer's time grows with the square of a word's length.
MAX_TEXT = 2000
_MAX_EQUAL_SHARE, _MAX_SHOWN = 0.05, 5
_PAIR_KEYS = ("filename", "caption", "negative_caption")


class DamagedDataError(ValueError):
    """A data set that is there and cannot be scored, told in one sentence."""


class ServerError(OSError):
    """A server that refuses a file, breaks off or says nothing, told in one sentence."""


@dataclass(frozen=True)
class EvalSet:
    """One data set as one suite evaluates it.

    Attributes:
        name: Its name without `wds/`, as results show it.
        location: Folder or URL; the place that was looked in if there is none.
        suite: Name of the suite, such as "zeroshot-classification".
        task: clip_benchmark's name of the task, such as "zeroshot_classification".
        splits: Parts of it that are read: webdataset splits, or SugarCrepe's split.
        is_reference: Whether the suite's other sets are variants of this one.
    """

    name: str
    location: str
    suite: str
    task: str
    splits: tuple[str, ...] = ("test",)
    is_reference: bool = False

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

    parts = (short_name, cleaned, f"wds_{cleaned}")
    candidates = [Path(data_root, expand_home(part)) for part in parts]
    # os.path: a name that is too long for a folder is that of none.
    folder = next((path for path in candidates if os.path.isdir(path)), candidates[0])
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
    candidates = [Path(data_root, expand_home(folder_name))]
    if folder_name == _PAIRS_NAME:
        candidates.append(Path(data_root))
    holders = (path for path in candidates if os.path.isfile(path / f"{split}.json"))
    return shown, str(next(holders, candidates[0]))


def is_template(data_root: str) -> bool:
    """Say whether a data root is filled in for each data set, rather than a folder of them."""
    return "{dataset}" in data_root or "{dataset_cleaned}" in data_root


def is_remote(location: str) -> bool:
    """Say whether a data set is on a server, rather than in a folder."""
    return "://" in location


def read_metadata(location: str, file_name: str) -> str | None:
    """Read one of a data set's small text files.

    Args:
        location: Folder or URL of the data set.
        file_name: Such as "dataset_type.txt" or "test/nshards.txt".

    Returns:
        The text without white space at its end, or None if the file does not exist. A class is
        the number of its line, so that an empty first one stays.

    Raises:
        OSError: If the file cannot be read, or the server cannot be reached.
        DamagedDataError: If it is no text, or larger than 16 MiB.
    """
    try:
        with open_file(location, file_name, is_text=True) as file:
            content = file.read(_MAX_TEXT_BYTES + 1)
    except (FileNotFoundError, IsADirectoryError):
        return None
    if len(content) > _MAX_TEXT_BYTES:
        raise DamagedDataError(f"{location}/{file_name} is larger than {_MAX_TEXT_BYTES} bytes")
    with explained(
        f"{location}/{file_name} is no UTF-8 text", UnicodeDecodeError, as_kind=DamagedDataError
    ):
        return content.decode("utf-8-sig").rstrip()


@contextlib.contextmanager
def open_file(location: str, file_name: str, *, is_text: bool = False) -> Iterator[BinaryIO]:
    """Open a file of a data set.

    Args:
        location: Folder or URL of the data set.
        file_name: Such as "test/0.tar".
        is_text: Whether it is a small text file; the hub has them in another place.

    Yields:
        The content; of a file on a server as it comes.

    Raises:
        FileNotFoundError: If there is no such file.
        OSError: If it cannot be read, of a server as a `ServerError`.
    """
    if not is_remote(location):
        with regular_file(Path(location, file_name)).open("rb") as file:
            yield file
        return

    import requests
    from requests.adapters import HTTPAdapter, Retry

    url = _url_of(location, file_name, is_text=is_text)
    with _telling_of_server(url), requests.Session() as session:
        retries = Retry(_NUM_RETRIES, backoff_factor=0.5, status_forcelist=(429, 502, 503, 504))
        session.mount("https://", HTTPAdapter(max_retries=0 if is_text else retries))
        with session.get(url, timeout=_HUB_TIMEOUT_S, stream=True) as response:
            # The hub answers 401, not 404, where there is no such data set.
            if response.status_code in (401, 403, 404):
                raise FileNotFoundError(f"there is no {url}")
            response.raise_for_status()
            response.raw.decode_content = True
            yield response.raw


def server_versions(location: str, file_names: Iterable[str]) -> list[list[str | None]]:
    """Return what a server tells of the present content of files: their tag or date, and size.

    Args:
        location: URL of the data set.
        file_names: Such as "test/0.tar"; after the first that the server does not tell of, no
            other is asked for.

    Raises:
        ServerError: If it cannot be reached, or has no time for it now.
    """
    import requests

    versions = []
    with _telling_of_server(location), requests.Session() as session:
        for file_name in file_names:
            url = _url_of(location, file_name)
            answer = session.head(url, timeout=_HUB_TIMEOUT_S, allow_redirects=True)
            if answer.status_code == 429 or answer.status_code >= 500:
                answer.raise_for_status()
            if not answer.ok:
                break
            headers = answer.headers
            tag = headers.get("ETag", headers.get("Last-Modified"))
            versions.append([tag, headers.get("Content-Length")])
    return versions


@contextlib.contextmanager
def _telling_of_server(url: str) -> Iterator[None]:
    import requests
    import urllib3

    try:
        yield
    # While an answer is read, urllib3's own errors come through.
    except (requests.RequestException, urllib3.exceptions.HTTPError) as error:
        raise ServerError(f"{url} cannot be read: {one_sentence(error)}") from error


def _url_of(location: str, file_name: str, *, is_text: bool = False) -> str:
    if "huggingface.co" in location:
        # The hub serves plain files under `raw`, and what is large under `resolve`.
        location = location.replace("/tree/", "/raw/" if is_text else "/resolve/", 1)
    return f"{location}/{file_name}"


def declared_type(location: str, *, is_there: bool = False) -> str | None:
    """Return the type a data set declares, one of `DATA_TYPES`.

    Args:
        location: Folder or URL of the data set.
        is_there: Whether the data set is known to be there.

    Returns:
        The type, or None if the data set is not there or declares none, as many on the hub do.

    Raises:
        DamagedDataError: If it declares something else, or may not be read.
        OSError: If a data set that is there cannot be read.
        ServerError: If its server does not say whether it declares one.
    """
    try:
        declared = (read_metadata(location, "dataset_type.txt") or "").strip()
    except PermissionError as error:
        raise DamagedDataError(one_sentence(error)) from error
    except OSError as error:
        if is_there or isinstance(error, ServerError):
            raise
        return None
    if not declared:
        return None
    if declared.lower() not in DATA_TYPES:
        choices = ", ".join(DATA_TYPES)
        raise DamagedDataError(
            f"{location}/dataset_type.txt must hold one of {choices}, got {declared[:80]!r}"
        )
    return declared.lower()


def read_class_names(location: str) -> list[str] | None:
    """Return the names of a data set's classes, or None if it has no `classnames.txt`.

    Args:
        location: Folder or URL of the data set.

    Raises:
        OSError: If they cannot be read.
        DamagedDataError: If there is none or there are more than 100,000, a line is empty or broken
            by another character than a line feed, or more than a twentieth of them are names of
            other classes; ImageNet's have two such.
    """
    text = read_metadata(location, CLASS_NAMES)
    if text is None:
        return None
    names = [line.strip() for line in text.splitlines()]
    _check_number(names, _MAX_CLASSES, f"{location}/{CLASS_NAMES}")
    # clip_benchmark ends a line at each of Unicode's line boundaries, which moves all later labels.
    for number, line in enumerate(re.split(r"\r\n?|\n", text), start=1):
        if len(line.splitlines()) > 1:
            raise DamagedDataError(
                f"line {number} of {location}/{CLASS_NAMES} must be one line without other line "
                f"breaks, got {line[:80]!r}"
            )
    _check_lengths(names, f"{location}/{CLASS_NAMES}")
    if not names or not all(names):
        line = names.index("") + 1 if names else 1
        raise DamagedDataError(f"line {line} of {location}/{CLASS_NAMES} must name a class")
    if num_lost := too_many_equal(names):
        raise DamagedDataError(
            f"{location}/{CLASS_NAMES} must give {len(names)} classes names of their own, got "
            f"{', '.join(map(repr, equal_names(names)[:_MAX_SHOWN]))} more than once ({num_lost} "
            "too many)"
        )
    return names


def equal_names(names: Sequence[str]) -> list[str]:
    """Return the names that make one prompt with another's: no image tells them apart."""
    counts = Counter(map(as_prompt, names))
    return [name for name, count in counts.items() if count > 1]


def too_many_equal(names: Sequence[str]) -> int:
    """Return how many names repeat another's prompt, 0 where those are few."""
    num_lost = len(names) - len(set(map(as_prompt, names)))
    return num_lost if num_lost > _MAX_EQUAL_SHARE * len(names) else 0


def as_prompt(name: str) -> str:
    """Return a name or caption as tokenizers see it, which pass over case and width of spaces."""
    return " ".join(name.lower().split())


def read_templates(location: str) -> list[str]:
    """Return a data set's prompts, each with a `{c}` for the name of a class.

    Args:
        location: Folder or URL of the data set.

    Raises:
        OSError: If they cannot be read.
        DamagedDataError: If there is none or there are more than 1,000, or a line has no `{c}` or
            other braces.
    """
    lines = (read_metadata(location, TEMPLATES) or "").splitlines()
    _check_number(lines, _MAX_TEMPLATES, f"{location}/{TEMPLATES}")
    _check_lengths(lines, f"{location}/{TEMPLATES}")
    for number, line in enumerate(lines or [""], start=1):
        if "{c}" not in line or set("{}") & set(line.replace("{c}", "")):
            raise DamagedDataError(
                f"line {number} of {location}/{TEMPLATES} must hold {{c}} for the name of a class, "
                f"and no other braces, got {line[:80]!r}"
            )
    return [line.strip() for line in lines]


def _check_number(lines: Sequence[str], limit: int, where: str) -> None:
    if len(lines) > limit:
        raise DamagedDataError(f"{where} must have at most {limit} lines, got {len(lines)}")


def _check_lengths(lines: Sequence[str], where: str) -> None:
    """Refuse lines that a tokenizer would read for minutes, and of which it keeps the first."""
    for number, line in enumerate(lines, start=1):
        if len(line) > MAX_TEXT:
            raise DamagedDataError(
                f"line {number} of {where} must have at most {MAX_TEXT} characters, got {len(line)}"
            )


def count_shards(location: str, split: str = "test") -> int:
    """Return how many shards a split of a data set has: `0.tar`, `1.tar`, ...

    Args:
        location: Folder or URL of the data set.
        split: "test" or "train".

    Raises:
        FileNotFoundError: If there is no such split, or it lacks a shard, with the reason as its
            message.
        DamagedDataError: If `SPLIT/nshards.txt` holds no positive number, or fewer than there are
            shards in the folder.
        OSError: If the folder cannot be read.
    """
    if not is_remote(location) and not os.path.isdir(location):
        raise FileNotFoundError(f"no folder {location}")
    try:
        text = read_metadata(location, f"{split}/nshards.txt")
    except OSError as error:
        kind = type(error.__cause__ or error).__name__
        raise FileNotFoundError(f"cannot reach {location} ({kind})") from error
    if text is None:
        raise FileNotFoundError(f"{location} has no {split}/nshards.txt")
    if not re.fullmatch(r"\s*[0-9]{1,9}", text) or int(text) < 1:
        raise DamagedDataError(
            f"{location}/{split}/nshards.txt must hold a number from 1 to 999999999, "
            f"got {text[:80]!r}"
        )
    count = int(text)
    if not is_remote(location):
        _compare_shards(location, split, count)
    return count


def list_shards(location: str, split: str) -> list[Path]:
    """Return the shards that a split has in its folder, in the order of their names.

    Args:
        location: Folder of the data set.
        split: "test" or "train".

    Raises:
        OSError: If the folder cannot be read.
    """
    return [path for path in list_folder(Path(location, split)) if path.suffix == ".tar"]


def _compare_shards(location: str, split: str, count: int) -> None:
    """Refuse a number that is not the number of shards in the folder."""
    there = {path.stem for path in list_shards(location, split)}
    for stem in sorted(there):
        if not re.fullmatch("0|[1-9][0-9]{0,8}", stem) or int(stem) >= count:
            raise DamagedDataError(
                f"{location}/{split}/nshards.txt says {count}, which are 0.tar to {count - 1}.tar, "
                f"but there is {stem}.tar"
            )
    if len(there) < count:
        first = next(number for number in range(count) if str(number) not in there)
        num_absent = count - len(there)
        raise FileNotFoundError(
            f"{location} lacks {split}/{first}.tar ({num_absent} of {count} shards)"
        )


class CaptionPair(NamedTuple):
    """An image, by its name in `IMAGE_FOLDER`, what it shows, and what it does not."""

    file_name: str
    caption: str
    negative: str


def read_caption_pairs(folder: Path, split: str) -> list[CaptionPair]:
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
    if path.stat().st_size > _MAX_PAIRS_BYTES:
        raise DamagedDataError(f"{path} is larger than {_MAX_PAIRS_BYTES} bytes")
    # The last where it nests too deep.
    with explained(f"{path} is not JSON", ValueError, RecursionError, as_kind=DamagedDataError):
        content = json.loads(path.read_bytes())
    items = list(content.values()) if isinstance(content, dict) else content
    if not isinstance(items, list) or not items or not all(_is_item(item) for item in items):
        raise DamagedDataError(f"{path} must hold items with {', '.join(_PAIR_KEYS)}")
    pairs = [CaptionPair(*(item[key] for key in _PAIR_KEYS)) for item in items]
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
        ValueError: As `read_caption_pairs`.
    """
    names = sorted({pair.file_name for pair in read_caption_pairs(folder, split)})
    absent = [name for name in names if not (folder / IMAGE_FOLDER / name).is_file()]
    if absent:
        raise FileNotFoundError(
            f"{folder} lacks {IMAGE_FOLDER}/{absent[0]} ({len(absent)} of {len(names)} images)"
        )
    return [folder / IMAGE_FOLDER / name for name in names]


def _is_item(item: object) -> bool:
    return isinstance(item, dict) and all(isinstance(item.get(key), str) for key in _PAIR_KEYS)


class Presence(NamedTuple):
    """Whether a data set can be evaluated, one of `PRESENT`, ..., and what is not there."""

    state: str
    reason: str | None = None


def check_presence(eval_set: EvalSet) -> Presence:
    """Say whether all files of a data set are there; of remote ones, the small files alone.

    Args:
        eval_set: The data set as a suite evaluates it.
    """
    try:
        require(eval_set)
    except (OSError, ValueError) as error:
        state = INCOMPLETE if has_folder(eval_set.location) else MISSING
        return Presence(state, one_sentence(error))
    return Presence(PRESENT)


def has_folder(location: str) -> bool:
    """Say whether a data set has a folder here, complete or not."""
    return not is_remote(location) and os.path.isdir(location)


def require(eval_set: EvalSet) -> None:
    """Check that a data set can be evaluated.

    Args:
        eval_set: The data set as a suite evaluates it.

    Raises:
        FileNotFoundError: If something is not there, with what it is as its message.
        ValueError: If a file that lists others is damaged.
    """
    if is_caption_pairs(eval_set.name):
        if not os.path.isdir(eval_set.location):
            raise FileNotFoundError(f"no folder {eval_set.location}")
        image_paths(Path(eval_set.location), eval_set.splits[0])
        return
    for split in eval_set.splits:
        count_shards(eval_set.location, split)
    declared_type(eval_set.location, is_there=True)
    if eval_set.task == "zeroshot_classification":
        for file_name in (CLASS_NAMES, TEMPLATES):
            if read_metadata(eval_set.location, file_name) is None:
                raise FileNotFoundError(f"{eval_set.location} has no {file_name}")
        read_class_names(eval_set.location)
        read_templates(eval_set.location)


def local_files(eval_set: EvalSet) -> list[Path]:
    """Return the files of a data set that scores depend on; none of a remote one.

    Args:
        eval_set: A data set that passes `require`.
    """
    if is_remote(eval_set.location):
        return []
    folder = Path(eval_set.location)
    if is_caption_pairs(eval_set.name):
        split = eval_set.splits[0]
        return [folder / f"{split}.json", *image_paths(folder, split)]
    paths = [path for split in eval_set.splits for path in list_shards(eval_set.location, split)]
    paths += [folder / split / "nshards.txt" for split in eval_set.splits]
    small_files = (folder / name for name in (CLASS_NAMES, TEMPLATES, "dataset_type.txt"))
    return [*paths, *(path for path in small_files if path.is_file())]
