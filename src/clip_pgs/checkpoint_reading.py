"""Checkpoint files of this trainer, of OpenCLIP's, and of others: one rule for who reads them.

    epoch_N.pt, step_N.pt   after N epochs, after N optimizer steps
    epoch_latest.pt         OpenCLIP's `--save-most-recent`
    latest                  the name of the file to go on from, as text
    SHA256SUMS              their checksums, which `sha256sum -c SHA256SUMS` reads

Nothing in a file is ever run, whatever its name: a file is taken for what its first bytes say.
"""

from __future__ import annotations

import hashlib
import logging
import re
import warnings
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import numpy as np
import torch
from safetensors.torch import load as load_bytes
from safetensors.torch import load_file
from torch import Tensor, nn

from clip_pgs.common import explained
from clip_pgs.files import (
    CHECKPOINTS_NAME,
    EXPORT_NAME,
    HF_CONFIG_NAME,
    MAX_RUN_FILE_BYTES,
    MODEL_CONFIG_NAME,
    WEIGHTS_NAME,
    absence,
    list_folder,
    read_json_object,
    read_within,
)

LATEST_NAME = "latest"
MOST_RECENT_NAME = "epoch_latest.pt"
SUMS_NAME = "SHA256SUMS"
# Of one's own run; a file that is named by the user may have any other.
RUN_FILE = re.compile(r"epoch_latest\.pt|(epoch|step)_(\d+)\.pt")

_SUM_LINE = re.compile(r"([0-9a-f]{64})  (.+)")
_CHUNK_BYTES = 1 << 20
_MAX_NAME_BYTES = 256

_WRAPPER_PREFIXES = ("module.", "_orig_mod.")
# What OpenCLIP's CLIP has itself and its CustomTextCLIP has in a module of its own.
_TEXT_TOWER = (
    "text_projection",
    "positional_embedding",
    "token_embedding",
    "transformer",
    "ln_final",
)
_BATCH_COUNTER = ".num_batches_tracked"
_FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
_COUNTS = ("epoch", "step", "position")
# Further than any run counts.
_MAX_COUNT = 2**53
# `numpy.float64(0.1)`, the learning rate in an older optimizer's groups, and what it is made of.
_SCALAR = np.float64(0).__reduce__()[0]
_NUMPY: list[Any] = [
    (_SCALAR, "numpy.core.multiarray.scalar"),
    (_SCALAR, "numpy._core.multiarray.scalar"),
    np.dtype,
    *{type(np.dtype(code)) for code in "?" + np.typecodes["AllInteger"] + np.typecodes["AllFloat"]},
]

_logger = logging.getLogger(__name__)


class _RefusedFileError(ValueError):
    """A file that is whole, and is not read for what it holds."""


