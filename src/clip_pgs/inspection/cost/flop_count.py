"""The floating-point operations of a training step, by torch's own counter."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from clip_pgs.inspection.cost.setups import Setup
from clip_pgs.integrations.open_clip import CaptionGroups

_FEW = 2  # samples that stand for a batch, since every sample of one shape costs the same


def count_step_flops(setup: Setup) -> float:
    """Count what a step of a setup costs, forward, backward and selection.

    Matrix products and convolutions count, a multiply-add as two operations. The similarity
    matrix of the loss and the optimiser are left out; they are small.

    Returns:
        Operations per step of the whole batch.
    """
    images, texts = setup.conditions.images, setup.texts
    groups = texts.tokens if isinstance(texts, CaptionGroups) else (texts,)
    total = len(images) * _per_sample(setup, setup.model.encode_image, images)
    return total + sum(len(g) * _per_sample(setup, setup.model.encode_text, g) for g in groups)


def _per_sample(setup: Setup, encode: Callable[[Tensor], Tensor], inputs: Tensor) -> float:
    few = inputs[:_FEW]
    # The counter knows no CPU flash kernel; plain attention counts alike everywhere.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        with setup.conditions.autocast():
            features = encode(few)
        trained = [p for p in setup.model.parameters() if p.requires_grad]
        torch.autograd.grad(features.sum(), trained, allow_unused=True)
    return counter.get_total_flops() / len(few)
