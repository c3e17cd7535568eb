"""Processes of a run: who is who, waiting for each other, and data-parallel models."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from open_clip_train.distributed import init_distributed_device
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from clip_pgs.training.options import TrainOptions


@contextmanager
def join_processes(options: TrainOptions) -> Iterator[tuple[torch.device, ProcessGroup]]:
    """Join the run's other processes, where a launcher started any, and leave them at the end.

    Args:
        options: `rank`, `local_rank`, `world_size`, `distributed` and `device` are set.

    Yields:
        This process's device, and the group of all processes.
    """
    with warnings.catch_warnings():
        # It warns of what the run's log says: which device it fell back to.
        warnings.simplefilter("ignore")
        openclip = options.openclip
        device = init_distributed_device(openclip)
    for name in ("distributed", "rank", "local_rank", "world_size", "device"):
        setattr(options, name, getattr(openclip, name))
    if device.type == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = True
        torch.backends.cudnn.benchmark = True
    # Not after an error: taking leave of processes that are gone can take for ever.
    yield device, ProcessGroup(is_distributed=options.distributed)
    if dist.is_initialized():
        dist.destroy_process_group()


class ProcessGroup:
    """All processes of a run, which wait here for the slowest, as long as it takes.

    NCCL gives up after ten minutes, which an evaluation on rank 0 can exceed, so that a group of
    its own with gloo does the waiting. One process alone waits for nobody.
    """

    def __init__(self, *, is_distributed: bool) -> None:
        self._group = None
        if is_distributed:
            self._group = dist.new_group(backend="gloo", timeout=timedelta(days=2))

    def barrier(self) -> None:
        """Return when every process has arrived."""
        if self._group is not None:
            dist.barrier(group=self._group)

    def sum(self, values: list[int]) -> list[int]:
        """Return the sum over all processes of each number; every process gives as many."""
        if self._group is None:
            return values
        total = torch.tensor(values, dtype=torch.int64)
        dist.all_reduce(total, group=self._group)
        return total.tolist()

    def broadcast(self, value: Any) -> Any:
        """Return rank 0's value on every rank; plain Python objects only."""
        if self._group is None:
            return value
        values = [value]
        dist.broadcast_object_list(values, src=0, group=self._group)
        return values[0]


def mean_over_ranks(value: float, device: torch.device) -> float:
    """Return the mean of every rank's number, the same on all; waits for the device.

    Args:
        value: This rank's number.
        device: This process's device.
    """
    if not dist.is_initialized():
        return value
    total = torch.tensor(value, dtype=torch.float64, device=device)
    dist.all_reduce(total)
    return total.item() / dist.get_world_size()


def parallelize(model: nn.Module, options: TrainOptions, device: torch.device) -> nn.Module:
    """Wrap a model for training: compiled with `--torchcompile`, in DDP with several processes.

    The parameters are shared with `model`, whose own state dict keeps plain names.

    Args:
        model: The plain model on its device.
        options: The run's.
        device: This process's device.
    """
    wrapped = model
    if options.torchcompile:
        if options.grad_checkpointing and options.distributed:
            # DDP's graph splitting cannot cut through a checkpointed block.
            torch._dynamo.config.optimize_ddp = False
        wrapped = torch.compile(model)  # type: ignore[assignment]
    if options.distributed:
        # Device ids are for GPUs alone: DDP raises when it is given the CPU.
        device_ids = [device] if device.type == "cuda" else None
        wrapped = DistributedDataParallel(
            _Trained(wrapped), device_ids=device_ids, static_graph=options.ddp_static_graph
        )
        if not options.ddp_static_graph:
            _lay_out_buckets(wrapped)
    return wrapped


class _Trained(nn.Module):
    """A model as DDP wraps it; without inputs it returns a sum that every parameter is in."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, *inputs: Any) -> Any:
        if inputs:
            return self.model(*inputs)
        return sum(0 * p.flatten()[0] for p in self.parameters() if p.requires_grad)


def _lay_out_buckets(parallel: DistributedDataParallel) -> None:
    """Let DDP choose now in which order it sums which gradients, from the parameters alone.

    After a process's first backward DDP lays out its buckets anew, and with three processes or
    more the layout decides in which order numbers are added. Were the first backward that of a
    step, a resumed run would round that step otherwise than the run that nothing stopped.
    """
    parallel().backward()
    parallel.zero_grad(set_to_none=True)
