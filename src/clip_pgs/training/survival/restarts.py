"""Launches that go on by themselves: torchrun's `--max-restarts` and Slurm's requeueing.

Such a launch may use its run's name again without being told to, and nobody else may: the run's
`options.json` says which launch made it.
"""

from __future__ import annotations

import os
from pathlib import Path

from clip_pgs.training.options import TrainOptions
from clip_pgs.training.run_folder import keeps_logs, made_by, run_folder
from clip_pgs.training.survival.exits import LAUNCH_FOLDER

_COUNTS = {"torchrun": "TORCHELASTIC_RESTART_COUNT", "slurm": "SLURM_RESTART_COUNT"}
_NAMES = {"torchrun": "TORCHELASTIC_RUN_ID", "slurm": "SLURM_JOB_ID"}
_NAME_FILE = "run_name"


def launch_names() -> dict[str, str]:
    """Return what torchrun and Slurm call this launch; both keep it when they restart it."""
    return {kind: os.environ[name] for kind, name in _NAMES.items() if name in os.environ}


def follow_restart(args: TrainOptions) -> None:
    """Let a run that its launcher started again go on from its last checkpoint.

    Args:
        args: Options; `name` and `resume` are set where a launcher restarted this run.
    """
    kinds = [kind for kind, name in _COUNTS.items() if int(os.environ.get(name, "0")) > 0]
    if not kinds or not keeps_logs(args):
        return
    args.name = args.name or _remembered_name()
    folder = run_folder(args)
    if folder is None or not folder.is_dir():
        return
    names = launch_names()
    earlier = made_by(folder)
    if any(kind in names and earlier.get(kind) == names[kind] for kind in kinds):
        args.resume_instead = None if args.resume == "latest" else args.resume
        args.resume = "latest"


def remember_name(name: str) -> None:
    """Tell later attempts of this launch how the run was named, where a launcher cares."""
    path = _name_path()
    if path is not None:
        path.write_text(name, encoding="utf-8")


def _remembered_name() -> str | None:
    path = _name_path()
    return path.read_text(encoding="utf-8") if path is not None and path.is_file() else None


def _name_path() -> Path | None:
    folder = os.environ.get(LAUNCH_FOLDER)
    return Path(folder) / _NAME_FILE if folder else None
