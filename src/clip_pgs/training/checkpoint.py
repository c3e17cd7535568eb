"""What a checkpoint holds, in OpenCLIP's layout, and how a run takes it up again.

It holds tensors and plain types only, so that `torch.load(weights_only=True)` opens it, and
weights under the plain model's names, whatever wrapped it while training. "epoch" counts completed
epochs, "step" the run's optimizer steps, "position" the samples of the epoch under way that all
ranks together have seen. Under "clip_pgs" lies the run's record, from which
`clip_pgs.training.export` makes an export without the run, under "masking_state" what a masking
learned beside the weights.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from numbers import Integral, Real
from pathlib import Path
from types import NoneType
from typing import Any

import torch
from torch import Tensor, nn

from clip_pgs.checkpoint_reading import check_sum, fit_weights, non_finite, read_checkpoint
from clip_pgs.common import explained
from clip_pgs.training.distributed import full_tensor, shard_like

# What an optimizer's constructor makes of --lr, --beta1, --beta2, --eps, --wd and --momentum, and
# how it computes; beside them, a group may hold what was counted, such as its steps.
_SETTINGS = (
    "lr",
    "betas",
    "eps",
    "weight_decay",
    "momentum",
    "fused",
    # timm's AdaFactor, MARS, Muon, and corrected decay.
    "beta1",
    "betas_1d",
    "fallback_lr_scale",
    "max_lr_snapshot",
)


_MAPPING, _TEXT = (dict, "a mapping of names"), (str, "a text")
# What a run's record holds, see `clip_pgs.training.run_folder.describe_run`.
_RECORD: dict[str, tuple[type, str]] = {
    **dict.fromkeys(("version", "model", "masking", "device"), _TEXT),
    **dict.fromkeys(("open_clip_config", "masking_options", "data", "recipe"), _MAPPING),
    **dict.fromkeys(("cost", "metrics"), _MAPPING),
    "world_size": (int, "a whole number"),
}


@dataclass
class Cost:
    """What a run has spent since its very beginning, resumed launches included.

    Args:
        steps: Optimizer steps.
        samples: Image-caption pairs over all ranks.
        flops: Floating-point operations over all ranks.
        selection_flops: Of these, what choosing patches took.
        seconds: Wall time.
        skipped_steps: Steps that changed nothing, as their numbers were not finite.
        skipped_samples: Samples that could not be used.
    """

    steps: int = 0
    samples: int = 0
    flops: float = 0.0
    selection_flops: float = 0.0
    seconds: float = 0.0
    skipped_steps: int = 0
    skipped_samples: int = 0


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
    return checkpoint


def load_checkpoint(path: Path | str) -> dict[str, Any]:
    """Read a checkpoint of this trainer or of OpenCLIP's, onto the CPU.

    Returns:
        The checkpoint, or {"state_dict": ...} for a file that holds weights alone. Names of
        weights are the plain model's.

    Raises:
        ValueError: If the file is missing, damaged, or holds anything but tensors and plain types.
    """
    checkpoint = read_checkpoint(path)
    check_sum(Path(path))
    return checkpoint


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
    if scaler is not None and "scaler" in checkpoint:
        scaler.load_state_dict(checkpoint["scaler"])
    return checkpoint["epoch"]


def restore_optimizer(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Load an optimizer's state, also that of one with the same numbers that was not fused.

    What the run's options say of rates, decay and moments holds, and not what the file says of
    them. Where its parameters are sharded, each process takes its shard.
    """
    now = optimizer.state_dict()["param_groups"]
    groups = [
        {**fresh, **group, **{name: fresh[name] for name in _SETTINGS if name in fresh}}
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


def damaged_entry(checkpoint: Mapping[str, Any], *, is_exported: bool = False) -> str | None:
    """Say which of the entries beside the weights is not what a trainer writes, None if none is.

    Args:
        checkpoint: From `load_checkpoint`.
        is_exported: Whether the record must be whole, as a card describes all of it.
    """
    record = checkpoint.get("clip_pgs", {})
    entries = {name: checkpoint.get(name) for name in ("optimizer", "scaler", "masking_state")}
    for name, entry in {**entries, "clip_pgs": record}.items():
        if entry is not None and not isinstance(entry, dict):
            return f"its {name} holds {type(entry).__name__}, and not a mapping of names"
    record = record or {}
    for name, (kind, what) in _RECORD.items():
        entry = record.get(name)
        if is_exported and entry is None:
            return f"its clip_pgs record has no {name}"
        if entry is not None and not isinstance(entry, kind):
            return f"its clip_pgs/{name} holds {type(entry).__name__}, and not {what}"
    cost, metrics = record.get("cost") or {}, record.get("metrics") or {}
    known = [field.name for field in fields(Cost)]
    for name in cost.keys() - known:
        return f"its clip_pgs/cost holds {name!r}, which no trainer writes"
    for name, value in (cost | metrics).items():
        if not isinstance(value, Real):
            return f"its clip_pgs record says {value!r} of {name}, which is no number"
    if is_exported and not isinstance(record.get("tokenizer"), (str, NoneType)):
        return f"its clip_pgs record says {record['tokenizer']!r} of tokenizer, which is no name"
    return None


def find_non_finite(checkpoint: Mapping[str, Any]) -> str | None:
    """Say which weight, or number of the optimizer, is NaN or infinite; None if none is."""
    for part in ("state_dict", "optimizer"):
        for name, tensor in named_tensors(checkpoint.get(part), part):
            if (trouble := non_finite(tensor)) is not None:
                return f"{name} {trouble}"
    return None


def named_tensors(value: Any, name: str = "") -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors in nested dicts, lists and tuples, each with the path to it."""
    if isinstance(value, Tensor):
        yield name, value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from named_tensors(item, f"{name}/{key}")
    elif isinstance(value, (list, tuple)):
        for number, item in enumerate(value):
            yield from named_tensors(item, f"{name}/{number}")


class HostCopy:
    """Copies a checkpoint into host memory, so that training goes on while it is written.

    Memory that is kept costs no page faults when it is used again, and memory that is pinned
    takes a GPU's content at the full speed of the bus.
    """

    def __init__(self) -> None:
        self._kept: dict[tuple[Any, ...], Tensor] = {}

    def take(self, content: Mapping[str, Any]) -> dict[str, Any]:
        """Return a copy, which the next call overwrites.

        Args:
            content: Tensors and plain types, in dicts, lists and tuples.

        Raises:
            ValueError: If it holds anything else, which no reader would accept.
        """
        used: dict[tuple[Any, ...], Tensor] = {}
        copied = self._copy(content, (), used)
        self._kept = used
        if any(tensor.is_pinned() for tensor in used.values()):
            torch.cuda.synchronize()
        return copied

    def _copy(self, value: Any, path: tuple[Any, ...], used: dict[tuple[Any, ...], Tensor]) -> Any:
        if isinstance(value, Tensor):
            used[path] = self._copy_tensor(full_tensor(value.detach()), self._kept.get(path))
            return used[path]
        if isinstance(value, Mapping):
            return {key: self._copy(item, (*path, key), used) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            items = [self._copy(item, (*path, i), used) for i, item in enumerate(value)]
            return items if isinstance(value, list) else tuple(items)
        if value is None or isinstance(value, (bool, str)):
            return value
        # Numbers of numpy's are such numbers, too, but no reader of plain types takes them.
        if isinstance(value, Integral):
            return int(value)
        if isinstance(value, Real):
            return float(value)
        where = "/".join(map(str, path))
        raise ValueError(
            f"a checkpoint holds tensors and plain types only, got a {type(value).__name__} "
            f"at {where}"
        )

    @staticmethod
    def _copy_tensor(tensor: Tensor, kept: Tensor | None) -> Tensor:
        wanted = (tensor.shape, tensor.dtype, tensor.stride())
        if kept is None or (kept.shape, kept.dtype, kept.stride()) != wanted:
            kept = torch.empty_like(tensor, device="cpu", pin_memory=tensor.is_cuda)
        return kept.copy_(tensor, non_blocking=True)
