"""A run's checkpoints: what they hold, how they are written, and how a run takes one up again.

    epoch_N.pt, step_N.pt   after N epochs, after N optimizer steps
    epoch_latest.pt         OpenCLIP's `--save-most-recent`
    latest                  the name of the file to go on from, as text
    SHA256SUMS              their checksums, which `sha256sum -c` reads

A file has OpenCLIP's layout. It holds tensors and plain types only, so that
`torch.load(weights_only=True)` opens it, and weights under the plain model's names, whatever
wrapped it while training. "epoch" counts completed epochs, "step" the run's optimizer steps,
"position" the samples of the epoch under way that all ranks together have seen. Under "clip_pgs"
lies the run's record, from which `clip_pgs.training.export` makes an export without the run, under
"masking_state" what a masking learned beside the weights.

At every moment `latest` names a file that loads: a file is written beside its place, read,
listed in SHA256SUMS, synced, put into its place, and only then named in `latest`; only after that
are older ones removed. The run waits for a copy in memory, a thread for the disk.
"""

from __future__ import annotations

import errno
import hashlib
import logging
import math
import os
import re
import shutil
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, fields
from itertools import product
from numbers import Integral, Real
from pathlib import Path
from time import perf_counter
from types import NoneType
from typing import IO, Any, BinaryIO, cast

import torch
from torch import Tensor, nn

from clip_pgs.checkpoint_reading import (
    LATEST_NAME,
    RUN_FILE,
    SUMS_NAME,
    find_checkpoint,
    find_non_finite,
    fit_weights,
    load_checkpoint,
    named_latest,
    named_tensors,
    newest_checkpoint,
    read_checkpoint,
    read_sums,
)
from clip_pgs.common import as_plain, explained, one_sentence
from clip_pgs.files import (
    CHECKPOINTS_NAME,
    LOG_NAME,
    MAX_LINES_BYTES,
    METRICS_NAME,
    UNFINISHED_ENDING,
    atomic_file,
    read_json_lines,
    write_text,
)
from clip_pgs.integrations.open_clip import load_masking_state
from clip_pgs.tables import counted
from clip_pgs.training.distributed import ProcessGroup, full_tensor, shard_like
from clip_pgs.training.options import TrainOptions

DAMAGED_ENDING = ".damaged"

# What `CheckpointStore` logs of a checkpoint that it wrote, in rank 0's file.
_SAVED = re.compile(rb"\| INFO \| Saved \S+ \(epoch \d+, step (\d+)\)")
_LOGS = (LOG_NAME, "out-0")
_MAX_LOG_LINE = 2**20
# Of a checkpoint that is written, what may wait in memory for the disk.
_UNSYNCED_BYTES = 2**26

# What optimizers count in their groups; all else there is how they compute.
_COUNTED = ("step", "lookahead_step")
# And a loss scaler, with the least that each can be.
_SCALED = {"scale": 1e-30, "_growth_tracker": 0}
# What a run's record holds, see `clip_pgs.training.run_folder.describe_run`.
_RECORD: dict[str, type] = {
    **dict.fromkeys(("version", "model", "masking", "device"), str),
    **dict.fromkeys(("open_clip_config", "masking_options", "data", "recipe"), dict),
    **dict.fromkeys(("cost", "metrics"), dict),
    "world_size": int,
}

# What the window of an epoch under way always holds, see `clip_pgs.training.telemetry`.
_WINDOW = {"patches", "steps", "good", "epoch/loss", "epoch/steps"}

_logger = logging.getLogger(__name__)


# ------------------------------------------------------------------------------------------------
# What a checkpoint holds
# ------------------------------------------------------------------------------------------------


@dataclass
class Cost:
    """What a run has spent since its very beginning, resumed launches included.

    A checkpoint of OpenCLIP's trainer does not say what it took: steps and samples of its epochs
    are counted, as this run's options have them, and operations and time are not.

    Args:
        steps: Optimizer steps.
        samples: Image-caption pairs over all ranks.
        flops: Floating-point operations over all ranks.
        selection_flops: Of these, what choosing patches took.
        seconds: Wall time.
        skipped_steps: Steps that changed nothing, as their numbers were not finite.
        skipped_samples: Samples that could not be used.
        unmeasured_steps: Of the steps the first, whose `flops`, `selection_flops` and `seconds`
            are not known and not counted.
    """

    steps: int = 0
    samples: int = 0
    flops: float = 0.0
    selection_flops: float = 0.0
    seconds: float = 0.0
    skipped_steps: int = 0
    skipped_samples: int = 0
    unmeasured_steps: int = 0


