"""One optimizer step: gradients of the whole batch, clipping, update.

Accumulation caches feature gradients (GradCache, https://arxiv.org/abs/2101.06983): a first pass
without autograd computes the features of every micro-batch, one backward through the loss gives
the gradient of the features and of the logit scale, and a second pass carries the former into
the towers. OpenCLIP repeats the full loss for every micro-batch instead, which makes the
gradient of the logit scale accum_freq times too large, and draws new masks in the second pass.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from open_clip import CLIP
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from clip_pgs.integrations.open_clip import CaptionGroups
from clip_pgs.training.distributed import full_tensor

Texts = Tensor | CaptionGroups
Batch = tuple[Tensor, Texts]
# Parameters that a model hands to the loss unchanged by the batch: they have no batch dimension.
_SHARED_OUTPUTS = ("logit_scale", "logit_bias")
_MAX_LOG_SCALE = math.log(100)


@dataclass
class StepResult:
    """What one step measured, as tensors on the device that nothing has waited for.

    Args:
        losses: Each term and their sum under "loss", of this rank. Scalars.
        grad_norm: Norm of all gradients before clipping. Scalar.
        kept_counts: Patches kept of each image; empty without masking. One (B,) per micro-batch.
        is_bad: 1.0 where the step was skipped as its numbers are not finite, else 0.0. Scalar.
        lr: The step's learning rate.
    """

    losses: dict[str, Tensor]
    grad_norm: Tensor
    kept_counts: list[Tensor]
    is_bad: Tensor
    lr: float


def compute_gradients(
    model: nn.Module,
    batches: list[Batch],
    loss: nn.Module,
    *,
    before_forward: Callable[[int], None] | None = None,
    autocast: Callable[[], AbstractContextManager] = nullcontext,
    scaler: torch.amp.GradScaler | None = None,
) -> dict[str, Tensor]:
    """Add the gradient of the loss over all micro-batches to the parameters.

    BatchNorm normalizes each micro-batch by itself; everything else equals one big batch.

    Args:
        model: Returns OpenCLIP's dictionary of outputs; may be wrapped for DDP.
        batches: Micro-batches of (images, texts), of one size, on the device.
        loss: OpenCLIP's loss, called with the outputs and `output_dict=True`.
        before_forward: Called with the number of a micro-batch before each of its forwards, to
            give both the same masks.
        autocast: Context for forwards and loss.
        scaler: Scales the loss for float16.

    Returns:
        Each loss term and their sum under "loss", detached.
    """
    before_forward = before_forward or (lambda micro_batch: None)
    if len(batches) == 1:
        before_forward(0)
        with autocast():
            losses, scaled, seed = _total_loss(loss, model(*batches[0]), scaler)
        scaled.backward(gradient=seed)
        return {name: value.detach() for name, value in losses.items()}

    device = batches[0][0].device
    # DDP averages at the end of a backward whose forward went through it, so that the last one
    # alone does. `no_sync` would do the same, but for a static graph, where it fails.
    bare_model = model.module if isinstance(model, DistributedDataParallel) else model
    random_states, outputs = [], []
    with torch.no_grad(), autocast():
        for micro_batch, batch in enumerate(batches):
            random_states.append(_random_state(device))
            before_forward(micro_batch)
            outputs.append(bare_model(*batch))
    leaves = _joined_leaves(outputs)
    del outputs

    with autocast():
        losses, scaled, seed = _total_loss(loss, leaves, scaler)
    scaled.backward(gradient=seed)
    gradients = {name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}
    shared = {name: gradients.pop(name) for name in _SHARED_OUTPUTS if name in gradients}
    chunks = {name: gradient.chunk(len(batches)) for name, gradient in gradients.items()}

    for micro_batch, batch in enumerate(batches):
        is_last = micro_batch == len(batches) - 1
        # The shared outputs take part in the last backward alone, where DDP averages: their
        # gradient counts once, and every parameter has one when DDP looks for it.
        wanted = {name: parts[micro_batch] for name, parts in chunks.items()}
        wanted |= shared if is_last else {}
        _set_random_state(random_states[micro_batch], device)
        before_forward(micro_batch)
        with autocast():
            output = model(*batch) if is_last else bare_model(*batch)
        names = [name for name in wanted if output[name].requires_grad]
        torch.autograd.backward([output[n] for n in names], [wanted[n] for n in names])
    return {name: value.detach() for name, value in losses.items()}


def _joined_leaves(outputs: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Concatenate the micro-batches' outputs and make the floating-point ones leaves."""
    leaves = {}
    for name, first in outputs[0].items():
        is_shared = name in _SHARED_OUTPUTS
        value = first.detach().clone() if is_shared else torch.cat([out[name] for out in outputs])
        leaves[name] = value.requires_grad_(value.is_floating_point())
    return leaves


