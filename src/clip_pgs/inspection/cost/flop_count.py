"""The floating-point operations of a training step, by torch's own counter."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from clip_pgs.inspection.cost.setups import Setup
from clip_pgs.integrations.open_clip import CaptionGroups

_FEW = 2  # captions that stand for a group, since each of one length costs the same
_SOME = 64  # images that stand for a batch, of which each may keep another number of patches


def count_step_flops(setup: Setup) -> float:
    """Count what a step of a setup costs, forward, backward and selection.

    Matrix products and convolutions count, a multiply-add as two operations. The similarity
    matrix of the loss and the optimiser are left out; they are small.

    Returns:
        Operations per step of the whole batch.
    """
    images, texts = setup.conditions.images, setup.texts
    groups = texts.tokens if isinstance(texts, CaptionGroups) else (texts,)
    model = setup.model
    total = len(images) * _per_sample(setup, model.encode_image, images[:_SOME])
    return total + sum(len(g) * _per_sample(setup, model.encode_text, g[:_FEW]) for g in groups)


def _per_sample(setup: Setup, encode: Callable[[Tensor], Tensor], inputs: Tensor) -> float:
    # The counter knows no CPU flash kernel; plain attention counts alike everywhere.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        with setup.conditions.autocast():
            features = encode(inputs)
        trained = [p for p in setup.model.parameters() if p.requires_grad]
        torch.autograd.grad(features.sum(), trained, allow_unused=True)
    return counter.get_total_flops() / len(inputs)