def pack_checkpoint(
    *,
    epoch: int,
    name: str,
    model: nn.Module,
    record: dict[str, Any],
    step: int = 0,
    position: int = 0,
    optimizer: torch.optim.Optimizer | None = None,
    scaler: torch.amp.GradScaler | None = None,
    masking_state: dict[str, Any] | None = None,
    window: dict[str, Tensor] | None = None,
) -> dict[str, Any]:
    """Collect a run's state as OpenCLIP names it; what is not there is left out.

    Args:
        epoch: Completed epochs.
        name: The run's name.
        model: The plain model.
        record: Plain types that describe the run; stored under "clip_pgs".
        step: Optimizer steps of the run.
        position: Samples of the epoch under way that all ranks together have seen.
        optimizer: Its optimizer.
        scaler: The loss scaler.
        masking_state: What the masking learned and no weight holds, such as a teacher.
        window: What the epoch under way measured and no curve has yet, as scalars.
    """
    checkpoint = {
        "epoch": epoch,
        "step": step,
        "position": position,
        "name": name,
        "state_dict": model.state_dict(),
        "clip_pgs": record,
    }
    if optimizer is not None:
        checkpoint["optimizer"] = optimizer.state_dict()
    if scaler is not None:
        checkpoint["scaler"] = scaler.state_dict()
    if masking_state:
        checkpoint["masking_state"] = masking_state
    if window:
        checkpoint["window"] = window
    return checkpoint


def damaged_entry(checkpoint: Mapping[str, Any], *, is_exported: bool = False) -> str | None:
    """Say which of the entries beside the weights is not what a trainer writes, None if none is.

    Args:
        checkpoint: From `load_checkpoint`.
        is_exported: Whether the record must be whole, as a card describes all of it.
    """
    record = checkpoint.get("clip_pgs") or {}
    parts = ("optimizer", "scaler", "masking_state", "window", "clip_pgs")
    entries: list[tuple[str, Any, type]] = [(name, checkpoint.get(name), dict) for name in parts]
    if isinstance(record, dict):
        entries += [(f"clip_pgs/{name}", record.get(name), k) for name, k in _RECORD.items()]
    for name, entry, kind in entries:
        if entry is not None and not isinstance(entry, kind):
            return f"its {name} holds {type(entry).__name__}, and not {kind.__name__}"
        if entry is None and is_exported and "/" in name:
            return f"it has no {name}"
    cost, metrics = record.get("cost") or {}, record.get("metrics") or {}
    known = [field.name for field in fields(Cost)]
    for name in cost.keys() - known:
        return f"its clip_pgs/cost holds {name!r}, which no trainer writes"
    for name, value in (cost | metrics).items():
        if not isinstance(value, Real):
            return f"its clip_pgs record says {value!r} of {name}, which is no number"
    scaler = checkpoint.get("scaler") or {}
    for name, least in _SCALED.items() if scaler else ():
        number: Any = scaler.get(name)
        if type(number) not in (int, float) or not least <= number < math.inf:
            return f"its scaler says {number!r} of {name}"
    window = checkpoint.get("window") or {}
    for name in sorted(_WINDOW - window.keys()) if window else ():
        return f"its window has no {name!r}"
    for name, value in window.items():
        if not isinstance(value, Tensor) or value.numel() != 1:
            return f"its window holds no number as {name!r}"
    if is_exported and not isinstance(record.get("tokenizer"), (str, NoneType)):
        return f"its clip_pgs record says {record['tokenizer']!r} of tokenizer, which is no name"
    return None


# ------------------------------------------------------------------------------------------------
# From state to disk
# ------------------------------------------------------------------------------------------------