def _total_loss(
    loss: nn.Module, output: dict[str, Tensor], scaler: torch.amp.GradScaler | None
) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """Return each term and their sum, the sum scaled, and the gradient that backward starts with.

    The latter is NaN for a loss that is not finite: one rank's bad loss thus reaches the gradients
    of all, which skip the step together.
    """
    losses = dict(loss(**output, output_dict=True))
    losses["loss"] = total = torch.stack([value.float() for value in losses.values()]).sum()
    seed = torch.where(total.detach().isfinite(), 1.0, torch.nan)
    return losses, total if scaler is None else scaler.scale(total), seed


def _random_state(device: torch.device) -> tuple[Tensor, Tensor | None]:
    on_device = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
    return torch.get_rng_state(), on_device


def _set_random_state(state: tuple[Tensor, Tensor | None], device: torch.device) -> None:
    on_cpu, on_device = state
    torch.set_rng_state(on_cpu)
    if on_device is not None:
        torch.cuda.set_rng_state(on_device, device)


def update_weights(
    model: CLIP,
    optimizer: torch.optim.Optimizer,
    *,
    scaler: torch.amp.GradScaler | None = None,
    grad_clip_norm: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Clip the gradients, update the weights, and keep the logit scale within [1, 100].

    Weights and optimizer stay as they are where the gradients are not finite.

    Args:
        model: The plain model, or a sharded one, with gradients.
        optimizer: Its optimizer.
        scaler: What scaled the loss, if anything did.
        grad_clip_norm: Largest norm of all gradients together; None does not clip.

    Returns:
        The norm before clipping, and whether the step was skipped, as 1.0 or 0.0; scalars on the
        device that nothing has waited for.
    """
    if scaler is not None:
        scaler.unscale_(optimizer)
    trained = [parameter for parameter in model.parameters() if parameter.grad is not None]
    norm = nn.utils.get_total_norm([p.grad for p in trained if p.grad is not None])
    grad_norm = full_tensor(norm)
    if grad_clip_norm is not None:
        nn.utils.clip_grads_with_norm_(trained, grad_clip_norm, grad_norm)
    is_bad = (~grad_norm.isfinite()).float()
    if scaler is None:
        _step_unless(is_bad, optimizer)
    else:
        scaler.step(optimizer)
        scaler.update()
    optimizer.zero_grad(set_to_none=True)
    if model.logit_scale is not None:
        with torch.no_grad():
            model.logit_scale.clamp_(0, _MAX_LOG_SCALE)
    return grad_norm, is_bad


@torch.no_grad()
def restore_where(is_bad: Tensor, buffers: list[Tensor], before: list[Tensor]) -> None:
    """Take back what a step's forward passes did to buffers where `is_bad` is not 0."""
    for buffer, value in zip(buffers, before, strict=True):
        buffer.copy_(torch.where(is_bad > 0, value, buffer))


def _step_unless(is_bad: Tensor, optimizer: torch.optim.Optimizer) -> None:
    """Take a step where `is_bad` is 0; fused optimizers decide on the device.

    They do what a GradScaler asks them to by these attributes. For any other the host waits.
    """
    if getattr(optimizer, "_step_supports_amp_scaling", False):
        optimizer.grad_scale, optimizer.found_inf = None, is_bad  # type: ignore[attr-defined]
        try:
            optimizer.step()
        finally:
            del optimizer.grad_scale, optimizer.found_inf  # type: ignore[attr-defined]
    elif not bool(is_bad):
        optimizer.step()
