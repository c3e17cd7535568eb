"""Where the results of a training run lie, and which run a folder of results belongs to."""

from __future__ import annotations

import re
from pathlib import Path

EVAL_NAME = "eval"
OPTIONS_NAME = "options.json"

_EPOCH = re.compile(r"epoch_(\d+)")


def is_run(folder: Path) -> bool:
    """Say whether a folder is that of a training run."""
    return (folder / OPTIONS_NAME).is_file() or (folder / "checkpoints").is_dir()


def run_of_results(folder: Path) -> Path | None:
    """Return the run that a folder of results is, or lies right in; absolute, or None."""
    folder = folder.resolve()
    return next((place for place in (folder, folder.parent) if is_run(place)), None)


def run_of_weights(weights: str) -> Path | None:
    """Return the run that a checkpoint or an export lies in, or None.

    Args:
        weights: Where a result says that its weights came from: a path or a name.
    """
    holders = Path(weights).parents[:2]
    # The parent of a name that is no path is the working directory.
    if len(holders) < 2 or not holders[0].is_dir():
        return None
    return next((folder for folder in holders if is_run(folder)), None)


def epoch_folder(run: Path, epoch: int) -> Path:
    """Return where a run keeps what it scored in training after so many epochs."""
    return run / EVAL_NAME / f"epoch_{epoch}"


def epoch_folders(run: Path) -> dict[int, Path]:
    """Return the folders of what a run scored in training, by epoch and in that order."""
    found = {
        int(name[1]): path
        for path in (run / EVAL_NAME).glob("epoch_*")
        if (name := _EPOCH.fullmatch(path.name)) and path.is_dir()
    }
    return dict(sorted(found.items()))


def is_epoch_folder(folder: Path) -> bool:
    """Say whether a folder is one of those that `epoch_folders` finds in its run."""
    folder = folder.resolve()
    in_run = folder.parent.name == EVAL_NAME and is_run(folder.parent.parent)
    return in_run and _EPOCH.fullmatch(folder.name) is not None
