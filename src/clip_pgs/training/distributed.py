"""Processes of a run: who is who, waiting for each other, and the models that they share.

With `--fsdp` each process holds a shard of every weight (FSDP2), and a block of a tower is
gathered only while it computes. What rank 0 does alone, it does with a plain copy of the model.
"""

from __future__ import annotations

import copy
import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from open_clip import CLIP
from open_clip.transformer import CustomResidualAttentionBlock, ResidualAttentionBlock
from open_clip_train.distributed import init_distributed_device
from timm.models.vision_transformer import Block
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.parallel import DistributedDataParallel

from clip_pgs.common import explained
from clip_pgs.integrations.apply import masking_or_none
from clip_pgs.training.options import TrainOptions
from clip_pgs.training.stop import BadInputError, as_bad_input, signals_by_default

# Each is sharded by itself; what lies outside of any is gathered as one.
_BLOCKS = (ResidualAttentionBlock, CustomResidualAttentionBlock, Block)

_logger = logging.getLogger(__name__)


@contextmanager
def join_processes(options: TrainOptions) -> Iterator[tuple[torch.device, ProcessGroup]]:
    """Join the run's other processes, where a launcher started any, and leave them at the end.

    Args:
        options: `rank`, `local_rank`, `world_size`, `distributed` and `device` are set.

    Yields:
        This process's device, and the group of all processes.
    """
    # torch waits for the others where no handler of ours is heard; there is nothing to save.
    waiting = nullcontext() if os.environ.get("WORLD_SIZE", "1") == "1" else signals_by_default()
    with waiting, warnings.catch_warnings():
        # It warns of what the run's log says: which device it fell back to.
        warnings.simplefilter("ignore")
        openclip = options.openclip
        what = "the processes that WORLD_SIZE or SLURM_NTASKS announces cannot be joined"
        if "SLURM_NTASKS" in os.environ:
            what += " (scripts/slurm_train.sh starts them)"
        with as_bad_input(), explained(what):
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

    def gather(self, value: Any) -> list[Any]:
        """Return every rank's value, in their order, on every rank; plain Python objects only."""
        if self._group is None:
            return [value]
        values = [None] * dist.get_world_size()
        dist.all_gather_object(values, value, group=self._group)
        return values


def spans_machines() -> bool:
    """Return whether launchers of several machines started the processes of this run."""
    sizes = [os.environ.get(name) for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE")]
    return None not in sizes and sizes[0] != sizes[1]


def meet_machines(group: ProcessGroup, trouble: str = "") -> None:
    """Let processes of all machines hear whether one of them cannot start.

    Each machine has a launcher of its own, and none hears what becomes of another's processes.

    Args:
        group: All processes.
        trouble: Why this one cannot start, "" where it can.

    Raises:
        BadInputError: If one cannot, on each of them.
    """
    refuse_together(group, trouble, "process {} cannot start: {}")


def refuse_together(group: ProcessGroup, trouble: str, sentence: str) -> None:
    """Raise the first process's trouble on all of them, in a sentence with its number and it."""
    for rank, text in enumerate(group.gather(trouble)):
        if text:
            raise BadInputError(sentence.format(rank, text))


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


def _cast(dtype: torch.dtype, module: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any]:
    """Give a module floating-point tensors of one type, as a hook before its forward pass."""

    def cast(value: Any) -> Any:
        is_number = isinstance(value, Tensor) and value.is_floating_point()
        return value.to(dtype) if is_number else value

    return tuple(map(cast, args)), {name: cast(value) for name, value in kwargs.items()}


class ShardedModel(nn.Module):
    """A model of which each process holds a shard; called as the model is.

    Args:
        model: The model, the same on every process, which keeps its shard from now on.
        options: The run's.
        device: This process's device.

    Attributes:
        model: The model; its weights are DTensors, its logit scale and bias vectors of one.
    """

    def __init__(self, model: CLIP, options: TrainOptions, device: torch.device) -> None:
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

        super().__init__()
        self.model: Any = model
        for name in ("logit_scale", "logit_bias"):
            # FSDP takes no scalars.
            if (number := getattr(model, name, None)) is not None:
                vector = nn.Parameter(number.detach().reshape(1), number.requires_grad)
                setattr(model, name, vector)
        num_weights = sum(p.numel() for p in model.parameters())
        mesh = init_device_mesh(device.type, (options.world_size,))
        # As autocast has it, blocks compute in half precision; what lies outside of them, and sums
        # of gradients, stay float32.
        half = torch.bfloat16 if options.precision.startswith("amp_bf") else None
        # FSDP would not cast what a block is given where checkpointing runs it again.
        policy = MixedPrecisionPolicy(half, torch.float32, cast_forward_inputs=False)
        for block in [module for module in model.modules() if isinstance(module, _BLOCKS)]:
            fully_shard(block, mesh=mesh, mp_policy=policy)
            if half is not None:
                block.register_forward_pre_hook(partial(_cast, half), with_kwargs=True)
        fully_shard(self, mesh=mesh, mp_policy=MixedPrecisionPolicy(reduce_dtype=torch.float32))
        own = sum(p.to_local().numel() for p in model.parameters())
        _logger.info("FSDP: this process holds %d of %d weights", own, num_weights)

    def forward(self, *inputs: Any) -> dict[str, Tensor]:
        """Return the model's outputs, no weight itself, which would keep the hooks of FSDP."""
        return {name: value.view_as(value) for name, value in self.model(*inputs).items()}


def shard_model(model: CLIP, options: TrainOptions, device: torch.device) -> ShardedModel:
    """Return a model to train of which each process holds a shard.

    Args:
        model: The plain model; rank 0 keeps it, with the masking that the other has, and
            `gather` brings it up to date. On other ranks it is the one that is sharded.
        options: The run's.
        device: This process's device.
    """
    if options.rank == 0:
        masking = masking_or_none(model)
        model = copy.deepcopy(model, {} if masking is None else {id(masking): masking})
    return ShardedModel(model, options, device)


@torch.no_grad()
def gather(sharded: ShardedModel, plain: CLIP) -> None:
    """Copy a sharded model's weights into rank 0's plain one; all processes call it."""
    own = plain.state_dict() if plain is not sharded.model else {}
    for name, tensor in sharded.model.state_dict().items():
        weight = full_tensor(tensor)
        if name in own:
            own[name].copy_(weight)


def full_tensor(tensor: Tensor) -> Tensor:
    """Return all of a sharded tensor, for which all processes call it; any other as it is.

    A vector of one, as which FSDP holds a scalar, is a scalar again.
    """
    if not hasattr(tensor, "full_tensor"):
        return tensor
    full = tensor.full_tensor()
    return full.reshape(()) if full.shape == (1,) else full


def shard_like(tensor: Tensor, parameter: Any) -> Tensor:
    """Return this process's shard of a full tensor, laid out as a parameter's is."""
    if not hasattr(parameter, "full_tensor"):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    mesh, device = parameter.device_mesh, parameter.device
    local = tensor.to(device).reshape(parameter.shape)
    return distribute_tensor(local, mesh, parameter.placements, src_data_rank=None)