def read_checkpoint(path: Path | str, *, use_mmap: bool = False) -> dict[str, Any]:
    """Read a checkpoint onto the CPU; nothing in it is run.

    Args:
        path: A file of this trainer or of OpenCLIP's, a bare state dict, or safetensors, of any
            name.
        use_mmap: Read weights when they are used. The file must then stay as it is.

    Returns:
        The checkpoint, or {"state_dict": ...} for a file that holds weights alone. Names of
        weights are the plain model's, whatever wrapped it; numbers of numpy's are plain ones.

    Raises:
        ValueError: If the file is missing, damaged, compressed, holds anything but tensors and
            plain types, or no weights, or if a tensor stands for more than the file holds of it.
        PermissionError: If it may not be read.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"checkpoint {str(path)!r} {absence(path)}")
    if path.name == LATEST_NAME:
        named = named_latest(path.parent)
        if named is not None and RUN_FILE.fullmatch(named.name):
            raise ValueError(f"{str(path)!r} only names a checkpoint; give {str(named)!r}")
    with explained(f"checkpoint {str(path)!r} cannot be read"):
        content = read_tensors(path, use_mmap=use_mmap)
        if isinstance(content, dict) and "state_dict" not in content:
            content = {"state_dict": content}
        weights = content.get("state_dict") if isinstance(content, dict) else None
        if not isinstance(weights, dict) or not weights:
            raise ValueError("it holds no state dict")
        for name, weight in weights.items():
            if not isinstance(name, str) or not isinstance(weight, Tensor):
                raise ValueError("it holds no state dict")
        for name in _COUNTS:
            count = content.get(name, 0)
            if type(count) is not int or not 0 <= count <= _MAX_COUNT:
                raise ValueError(f"its {name} is {count!r}")
    return {**content, "state_dict": _plain_names(weights)}


def read_tensors(path: Path, *, use_mmap: bool = False) -> Any:
    """Read what `torch.save` or safetensors wrote onto the CPU; nothing in it is run.

    Args:
        path: The file.
        use_mmap: As for `read_checkpoint`.

    Returns:
        A tensor, or tensors and plain types in dicts, lists and tuples.

    Raises:
        ValueError: With the reason alone, as `read_checkpoint` does.
        PermissionError: If it may not be read.
    """
    try:
        content = _read(path, use_mmap=use_mmap)
    # It may be whole.
    except PermissionError:
        raise
    # What a damaged file makes torch raise depends on where the damage lies.
    except Exception as error:
        raise ValueError(_reason(error)) from error
    for name, tensor in named_tensors(content):
        _check_tensor(name[1:] or "it", tensor)
    return content


def load_checkpoint(path: Path | str, *, use_mmap: bool = False) -> dict[str, Any]:
    """Read a checkpoint as `read_checkpoint` does, and compare its checksum.

    Raises:
        ValueError: As `read_checkpoint` and `check_sum` do.
    """
    checkpoint = read_checkpoint(path, use_mmap=use_mmap)
    check_sum(Path(path))
    return checkpoint


def _read(path: Path, *, use_mmap: bool) -> Any:
    # Neither library maps a file whose path has bytes that are no letters, as on old disks.
    is_utf8 = not any("\ud800" <= character <= "\udfff" for character in str(path))
    with path.open("rb") as file:
        head = file.read(9)
    # The length of a header, then the header, which is JSON.
    if path.suffix == ".safetensors" or head[8:] == b"{":
        return load_file(path) if is_utf8 else load_bytes(path.read_bytes())
    # Files from before torch 1.6 are no zip archives and cannot be mapped.
    is_archive = zipfile.is_zipfile(path)
    if is_archive:
        _check_archive(path)
    use_mmap = use_mmap and is_archive and is_utf8
    with warnings.catch_warnings(), torch.serialization.safe_globals(_NUMPY):
        # What is wrong with a file is told by the caller.
        warnings.simplefilter("ignore")
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=use_mmap)
    # Each entry, also one that is there already, takes a byte and more.
    return _plain(content, iter(range(path.stat().st_size)))


def _check_archive(path: Path) -> None:
    """Refuse an archive that `torch.save` did not write, or whose parts are not what lies in it.

    Mapped into memory, a compressed part would be taken for numbers.
    """
    with zipfile.ZipFile(path) as archive:
        parts = archive.infolist()
    # As torch tells it, which compresses the code in it.
    if any(part.filename.endswith("/constants.pkl") for part in parts):
        raise _RefusedFileError(
            "it is a TorchScript archive, which is code as well as weights; nothing in it was run "
            "(OpenAI's own weights are --pretrained openai)"
        )
    if not any(part.filename.endswith("/data.pkl") for part in parts):
        raise _RefusedFileError("it is a zip archive that torch.save did not write")
    if any(part.compress_type != zipfile.ZIP_STORED for part in parts):
        raise _RefusedFileError(
            "it is a compressed zip archive, which torch.save never writes; "
            "torch.save(torch.load(OLD, weights_only=True), NEW) writes it plain"
        )
    if sum(part.file_size for part in parts) > path.stat().st_size:
        raise _RefusedFileError("its parts take more bytes than the file has")


def _check_tensor(name: str, tensor: Tensor) -> None:
    """Refuse a tensor of no use here, and a view of which the file holds only a part."""
    # First: where models are only tried, a sparse one is read to the meta device.
    is_dense = tensor.layout == torch.strided and not tensor.is_meta
    is_exotic = tensor.is_floating_point() and tensor.dtype not in _FLOATS
    if not is_dense or is_exotic or tensor.is_quantized or tensor.is_nested:
        layout = "nested" if tensor.is_nested else tensor.layout
        what = f"{layout}, {tensor.dtype} on {tensor.device}"
        raise ValueError(f"{name} is no dense tensor of plain numbers, got {what}")
    held = tensor.untyped_storage().nbytes() // tensor.element_size()
    if tensor.numel() > held:
        raise ValueError(f"{name} stands for {tensor.numel()} elements, and the file has {held}")


def newest_checkpoint(
    folder: Path,
    *,
    on_damage: Callable[[Path, ValueError], None] | None = None,
    is_checked: bool = True,
) -> Path | None:
    """Return the checkpoint that got furthest among those of a run that are whole.

    Args:
        folder: A run's checkpoint folder, of this trainer or of OpenCLIP's.
        on_damage: Is told of files that cannot be read or whose checksum is wrong. By default
            they are named in a warning.
        is_checked: Compare checksums; without, damage that leaves a file readable goes unseen.

    Returns:
        The file, None where there is none.

    Raises:
        OSError: If the folder or the list of checksums cannot be read, or a file may not be read.
    """
    on_damage = on_damage or (lambda _, error: _logger.warning("%s; it is passed over", error))
    progress: dict[Path, tuple[int, int]] = {}
    for path in (path for path in list_folder(folder) if RUN_FILE.fullmatch(path.name)):
        try:
            content = read_checkpoint(path, use_mmap=True)
        except ValueError as error:
            on_damage(path, error)
        else:
            progress[path] = (content.get("epoch", 0), content.get("step", 0))
    for path in sorted(progress, key=lambda path: progress[path], reverse=True):
        try:
            if is_checked:
                check_sum(path)
        except ValueError as error:
            on_damage(path, error)
        else:
            return path
    return None


def named_latest(folder: Path) -> Path | None:
    """Return the file that a checkpoint folder's `latest` names, which may be gone; else None."""
    pointer = folder / LATEST_NAME
    if not pointer.is_file():
        return None
    with pointer.open("rb") as file:
        text = file.read(_MAX_NAME_BYTES).decode("utf-8", errors="replace")
    return folder / Path(text.strip()).name


