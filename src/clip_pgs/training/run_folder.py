"""What a run folder remembers of its options, and which of them a resumed run may change."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from clip_pgs.training.options import IDENTITY, RECIPE, TrainOptions, names_of

OPTIONS_FILE = "options.json"
_FILES = "train_files"
_MAX_NAMED = 4


def run_folder(args: TrainOptions) -> Path | None:
    """Return the folder of a named run, None where it has no name yet or keeps nothing."""
    if args.name is None or not keeps_logs(args):
        return None
    return Path(args.logs) / args.name


def keeps_logs(args: TrainOptions) -> bool:
    """Return whether a run writes a folder at all (OpenCLIP: `--logs none` does not)."""
    return bool(args.logs) and args.logs.lower() != "none"


def holds_run(folder: Path) -> bool:
    """Return whether a training run has written into a folder, ours or OpenCLIP's."""
    return any((folder / name).exists() for name in (OPTIONS_FILE, "out.log", "checkpoints"))


def save_options(
    args: TrainOptions,
    folder: Path,
    *,
    files: Sequence[str] = (),
    launch: Mapping[str, str] | None = None,
) -> None:
    """Write the options that a resumed run is compared with to `folder/options.json`.

    Args:
        args: Options.
        folder: The run's folder.
        files: The training data, file by file.
        launch: Who started it, as `made_by` returns it.
    """
    options = {
        name: getattr(args, name) for name in (*names_of(IDENTITY), *names_of(RECIPE), "train_data")
    }
    options[_FILES] = list(files)
    options["launch"] = dict(launch or {})
    # A crash between two writes must not leave half a file.
    unfinished = folder / f"{OPTIONS_FILE}.tmp"
    unfinished.write_text(json.dumps(options, indent=2) + "\n", encoding="utf-8")
    os.replace(unfinished, folder / OPTIONS_FILE)


def made_by(folder: Path) -> dict[str, str]:
    """Return what the launchers called the launch that last wrote into a folder, by launcher."""
    launch = _saved_options(folder).get("launch")
    return launch if isinstance(launch, dict) else {}


def damaged_options(folder: Path) -> str | None:
    """Say what is wrong with a folder's `options.json`; None where it is whole, or not there."""
    path = folder / OPTIONS_FILE
    if not path.exists():
        return None
    try:
        saved = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        return f"{path} cannot be read: {error}"
    return None if isinstance(saved, dict) else f"{path} holds no options"


def changed_options(args: TrainOptions, folder: Path, *, files: Sequence[str] = ()) -> list[str]:
    """Return the changes that make it another experiment, such as "seed 0 -> 1".

    Args:
        args: Options.
        folder: The run's folder.
        files: The training data, file by file: its name, without the folder, comes first.
    """
    saved = _saved_options(folder).get(_FILES)
    if isinstance(saved, list):
        return _changes(args, folder, names_of(IDENTITY)) + _changed_files(
            [str(file) for file in saved], list(files)
        )
    # A run of before, which kept the pattern alone.
    return _changes(args, folder, [*names_of(IDENTITY), "train_data"])


def _changed_files(saved: list[str], now: list[str]) -> list[str]:
    gone, new = list(Counter(saved) - Counter(now)), list(Counter(now) - Counter(saved))
    changes = []
    for file in gone:
        name = file.partition(": ")[0]
        other = next((f for f in new if f.partition(": ")[0] == name), None)
        if other is None:
            changes.append(f"{name} is gone")
        else:
            new.remove(other)
            changes.append(f"{file} -> {other.partition(': ')[2]}")
    changes += [f"{file.partition(': ')[0]} is new" for file in new]
    if not changes and saved != now:
        changes = ["its files in another order"]
    if len(changes) > _MAX_NAMED:
        changes = [*changes[:_MAX_NAMED], f"and {len(changes) - _MAX_NAMED} files more"]
    return [f"train_data {change}" for change in changes]


def changed_recipe(args: TrainOptions, folder: Path) -> list[str]:
    """Return the changes of schedule, batch, precision and the like, such as "lr 0.1 -> 0.2"."""
    return _changes(args, folder, names_of(RECIPE))


def _changes(args: TrainOptions, folder: Path, names: Sequence[str]) -> list[str]:
    saved = _saved_options(folder)
    changes = []
    for name in names:
        now = _plain(getattr(args, name))
        if name in saved and saved[name] != now:
            changes.append(f"{name} {saved[name]!r} -> {now!r}")
    return changes


def _saved_options(folder: Path) -> dict[str, Any]:
    """Return what was saved; nothing where the file is damaged, which `damaged_options` tells."""
    path = folder / OPTIONS_FILE
    if not path.exists() or damaged_options(folder) is not None:
        return {}
    return json.loads(path.read_text(encoding="utf-8"))


def _plain(value: Any) -> Any:
    """Return a value as JSON gives it back: tuples become lists."""
    return json.loads(json.dumps(value))
