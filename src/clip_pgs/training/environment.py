"""What a run was made with: `env.json` in its folder."""

from __future__ import annotations

import json
import logging
import platform
import shlex
import subprocess
import sys
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

import clip_pgs
from clip_pgs.common import write_text

FILE_NAME = "env.json"
_logger = logging.getLogger(__name__)
_PACKAGES = ("open_clip_torch", "timm", "torchvision", "webdataset", "numpy")


def describe_environment(*, device: torch.device, world_size: int) -> dict[str, Any]:
    """Return versions, commit, device, processes, command line and date, as plain types."""
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": shlex.join([sys.executable, *sys.argv]),
        "clip_pgs": clip_pgs.__version__,
        "git_commit": _git_commit(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        **{name: _version(name) for name in _PACKAGES},
        "platform": platform.platform(),
        "device": device_name(device),
        "world_size": world_size,
    }


def device_name(device: torch.device) -> str:
    """Return what people call a device."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{_cpu_name()} ({torch.get_num_threads()} threads)"


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def save_environment(environment: dict[str, Any], run_folder: Path) -> None:
    """Write `env.json`; a resumed run keeps its earlier launches under "earlier_launches"."""
    path = run_folder / FILE_NAME
    earlier: list[dict[str, Any]] = []
    if path.is_file():
        try:
            before = json.loads(path.read_text(encoding="utf-8"))
            earlier = [*before.pop("earlier_launches", []), before]
        except (ValueError, TypeError, AttributeError, RecursionError) as error:
            _logger.warning("%s cannot be read: %s; it begins anew", path, error)
    text = json.dumps({**environment, "earlier_launches": earlier}, indent=2) + "\n"
    write_text(path, text)


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _git_commit() -> str | None:
    """Return the commit of this package's own checkout, None where it is installed elsewhere."""
    package = Path(clip_pgs.__file__).resolve().parent
    command = ["git", "-C", str(package), "rev-parse", "--show-toplevel", "HEAD"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return None
    top, commit = answer.splitlines()
    # An environment inside someone else's repository must not pass for ours.
    return commit if Path(top).resolve() / "src" / "clip_pgs" == package else None