class CheckpointStore:
    """Saves a run's checkpoints, one at a time, while the run goes on.

    A checkpoint that cannot be written, or that holds a NaN, is logged as an error and leaves
    all older ones, and `latest`, as they are.

    Args:
        folder: The run's checkpoint folder, in which nobody else writes.
        keep_last: How many files `step_N.pt` to keep, at least 1; None keeps all.
        delete_previous: Remove an epoch's file once the next epoch's is there.

    Raises:
        ValueError: If `keep_last` < 1.
    """

    def __init__(
        self, folder: Path, *, keep_last: int | None = None, delete_previous: bool = False
    ) -> None:
        if keep_last is not None and keep_last < 1:
            raise ValueError(f"keep_last must be >= 1, got {keep_last}")
        self._folder = folder
        self._keep_last = keep_last
        self._delete_previous = delete_previous
        self._host = HostCopy()
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoints")
        self._writing: Future[bool] | None = None
        self._last = folder
        self._written = 0
        for path in sorted(folder.glob(f".*{UNFINISHED_ENDING}")):
            path.unlink()
            _logger.warning(
                "Removed %s, which was being written when the run was killed", path.name
            )

    @property
    def is_busy(self) -> bool:
        """Whether the last checkpoint is still being written, so that `save` would wait for it."""
        return self._writing is not None and not self._writing.done()

    def num_written(self) -> int:
        """Return the bytes that were written so far: where they grow, the disk lives."""
        return self._written

    def _count(self, num_bytes: int) -> None:
        self._written += num_bytes

    def save(self, content: Mapping[str, Any], *names: str) -> None:
        """Copy a checkpoint and leave it to be written.

        Args:
            content: From `pack_checkpoint`.
            *names: Files to write it to, at least one; `latest` names the first.

        Raises:
            ValueError: If the content holds more than tensors and plain types.
        """
        started = perf_counter()
        self.wait()
        copied = self._host.take(content)
        held = perf_counter() - started
        self._last = self._folder / names[0]
        self._writing = self._thread.submit(self._write, copied, names, held)

    def wait(self) -> bool:
        """Wait for the last checkpoint; return whether it is there, True if none was saved."""
        if self._writing is None:
            return True
        return self._writing.result() and self._last.is_file()

    def close(self) -> bool:
        """Wait for the last checkpoint, return as `wait` does, and save nothing more."""
        self._thread.shutdown()
        return self.wait()

    def _write(self, content: dict[str, Any], names: tuple[str, ...], held: float) -> bool:
        started = perf_counter()
        place = f"(epoch {content['epoch']}, step {content['step']})"
        is_saved, name, trouble = False, names[0], find_non_finite(content)
        try:
            for name in () if trouble else names:
                write_checkpoint(content, self._folder / name, on_write=self._count)
                if name == names[0]:
                    name_latest(self._folder / name)
                    is_saved = True
        except OSError as error:
            trouble = error.strerror or str(error)
        except ValueError as error:
            trouble = str(error)
        if trouble is not None:
            rest = ""
            if is_saved:
                rest = f"; {names[0]}, which has the same, was"
            elif any(path.name != name for path in self._folder.glob("*.pt")):
                rest = "; older checkpoints are untouched"
            _logger.error("%s %s was not saved: %s%s", name, place, trouble, rest)
        if not is_saved:
            return False
        _logger.info(
            "Saved %s %s: held the run for %.3f s, written in %.3f s",
            names[0],
            place,
            held,
            perf_counter() - started,
        )
        try:
            self._remove_older(content, names)
        except OSError as error:
            _logger.warning("An older checkpoint could not be removed: %s", error)
        return True

    def _remove_older(self, content: dict[str, Any], names: tuple[str, ...]) -> None:
        stale: list[Path] = []
        if self._keep_last is not None:
            stale += self._older("step", below=content["step"] + 1)[: -self._keep_last]
        if self._delete_previous and any(name.startswith("epoch") for name in names):
            stale += self._older("epoch", below=content["epoch"])[-1:]
        for path in stale:
            path.unlink()

    def _older(self, kind: str, *, below: int) -> list[Path]:
        """Return the files of a kind with numbers below one, in their order."""
        files = self._folder.glob(f"{kind}_*.pt")
        matches = {path: RUN_FILE.fullmatch(path.name) for path in files}
        numbers = {path: int(match[2]) for path, match in matches.items() if match and match[2]}
        return sorted((path for path in numbers if numbers[path] < below), key=numbers.__getitem__)


