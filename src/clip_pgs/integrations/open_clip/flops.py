"""Floating-point operations of a training step, and of encoding an image, counted once."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from clip_pgs.integrations.apply import (
    force_selection,
    last_selection,
    masking_or_none,
)
from clip_pgs.integrations.open_clip.conv import aside_from_training
from clip_pgs.integrations.open_clip.text import CaptionGroups


@dataclass(frozen=True)
class SampleFlops:
    """What one training sample costs, in floating-point operations.

    Args:
        total: All of it.
        selection: Of these, what choosing the patches takes: the strategy and its teacher.
    """

    total: float = 0.0
    selection: float = 0.0


def count_sample_flops(
    model: nn.Module, images: Tensor, texts: Tensor, *, is_masked: bool, **options: Any
) -> SampleFlops:
    """Count what one training sample costs, and how much of that chooses its patches.

    Args:
        model: As for `count_flops`.
        images: As for `count_flops`.
        texts: As for `count_flops`.
        is_masked: Whether the model's image tower is masked.
        **options: As for `count_flops`.
    """
    total = count_flops(model, images, texts, **options)
    if not is_masked:
        return SampleFlops(total)
    selection = last_selection(model)
    assert selection is not None
    with force_selection(model, selection):
        without = count_flops(model, images, texts, **options)
    return SampleFlops(total, total - without)


def few_texts(texts: Tensor | CaptionGroups, num: int) -> Tensor:
    """Return a few captions of the length that the text tower reads on average.

    What they say is of no account here: an end may be cut off.

    Args:
        texts: A batch's captions, trimmed or not.
        num: How many at most; of grouped captions, no more than the last group has.
    """
    if isinstance(texts, Tensor):
        return texts[:num]
    return texts.tokens[-1][:num, : round(texts.mean_length())]


def count_flops(
    model: nn.Module,
    images: Tensor,
    texts: Tensor,
    *,
    autocast: Callable[[], AbstractContextManager] = nullcontext,
    extra_forward: bool = False,
) -> float:
    """Count what one training sample costs, forward and backward, masking included.

    Matrix products and convolutions count, a multiply-add as two operations. The similarity
    matrix of the loss is left out: it depends on the batch and is small. Weights, gradients,
    buffers and random streams stay as they are, and no other process is waited for.

    Args:
        model: The plain model, returning OpenCLIP's dictionary; put in train mode.
        images: A few images of shape (B, 3, H, W), on the model's device.
        texts: Their captions' tokens, shape (B, T).
        autocast: Context for the forward.
        extra_forward: Count the forward twice, as gradient accumulation runs it.

    Returns:
        Operations per sample.
    """
    model.train()
    devices = [images.device] if images.device.type == "cuda" else []

    def run() -> Iterable[Tensor]:
        with autocast():
            return model(images, texts).values()

    with torch.random.fork_rng(devices), aside_from_training(model):
        forward, backward = count_pass(model, run)
    return ((2 if extra_forward else 1) * forward + backward) / images.shape[0]


def count_image_flops(model: nn.Module) -> float | None:
    """Count what encoding one image costs, masking included where it is active.

    Operations count as in `count_flops`. Where images keep different numbers of patches it is what
    one costs that keeps the most.

    Args:
        model: The model, in the mode that it encodes in; its random streams stay as they are.

    Returns:
        Operations of one image; None where the model does not tell the size of its images.
    """
    visual: Any = getattr(model, "visual", None)
    size = getattr(visual, "image_size", None)
    if size is None:
        return None
    height, width = (size, size) if isinstance(size, int) else size
    weight = next(model.parameters())
    image = torch.linspace(-1, 1, 3 * height * width, device=weight.device, dtype=weight.dtype)
    masking = masking_or_none(model)
    if masking is not None:
        before = masking.noise, masking.pack_tokens
        places = torch.arange(masking.grid.num_patches, device=weight.device)
        masking.noise = places[None] / masking.grid.num_patches
        masking.pack_tokens = False
    # The fast path of torch's attention is one operation that the counter does not know.
    is_fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with (
            torch.no_grad(),
            sdpa_kernel(SDPBackend.MATH),
            FlopCounterMode(display=False) as counter,
        ):
            visual(image.reshape(1, 3, height, width))
    finally:
        torch.backends.mha.set_fastpath_enabled(is_fast)
        if masking is not None:
            masking.noise, masking.pack_tokens = before
    return float(counter.get_total_flops())


def count_pass(model: nn.Module, run: Callable[[], Iterable[Tensor]]) -> tuple[int, int]:
    """Count the operations of a forward pass, and of the backward pass that follows.

    Args:
        model: Whose parameters the gradients are of; none is kept.
        run: Runs the model, or a part of it, and returns what it gives out.
    """
    # The counter knows no CPU flash kernel; plain attention counts alike everywhere.
    with sdpa_kernel(SDPBackend.MATH):
        with FlopCounterMode(display=False) as forward:
            outputs = [value for value in run() if value.requires_grad]
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        ones = [torch.ones_like(value) for value in outputs]
        with FlopCounterMode(display=False) as backward:
            torch.autograd.grad(outputs, trained, ones, allow_unused=True)
    return forward.get_total_flops(), backward.get_total_flops()
