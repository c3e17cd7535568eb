"""The run folder: free for a new run, or the same run's for one that goes on."""

from __future__ import annotations

import os
from pathlib import Path

from clip_pgs.training.checks.data import has_training_data, training_files
from clip_pgs.training.options import TrainOptions
from clip_pgs.training.run_folder import changed_options, holds_run, keeps_logs, run_folder

# What file systems take.
_LONGEST_NAME = 255


def check_folder(args: TrainOptions) -> None:
    """Refuse a name that is no folder name, a taken one, and a resume from nothing."""
    if args.name is not None and (
        args.name in ("", ".", "..") or "/" in args.name or "\\" in args.name
    ):
        raise ValueError(f"--name must be one folder name without separators, got {args.name!r}")
    if args.name is not None and len(os.fsencode(args.name)) > _LONGEST_NAME:
        raise ValueError(f"--name must be at most {_LONGEST_NAME} bytes long, got {args.name!r}")
    if args.resume == "latest":
        if args.name is None:
            raise ValueError("--resume latest needs the --name of the run to continue")
        if not keeps_logs(args):
            raise ValueError("--resume latest needs the run's --logs folder, got none")

    folder = run_folder(args)
    for path in (Path(args.logs) if keeps_logs(args) else None, folder):
        if path is not None and path.exists() and not path.is_dir():
            raise ValueError(f"{path} is a file where the folder of the run should go")
    if folder is not None:
        _check_place(folder)
    if folder is None or not holds_run(folder):
        return
    if args.resume != "latest":
        raise ValueError(
            f"run {folder} exists; use --resume latest to continue it or another --name"
        )
    files = training_files(args) if has_training_data(args) else []
    changes = changed_options(args, folder, files=files)
    if changes and not args.accept_changes:
        raise ValueError(
            f"run {folder} cannot continue with other options or data ({', '.join(changes)}); "
            "use another --name, or --accept-changes"
        )


def _check_place(folder: Path) -> None:
    """Refuse a folder that could not be made, or not be written into."""
    place = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not place.is_dir():
        raise ValueError(f"{place} is a file where a folder on the way to {folder} should go")
    if not os.access(place, os.W_OK | os.X_OK):
        raise ValueError(f"the run's folder {folder} needs leave to write in {place}")