class _HashingWriter:
    """Passes bytes on to a file and hashes what was meant to be written, not what was."""

    def __init__(self, file: BinaryIO, on_write: Callable[[int], object] | None) -> None:
        self._file = file
        self._on_write = on_write
        self._unsynced = 0
        self.digest = hashlib.sha256()

    def write(self, data: bytes) -> int:
        self.digest.update(data)
        num_bytes = self._file.write(data)
        self._unsynced += num_bytes
        if self._unsynced >= _UNSYNCED_BYTES:
            # Else a slow disk gives no sign of life until it has all of it.
            self._file.flush()
            os.fsync(self._file.fileno())
            self._unsynced = 0
        if self._on_write is not None:
            self._on_write(num_bytes)
        return num_bytes

    def flush(self) -> None:
        self._file.flush()


def write_checkpoint(
    content: Mapping[str, Any], path: Path, *, on_write: Callable[[int], object] | None = None
) -> None:
    """Write a checkpoint; what is at its place stays there until the new file is known to load.

    Args:
        content: Tensors and plain types, as from `pack_checkpoint`.
        path: Its place; its folder is made where somebody removed it.
        on_write: Is told each time how many bytes were written.

    Raises:
        OSError: If it cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    needed = sum(tensor.nbytes for _, tensor in named_tensors(content))
    free = shutil.disk_usage(path.parent).free
    if needed > free:
        # Filling the disk to find out would fail everybody else's writes.
        raise OSError(
            errno.ENOSPC, f"No space left: it needs {needed / 1e9:.3g} GB of {free / 1e9:.3g} GB"
        )
    with atomic_file(path) as file:
        writer = _HashingWriter(file, on_write)
        try:
            torch.save(content, cast("IO[bytes]", writer))
        except RuntimeError as error:
            raise _disk_error(error) from error
        writer.flush()
        read_checkpoint(file.name, use_mmap=True)
        # Until the file is in its place, the sum of the one that it replaces holds as well.
        _list_sum(path, writer.digest.hexdigest(), replaces=False)
    _list_sum(path, writer.digest.hexdigest(), replaces=True)


def _disk_error(error: RuntimeError) -> OSError:
    """Return what went wrong; torch tells it as a wrong position in the archive."""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, OSError):
        cause = cause.__context__
    return cause or OSError(str(error))


def _list_sum(path: Path, digest: str, *, replaces: bool) -> None:
    """List a file's checksum and drop those of files that are gone."""
    earlier = read_sums(path.parent)
    new = (path.name, digest)
    sums = [line for line in earlier if (path.parent / line[0]).exists() and line != new]
    if replaces:
        sums = [line for line in sums if line[0] != path.name]
    sums.append(new)
    if sums != earlier:
        text = "".join(f"{digest}  {name}\n" for name, digest in sums)
        write_text(path.with_name(SUMS_NAME), text)


def name_latest(path: Path) -> None:
    """Make `latest` name a checkpoint beside it.

    Raises:
        OSError: If it cannot be written; it then names the one before.
    """
    write_text(path.with_name(LATEST_NAME), f"{path.name}\n")