def find_checkpoint(path: Path | str, *, is_checked: bool = True) -> Path:
    """Return the file that a user means: a file, or the newest whole one of a run's folder.

    Args:
        path: A file, which is returned as it is, the folder of a run, or its checkpoint folder.
        is_checked: As `newest_checkpoint` takes it.

    Raises:
        ValueError: If it is a folder without any.
    """
    path = Path(path)
    if not path.is_dir():
        return path
    places = (path / CHECKPOINTS_NAME, path)
    found = (newest_checkpoint(place, is_checked=is_checked) for place in places)
    newest = next(filter(None, found), None)
    if newest is None and (path / WEIGHTS_NAME).is_file():
        raise ValueError(
            f"{str(path)!r} is an export: it holds no checkpoint but weights alone, which "
            "--pretrained takes"
        )
    if newest is None and (path / HF_CONFIG_NAME).is_file():
        library = f"another library (its {HF_CONFIG_NAME})"
        # Other libraries name their files alike, and a file may be damaged.
        with suppress(OSError, ValueError):
            if "model_type" in read_json_object(path / HF_CONFIG_NAME, what=HF_CONFIG_NAME):
                library = "transformers"
        raise ValueError(
            f"{str(path)!r} is a model of {library}, whose weights have other names than "
            "open_clip's: it holds no checkpoint"
        )
    if newest is None:
        raise ValueError(f"{str(path)!r} is a folder that holds no checkpoint")
    return newest


def find_weights(path: Path | str, *, is_checked: bool = True) -> Path:
    """Return the file of weights that a user means: as `find_checkpoint`, else that of an export.

    Args:
        path: A file, the folder of a run, of its checkpoints, or of an export.
        is_checked: As `newest_checkpoint` takes it.

    Raises:
        ValueError: If it is a folder without any.
    """
    try:
        return find_checkpoint(path, is_checked=is_checked)
    except ValueError:
        for folder in (Path(path), Path(path, EXPORT_NAME)):
            if (folder / WEIGHTS_NAME).is_file():
                return folder / WEIGHTS_NAME
        raise


