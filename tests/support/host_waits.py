"""What would make the host wait for a GPU, noted while the same code runs on a CPU."""

import traceback
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

_aten = torch.ops.aten

# Their result's value or shape is known to the host, or their input comes from it.
_WAITING = {
    _aten._local_scalar_dense: "reads a number",
    _aten.is_nonzero: "reads a number",
    _aten.equal: "reads a number",
    _aten.nonzero: "makes a shape of values",
    _aten.masked_select: "makes a shape of values",
    _aten.repeat_interleave: "makes a shape of values",
    _aten.bincount: "makes a shape of values",
    _aten._unique2: "makes a shape of values",
    _aten.unique_dim: "makes a shape of values",
    _aten.unique_consecutive: "makes a shape of values",
    _aten.lift_fresh: "copies numbers of the host",
}
_INDEXING = (_aten.index, _aten.index_put, _aten.index_put_)
# On a CPU these reach no operator.
_READING = {Tensor.cpu, Tensor.numpy, Tensor.tolist, Tensor.__array__}


class _Operators(TorchDispatchMode):
    def __init__(self, waits):
        super().__init__()
        self.waits = waits

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        packet = func.overloadpacket
        if packet in _WAITING:
            self.waits.append(f"{packet} {_WAITING[packet]} {_place()}")
        if packet in _INDEXING and any(
            index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1]
        ):
            self.waits.append(f"{packet} by a mask makes a shape of values {_place()}")
        return func(*args, **(kwargs or {}))


class _Methods(TorchFunctionMode):
    def __init__(self, waits):
        super().__init__()
        self.waits = waits

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func in _READING:
            self.waits.append(f"{func.__name__} reads a tensor {_place()}")
        return func(*args, **(kwargs or {}))


@contextmanager
def noting_host_waits():
    """Give a list that grows by a line for whatever would wait, inside the block."""
    waits = []
    with _Operators(waits), _Methods(waits):
        yield waits


def _place():
    """Return the innermost line of this package on the stack."""
    ours = [
        frame for frame in traceback.extract_stack() if "clip_pgs" in Path(frame.filename).parts
    ]
    return f"at {Path(ours[-1].filename).name}:{ours[-1].lineno}" if ours else "outside"