class HostCopy:
    """Copies a checkpoint into host memory, so that training goes on while it is written.

    Memory that is kept costs no page faults when it is used again, and memory that is pinned
    takes a GPU's content at the full speed of the bus.
    """

    def __init__(self) -> None:
        self._kept: dict[str, Tensor] = {}

    def take(self, content: Mapping[str, Any]) -> dict[str, Any]:
        """Return a copy, which the next call overwrites.

        Args:
            content: Tensors and plain types, in dicts, lists and tuples.

        Raises:
            ValueError: If it holds anything else, which no reader would accept.
        """
        earlier, self._kept = self._kept, {}
        copied = self._copy(content, "", earlier)
        if any(tensor.is_pinned() for tensor in self._kept.values()):
            torch.cuda.synchronize()
        return copied

    def _copy(self, value: Any, path: str, earlier: Mapping[str, Tensor]) -> Any:
        if isinstance(value, Tensor):
            tensor, kept = full_tensor(value.detach()), earlier.get(path)
            wanted = (tensor.shape, tensor.dtype, tensor.stride())
            if kept is None or (kept.shape, kept.dtype, kept.stride()) != wanted:
                kept = torch.empty_like(tensor, device="cpu", pin_memory=tensor.is_cuda)
            self._kept[path] = kept.copy_(tensor, non_blocking=True)
            return kept
        if isinstance(value, Mapping):
            return {key: self._copy(item, f"{path}/{key}", earlier) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            items = [self._copy(item, f"{path}/{i}", earlier) for i, item in enumerate(value)]
            return items if isinstance(value, list) else tuple(items)
        # Some optimizers' groups name the type of their moments, which `weights_only` reads.
        if value is None or isinstance(value, (bool, str, torch.dtype)):
            return value
        # Numbers of numpy's are such numbers, too, but no reader of plain types takes them.
        if isinstance(value, Integral):
            return int(value)
        if isinstance(value, Real):
            return float(value)
        raise ValueError(
            f"a checkpoint holds tensors and plain types only, got a {type(value).__name__} "
            f"at {path[1:]}"
        )


# ------------------------------------------------------------------------------------------------
# From disk to state
# ------------------------------------------------------------------------------------------------


def find_latest(folder: Path) -> Path | None:
    """Return the checkpoint that got furthest among those of a folder that are whole.

    Files that cannot be read or whose checksum is wrong are named in a warning and set aside, as
    `*.damaged`, where one is whole. Who looks into the folder of a run that may be under way calls
    `clip_pgs.checkpoint_reading.newest_checkpoint` instead, which leaves everything as it is.

    Args:
        folder: A run's checkpoint folder.

    Raises:
        ValueError: If there are checkpoints and all are damaged.
    """
    damaged: dict[Path, ValueError] = {}
    newest = newest_checkpoint(folder, on_damage=damaged.__setitem__)
    if newest is None:
        refuse_all_damaged(folder, damaged)
        return None
    for path, damage in damaged.items():
        os.replace(path, path.with_name(path.name + DAMAGED_ENDING))
        _logger.warning("%s; it is set aside as %s%s", damage, path.name, DAMAGED_ENDING)
    named = named_latest(folder)
    if named is None or not named.is_file():
        if named is not None and RUN_FILE.fullmatch(named.name) and named not in damaged:
            _logger.warning("%s is gone: going on from %s", named, newest.name)
        # OpenCLIP's trainer names none. Where no file can be written, as for an evaluation, none
        # need be.
        with suppress(OSError):
            name_latest(newest)
    return newest


def refuse_all_damaged(folder: Path, damaged: Mapping[Path, ValueError]) -> None:
    """Refuse a folder in which no checkpoint is whole, where there is any.

    Args:
        folder: A run's checkpoint folder.
        damaged: What is wrong with each of its files that was read.

    Raises:
        ValueError: If there are checkpoints; all are damaged.
    """
    aside = [path.name for path in sorted(folder.glob(f"*.pt{DAMAGED_ENDING}"))]
    if damaged or aside:
        reason = next(iter(damaged.values()), "they were set aside before")
        names = ", ".join([path.name for path in damaged] + aside)
        raise ValueError(
            f"no checkpoint in {folder} is whole ({names}): {reason}; put back a copy, or remove "
            "the folder to begin anew"
        )


def trained_steps(folder: Path) -> tuple[int, bool]:
    """Return the steps that a run without a checkpoint took, and whether it had saved one.

    Curves, log and what lies beside checkpoints tell it; a run that dies before its first save
    leaves curves alone, and an empty folder for checkpoints.

    Args:
        folder: The run's folder.

    Raises:
        OSError: If a file cannot be read.
    """
    lines = read_json_lines(folder / METRICS_NAME)
    seen = (line.get("step") for line in lines if line is not None)
    steps = 1 + max((step for step in seen if type(step) is int), default=-1)
    saved = []
    for path in (folder / name for name in _LOGS if (folder / name).is_file()):
        with path.open("rb") as file:
            # A line without an end is read piece by piece, and of a file without one a part.
            while file.tell() < MAX_LINES_BYTES and (line := file.readline(_MAX_LOG_LINE)):
                found = _SAVED.search(line)
                saved += [int(found[1])] if found else []
    checkpoints = folder / CHECKPOINTS_NAME
    # The folder is made before the first step, and `latest` names files that were there.
    is_gone = (checkpoints / LATEST_NAME).exists() or (steps > 0 and not checkpoints.is_dir())
    return max([steps, *saved]), bool(saved) or is_gone


def load_start(
    options: TrainOptions, folder: Path | None, group: ProcessGroup
) -> dict[str, Any] | None:
    """Return the checkpoint that `--resume` names, None to start fresh.

    Rank 0 looks into folders, so that all ranks load the same file, or refuse alike.
    """
    if options.resume is None:
        return None
    path, trouble = None, ""
    if options.rank == 0:
        try:
            path = _find_start(options, folder)
        except ValueError as error:
            trouble = str(error)
    path, trouble = group.broadcast((path, trouble))
    if trouble:
        raise ValueError(trouble)
    if path is None:
        steps = trained_steps(folder)[0] if folder is not None and options.rank == 0 else 0
        if steps:
            lost = counted(steps, "step")
            _logger.warning(
                "Nothing in %s was saved: its %s are lost; starting fresh", folder, lost
            )
        else:
            _logger.info("No checkpoint in %s yet: starting fresh", folder)
        return None
    checkpoint = load_checkpoint(path)
    place = checkpoint.get("epoch", 0), checkpoint.get("position", 0)
    _logger.info("Resuming from %s (epoch %d, sample %d of it)", path, *place)
    return checkpoint


def _find_start(options: TrainOptions, folder: Path | None) -> Path | None:
    path = options.resume
    if path == "latest":
        assert folder is not None
        latest = find_latest(folder / CHECKPOINTS_NAME)
        if latest is not None or options.resume_instead is None:
            return latest
        path = options.resume_instead
    assert path is not None
    return find_checkpoint(path)


def restore(
    checkpoint: dict[str, Any],
    *,
    model: nn.Module,
    scaler: torch.amp.GradScaler | None = None,
) -> int:
    """Load a checkpoint's weights and loss scaler into a run.

    Args:
        checkpoint: From `load_checkpoint`. Weights alone leave the scaler as it is.
        model: The plain model.
        scaler: The loss scaler, if there is one.

    Returns:
        Completed epochs; 0 for weights alone.

    Raises:
        ValueError: If the weights are not those of the model.
    """
    with explained("the checkpoint does not fit the model"):
        weights = fit_weights(checkpoint["state_dict"], model)
    model.load_state_dict(weights)
    if "epoch" not in checkpoint:
        return 0
    # One that is switched off has none.
    if scaler is not None and (state := checkpoint.get("scaler")):
        scaler.load_state_dict({**scaler.state_dict(), **{name: state[name] for name in _SCALED}})
    return checkpoint["epoch"]


def restore_masking(checkpoint: dict[str, Any], *, model: nn.Module, options: TrainOptions) -> None:
    """Load what a masking learned beside the weights; another masking begins anew, and says so.

    Args:
        checkpoint: From `load_checkpoint`, of a run that had begun; what is not of the run's
            masking is taken out.
        model: The plain model, with its weights.
        options: The run's.

    Raises:
        ValueError: If the run's masking cannot take up what is its own.
    """
    state, record = checkpoint.get("masking_state"), checkpoint.get("clip_pgs") or {}
    if not state:
        return
    masking, settings = options.masking, as_plain(options.masking_options)
    name = record.get("masking", masking)
    reason = None if name == masking else f"another masking, {name}, had found it"
    try:
        if reason is None:
            load_masking_state(model, state)
    # A strategy of one's own raises what it likes.
    except Exception as error:
        reason = one_sentence(error)
        if record.get("masking_options", settings) == settings:
            raise ValueError(f"its masking_state is none of {masking}: {reason}") from error
    if reason is not None:
        del checkpoint["masking_state"]
        _logger.warning("What the masking had found is left out: %s", reason)


def optimizer_misfit(optimizer: torch.optim.Optimizer, state: Any) -> str | None:
    """Return in words why a run cannot go on with an optimizer's state, None if it can.

    Args:
        optimizer: A fresh one of the run.
        state: What a checkpoint holds under "optimizer".
    """
    try:
        groups = [group for group in state["param_groups"] if group["params"]]
        numbers = [number for group in groups for number in group["params"]]
        entries = [dict(state["state"].get(number, {})) for number in numbers]
    except (LookupError, TypeError, ValueError, AttributeError):
        return "it holds no state of an optimizer"
    own = [group for group in optimizer.param_groups if group["params"]]
    trained = [parameter for group in own for parameter in group["params"]]
    sizes, own_sizes = ([len(group["params"]) for group in some] for some in (groups, own))
    if sizes != own_sizes:
        of_groups = "+".join(map(str, sizes)), "+".join(map(str, own_sizes))
        return (
            f"its optimizer trained {of_groups[0]} parameters, and not the {of_groups[1]} of this "
            "run (--opt, --lock-image and --lock-text with their groups must be as they were; "
            "--pretrained takes the weights alone)"
        )
    for group, name in product(groups, _COUNTED):
        if _kind(group.get(name, 0)) != "number":
            return f"its optimizer's {name} is {group[name]!r}, no number"
    is_adam = type(optimizer) is torch.optim.AdamW
    # AdamW's settings changed from version to version of PyTorch, and its state is known.
    known = {"initial_lr", *_COUNTED, *(name for group in own for name in group)}
    for name in sorted({str(name) for group in groups for name in group} - known):
        if not is_adam:
            return (
                f"its optimizer has a setting {name!r}, which that of this run has not (--opt must "
                "be as it was; --pretrained takes the weights alone)"
            )
    if is_adam and not any(entries):
        return "its optimizer holds no state of any parameter"
    for number, entry, parameter in zip(numbers, entries, trained, strict=True):
        # A parameter that never had a gradient has no state.
        lacking = {"step", "exp_avg", "exp_avg_sq"} - entry.keys() if is_adam and entry else ()
        if lacking:
            return f"its optimizer's state of parameter {number} lacks {min(lacking)}"
        # NovoGrad has one second moment for a layer.
        shapes = {"exp_avg": [parameter.shape], "exp_avg_sq": [parameter.shape, torch.Size()]}
        for name, value in entry.items():
            # Kron has several tensors under one name.
            parts = value if isinstance(value, (list, tuple)) else [value]
            if not all(_kind(p) in ("switch", "number") or isinstance(p, Tensor) for p in parts):
                return f"its optimizer's {name} of parameter {number} is {type(value).__name__}"
            if name in shapes and getattr(value, "shape", None) not in shapes[name]:
                return (
                    f"its optimizer's {name} of parameter {number} has not the shape "
                    f"{tuple(parameter.shape)} of this run's"
                )
            if name in shapes and not value.is_floating_point():
                return f"its optimizer's {name} of parameter {number} is {value.dtype}, no float"
            # A root is taken of the one, and a power of what the other counts.
            is_count = name == "step" and _kind(value) == "number"
            if (is_count or name == "exp_avg_sq") and (torch.as_tensor(value) < 0).any():
                return f"its optimizer's {name} of parameter {number} is less than 0"
    return None


def _kind(value: Any) -> str:
    """Return what a value is to an optimizer: "switch", "number" or "other"."""
    if value is None or isinstance(value, bool):
        return "switch"
    if isinstance(value, Real) or (isinstance(value, Tensor) and value.numel() == 1):
        return "number"
    return "other"


def restore_optimizer(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Load an optimizer's state, also that of one with the same numbers that was not fused.

    How it computes is what the run's options say, and not what the file says: its rates, decay and
    moments, and whether it descends. Where its parameters are sharded, each process takes its
    shard.
    """
    now = optimizer.state_dict()["param_groups"]
    groups = [
        {**fresh, **{name: group[name] for name in _COUNTED if name in group}}
        for group, fresh in zip(state["param_groups"], now, strict=False)
    ]
    trained = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    numbers = [number for group in state["param_groups"] for number in group["params"]]
    moments = {
        number: {
            name: value if name == "step" else shard_like(value, parameter)
            for name, value in state["state"][number].items()
        }
        for number, parameter in zip(numbers, trained, strict=True)
        if number in state["state"]
    }
    optimizer.load_state_dict({**state, "state": moments, "param_groups": groups})
