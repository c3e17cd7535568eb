"""Checkpoint files of this trainer, of OpenCLIP's, and of others: reading them safely."""

from __future__ import annotations

import re
import struct
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

WEIGHT_ENDINGS = (".pt", ".pth", ".bin", ".safetensors")
LATEST_NAME = "latest"

_WRAPPER_PREFIXES = ("module.", "_orig_mod.")
_COUNTS = ("epoch", "step", "position")
_RUN_FILES = ("epoch_*.pt", "step_*.pt")
# What a damaged file makes torch raise depends on where the damage lies.
_DAMAGE = (
    UnpicklingError,
    RuntimeError,
    OSError,
    EOFError,
    SafetensorError,
    LookupError,
    ValueError,
    TypeError,
    AttributeError,
    AssertionError,
    ArithmeticError,
    MemoryError,
    struct.error,
    zipfile.BadZipFile,
)


def read_checkpoint(path: Path | str, *, use_mmap: bool = False) -> dict[str, Any]:
    """Read a checkpoint onto the CPU; nothing in it is run.

    Args:
        path: A file of this trainer or of OpenCLIP's, a bare state dict, or safetensors.
        use_mmap: Read weights when they are used. The file must then stay as it is.

    Returns:
        The checkpoint, or {"state_dict": ...} for a file that holds weights alone. Names of
        weights are the plain model's, whatever wrapped it.

    Raises:
        ValueError: If the file is missing, damaged, holds anything but tensors and plain types,
            or no weights.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"checkpoint {str(path)!r} does not exist")
    content: Any
    try:
        if path.suffix == ".safetensors":
            content = load_file(path)
        else:
            # Files from before torch 1.6 are no zip archives and cannot be mapped.
            use_mmap = use_mmap and zipfile.is_zipfile(path)
            with warnings.catch_warnings():
                # What is wrong with a file is told below.
                warnings.simplefilter("ignore")
                content = torch.load(path, map_location="cpu", weights_only=True, mmap=use_mmap)
    except _DAMAGE as error:
        raise ValueError(f"checkpoint {str(path)!r} cannot be read: {_reason(error)}") from error
    if isinstance(content, dict) and "state_dict" not in content:
        content = {"state_dict": content}
    state_dict = content.get("state_dict") if isinstance(content, dict) else None
    if not state_dict or not _is_state_dict(state_dict):
        raise ValueError(f"checkpoint {str(path)!r} cannot be read: it holds no state dict")
    for name in _COUNTS:
        count = content.get(name, 0)
        if type(count) is not int or count < 0:
            raise ValueError(f"checkpoint {str(path)!r} cannot be read: its {name} is {count!r}")
    return {**content, "state_dict": _plain_names(state_dict)}


def newest_checkpoint(folder: Path) -> Path | None:
    """Return the checkpoint a folder calls its latest, else the last written one, if any."""
    pointer = folder / LATEST_NAME
    if pointer.is_file():
        name = pointer.read_text(encoding="utf-8", errors="replace").strip()
        if Path(name).name == name and (folder / name).is_file():
            return folder / name
    files = [path for pattern in _RUN_FILES for path in folder.glob(pattern) if path.is_file()]
    return max(files, key=lambda path: path.stat().st_mtime, default=None)


def first_misfit(own: Mapping[str, Tensor], given: Mapping[str, Tensor]) -> str | None:
    """Return in words the first weight that keeps a file from fitting a model, None if it fits.

    Args:
        own: The model's state dict.
        given: The file's. One number may be a scalar or a vector of one.
    """
    for name in sorted(own.keys() ^ given.keys()):
        return f"only the {'file' if name in given else 'model'} has {name}"
    for name, weight in given.items():
        is_one_number = own[name].numel() == weight.numel() == 1
        if own[name].shape != weight.shape and not is_one_number:
            shapes = f"{tuple(weight.shape)} in the file, {tuple(own[name].shape)} in the model"
            return f"{name} has shape {shapes}"
    return None


def _is_state_dict(content: Any) -> bool:
    return isinstance(content, dict) and all(
        isinstance(name, str) and isinstance(value, Tensor) for name, value in content.items()
    )


def _plain_names(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """Undo what DistributedDataParallel and torch.compile put before names."""
    for prefix in _WRAPPER_PREFIXES * 2:
        if all(name.startswith(prefix) for name in state_dict):
            state_dict = {name.removeprefix(prefix): t for name, t in state_dict.items()}
    return state_dict


def _reason(error: BaseException) -> str:
    """Say why a file was not read; torch's own words advise to run what is in it."""
    text = str(error)
    forbidden = re.search(r"GLOBAL ([\w.]+)", text)
    if isinstance(error, UnpicklingError) and forbidden:
        return f"it holds {forbidden[1]}, which is no tensor or plain type; nothing in it was run"
    if isinstance(error, UnpicklingError):
        return "it is damaged or no checkpoint"
    first = re.split(r"\. |\n", text, maxsplit=1)[0]
    detail = "".join(character for character in first if character.isprintable())
    name = type(error).__name__
    return f"it is damaged or no checkpoint ({name}{f': {detail}' if detail else ''})"
