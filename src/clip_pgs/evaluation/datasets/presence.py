"""Which files a data set needs, which of them are there, and how large they are."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from clip_pgs.evaluation.datasets.caption_pairs import image_paths
from clip_pgs.evaluation.datasets.datasets import (
    CLASS_NAMES,
    TEMPLATES,
    EvalSet,
    count_shards,
    is_remote,
    read_class_names,
    read_metadata,
    read_templates,
)

PRESENT, INCOMPLETE, MISSING = "present", "incomplete", "missing"


@dataclass(frozen=True)
class Presence:
    """Whether a data set can be evaluated.

    Attributes:
        state: "present", "incomplete" or "missing".
        reason: What is not there; None where all is.
    """

    state: str
    reason: str | None = None


def check_presence(eval_set: EvalSet) -> Presence:
    """Say whether all files of a data set are there; of remote ones, the small files alone.

    Args:
        eval_set: The data set as a suite evaluates it.
    """
    try:
        require(eval_set)
    except (FileNotFoundError, ValueError) as error:
        location = eval_set.location
        is_known = is_remote(location) or not Path(location).is_dir()
        return Presence(MISSING if is_known else INCOMPLETE, str(error))
    return Presence(PRESENT)


def require(eval_set: EvalSet) -> None:
    """Check that a data set can be evaluated.

    Args:
        eval_set: The data set as a suite evaluates it.

    Raises:
        FileNotFoundError: If something is not there, with what it is as its message.
        ValueError: If a file that lists others is damaged.
    """
    if eval_set.task == "image_caption_selection":
        if not Path(eval_set.location).is_dir():
            raise FileNotFoundError(f"no folder {eval_set.location}")
        image_paths(Path(eval_set.location), eval_set.splits[0])
        return
    for split in eval_set.splits:
        count_shards(eval_set.location, split)
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
    if eval_set.task == "image_caption_selection":
        split = eval_set.splits[0]
        return [folder / f"{split}.json", *image_paths(folder, split)]
    paths = [path for split in eval_set.splits for path in folder.joinpath(split).glob("*.tar")]
    paths += [folder / split / "nshards.txt" for split in eval_set.splits]
    small_files = (folder / name for name in (CLASS_NAMES, TEMPLATES, "dataset_type.txt"))
    return [*paths, *(path for path in small_files if path.is_file())]
