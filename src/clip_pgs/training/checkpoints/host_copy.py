"""A checkpoint's content in host memory, so that training goes on while it is written."""

from __future__ import annotations

from collections.abc import Mapping
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor

_Place = tuple[Any, ...]


class HostCopy:
    """Copies content into memory that it keeps for the next time.

    Memory that is kept costs no page faults when it is used again, and memory that is pinned
    takes a GPU's content at the full speed of the bus.
    """

    def __init__(self) -> None:
        self._kept: dict[_Place, Tensor] = {}

    def take(self, content: Mapping[str, Any]) -> dict[str, Any]:
        """Return a copy, which the next call overwrites.

        Args:
            content: Tensors and plain types, in dicts, lists and tuples.

        Raises:
            ValueError: If it holds anything else, which no reader would accept.
        """
        used: dict[_Place, Tensor] = {}
        copied = {key: self._copy(value, (key,), used) for key, value in content.items()}
        self._kept = used
        if any(tensor.is_pinned() for tensor in used.values()):
            torch.cuda.synchronize()
        return copied

    def _copy(self, value: Any, place: _Place, used: dict[_Place, Tensor]) -> Any:
        if isinstance(value, Tensor):
            used[place] = self._copy_tensor(value.detach(), place)
            return used[place]
        if isinstance(value, Mapping):
            return {key: self._copy(item, (*place, key), used) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            items = [self._copy(item, (*place, i), used) for i, item in enumerate(value)]
            return items if isinstance(value, list) else tuple(items)
        if value is None or isinstance(value, (bool, str)):
            return value
        # Numbers of numpy's are such numbers, too, but no reader of plain types takes them.
        if isinstance(value, Integral):
            return int(value)
        if isinstance(value, Real):
            return float(value)
        where = "/".join(map(str, place))
        raise ValueError(
            f"a checkpoint holds tensors and plain types only, got a {type(value).__name__} "
            f"at {where}"
        )

    def _copy_tensor(self, tensor: Tensor, place: _Place) -> Tensor:
        kept = self._kept.get(place)
        if kept is None or (kept.shape, kept.dtype, kept.stride()) != (
            tensor.shape,
            tensor.dtype,
            tensor.stride(),
        ):
            kept = torch.empty_like(tensor, device="cpu", pin_memory=tensor.is_cuda)
        return kept.copy_(tensor, non_blocking=True)