def recorded_config(content: Mapping[str, Any]) -> Any:
    """Return the `open_clip_config` that this trainer adds to a checkpoint; None without one."""
    record = content.get("clip_pgs")
    return record.get("open_clip_config") if isinstance(record, dict) else None


def config_of(path: Path, content: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return what a file of weights records of its model, or the config beside it; else None.

    Args:
        path: The file.
        content: From `read_checkpoint`.
    """
    config = recorded_config(content)
    if config is None:
        # Of others' folders; what is wrong with it is told by who builds a model from it.
        with suppress(OSError, ValueError):
            config = read_json_object(path.parent / MODEL_CONFIG_NAME, what=MODEL_CONFIG_NAME)
    return config if isinstance(config, dict) else None


def fit_weights(given: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Return a file's weights under the names, and in the shapes, of a model.

    Weights of a CLIP model fit the same model with a text tower of its own (`custom_text`), one
    number may be a scalar or a vector of one, by the version that wrote it, and a BatchNorm whose
    statistics were frozen counts no batches.

    Args:
        given: A state dict from `read_checkpoint`.
        model: The plain model.

    Raises:
        ValueError: If they do not fit, with the first weight that does not.
    """
    own = model.state_dict()
    given = _own_names(given, own)
    counters = {name: t for name, t in own.items() if name.endswith(_BATCH_COUNTER)}
    used = {n: t for n, t in given.items() if n in own or not n.endswith(_BATCH_COUNTER)}
    given = {**counters, **used}
    only = {"file": given.keys() - own.keys(), "model": own.keys() - given.keys()}
    if only["file"] or only["model"]:
        names = (f"only the {who} has {min(some)}" for who, some in only.items() if some)
        raise ValueError(", ".join(names))
    for name, weight in given.items():
        is_one_number = own[name].numel() == weight.numel() == 1
        if own[name].shape != weight.shape and not is_one_number:
            shapes = f"{tuple(weight.shape)} in the file, {tuple(own[name].shape)} in the model"
            raise ValueError(f"{name} has shape {shapes}")
    check_kinds(given, model)
    return {name: t.reshape(own[name].shape) if t.numel() == 1 else t for name, t in given.items()}


def check_kinds(given: Mapping[str, Tensor], model: nn.Module) -> None:
    """Refuse integers, booleans and complex numbers where a model has floats.

    Args:
        given: A state dict from `read_checkpoint`; names that the model lacks are left alone.
        model: The plain model.

    Raises:
        ValueError: With the first weight that is refused.
    """
    own = model.state_dict()
    for name, weight in _own_names(given, own).items():
        if name in own and own[name].is_floating_point() and not weight.is_floating_point():
            kinds = f"{weight.dtype} in the file, {own[name].dtype} in the model"
            raise ValueError(f"{name} is {kinds}".replace("torch.", ""))


def _own_names(given: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """Return weights under the names of a model with a text tower of its own, if it has one."""
    if "positional_embedding" not in given or "positional_embedding" in own:
        return given
    return {f"text.{n}" if n.startswith(_TEXT_TOWER) else n: t for n, t in given.items()}


def _plain(value: Any, left: Iterator[int]) -> Any:
    """Return numbers of numpy's, as older trainers saved them, as Python's.

    Lists in lists may refer to the same ones again and again; `left` ends where that never would.
    """
    if next(left, None) is None:
        raise _RefusedFileError("it refers to its entries more often than it has bytes")
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, dict):
        return {key: _plain(item, left) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)([_plain(item, left) for item in value])
    return value


def _plain_names(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """Undo what DistributedDataParallel and torch.compile put before names."""
    for prefix in _WRAPPER_PREFIXES * 2:
        if all(name.startswith(prefix) for name in state_dict):
            state_dict = {name.removeprefix(prefix): t for name, t in state_dict.items()}
    return state_dict


def _reason(error: BaseException) -> str:
    """Say why a file was not read; torch's own words advise to run what is in it."""
    text = str(error)
    if isinstance(error, _RefusedFileError):
        return text
    forbidden = re.search(r"GLOBAL ([\w.]+)", text)
    if isinstance(error, UnpicklingError) and forbidden:
        return f"it holds {forbidden[1]}, which is no tensor or plain type; nothing in it was run"
    if isinstance(error, UnpicklingError):
        return "it is damaged or no checkpoint"
    first = re.split(r"\. |\n", text, maxsplit=1)[0]
    detail = "".join(character for character in first if character.isprintable())
    name = type(error).__name__
    return f"it is damaged or no checkpoint ({name}{f': {detail}' if detail else ''})"


def read_sums(folder: Path) -> list[tuple[str, str]]:
    """Return a folder's list of (file name, SHA-256), oldest first.

    A name is there twice while its file is being replaced.

    Raises:
        OSError: If the list cannot be read.
        ValueError: If it is large.
    """
    path = folder / SUMS_NAME
    if not path.is_file():
        return []
    data = read_within(path, what=str(path), max_bytes=MAX_RUN_FILE_BYTES)
    matches = [_SUM_LINE.fullmatch(line) for line in data.decode("utf-8", "replace").splitlines()]
    return [(match[2], match[1]) for match in matches if match]


def check_sum(path: Path) -> None:
    """Compare a checkpoint with the checksum that its folder lists.

    A file that is not listed, such as OpenCLIP's, is checked against the checksums that every
    zip archive has inside.

    Raises:
        OSError: If the list cannot be read.
        ValueError: If they differ, or the list is large.
    """
    digests = [digest for name, digest in read_sums(path.parent) if name == path.name]
    if digests:
        if file_digest(path) not in digests:
            raise ValueError(
                f"checkpoint {str(path)!r} is damaged: its checksum is not the one in {SUMS_NAME}"
            )
        return
    # Files from before torch 1.6 are no archives and have no checksums.
    if not zipfile.is_zipfile(path):
        return
    with (
        explained(f"checkpoint {str(path)!r} is damaged", Exception),
        zipfile.ZipFile(path) as archive,
    ):
        damaged = archive.testzip()
    if damaged is not None:
        raise ValueError(
            f"checkpoint {str(path)!r} is damaged: the checksum of {damaged!r} in it is wrong"
        )


def find_non_finite(checkpoint: Mapping[str, Any]) -> str | None:
    """Say which weight, or number of the optimizer, is NaN or infinite; None if none is."""
    parts = {part: checkpoint.get(part) for part in ("state_dict", "optimizer")}
    for path, tensor in named_tensors(parts):
        if tensor.is_floating_point() or tensor.is_complex():
            num_bad = tensor.numel() - int(torch.isfinite(tensor).sum())
            if num_bad:
                return f"{path[1:]} holds {num_bad} NaN or infinite values of {tensor.numel()}"
    return None


def named_tensors(content: Any, path: str = "") -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors in nested dicts, lists and tuples, each with the path to it."""
    if isinstance(content, Tensor):
        yield path, content
    elif isinstance(content, (Mapping, list, tuple)):
        items = content.items() if isinstance(content, Mapping) else enumerate(content)
        for key, item in items:
            yield from named_tensors(item, f"{path}/{key}")


def weights_digest(state_dict: Mapping[str, Tensor]) -> str:
    """Return a digest of weights: SHA-256 over name, type, shape and bytes, by the names' order.

    Args:
        state_dict: A model's, the whole one.

    Returns:
        64 hexadecimal digits.
    """
    digest = hashlib.sha256()
    for key, tensor in sorted(state_dict.items()):
        digest.update(f"{key} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        raw_bytes = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        raw: Any = raw_bytes.numpy()
        digest.update(memoryview(raw))
    return digest.hexdigest()


def file_digest(path: Path) -> str:
    """Return the SHA-256 of a file, 64 hexadecimal digits.

    Raises:
        OSError: If it cannot be read.
    """
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()
