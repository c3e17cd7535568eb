"""What a masking learns in training: its teacher and the numbers it was calibrated to."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from clip_pgs.integrations.open_clip.teacher import teacher_momentum
from clip_pgs.integrations.open_clip.towers import image_tower, masking_or_none, tower_masking


def update_masking(model: nn.Module, *, step: int, total_steps: int) -> None:
    """Let a teacher follow the model; call it after each optimiser step.

    Nothing is sent between processes: each moves its own teacher towards weights they share. A
    masking without a teacher is left as it is.

    Args:
        model: A masked model, also wrapped by DDP or `torch.compile`.
        step: Number of the optimiser step just taken, from 0.
        total_steps: Masked steps of the whole training, > 0.

    Raises:
        ValueError: If the model is not masked.
    """
    teacher = tower_masking(model).teacher
    if teacher is not None:
        momentum = teacher_momentum(teacher.momentum, step=step, total_steps=total_steps)
        teacher.update(image_tower(model)[0], momentum=momentum)


def calibrate_masking(
    model: nn.Module, images: Tensor, *, average: Callable[[float], float] | None = None
) -> bool:
    """Fit the strategy to a batch of images, where it asks for that at the present progress.

    It runs outside the training step and may synchronise. Noise given by `set_masking_noise` is
    used where there is some.

    Args:
        model: A masked model, also wrapped by DDP or `torch.compile`.
        images: As the model receives them. Shape (B, 3, H, W).
        average: Takes this process's number and returns the mean over all of them. None stands
            for one process.

    Returns:
        Whether the strategy was fitted.

    Raises:
        ValueError: If the model is not masked.
    """
    masking = tower_masking(model)
    if not masking.strategy.needs_calibration(masking.progress):
        return False
    tower, kind = image_tower(model)
    with torch.no_grad():
        images = images.to(kind.patch_weight(tower).dtype)
        inputs = masking.inputs(images, tower.embed_patches(images))
        masking.strategy.calibrate(inputs, average=average)
    return True


def masking_state(model: nn.Module) -> dict[str, Any]:
    """Return what a resumed run needs of a masking, beside the model's state dict.

    Args:
        model: A model, masked or not, also wrapped.

    Returns:
        Tensors on the CPU and plain types: "strategy" (numbers the strategy found) and "teacher"
        (its weights), each where there is one.
    """
    masking = masking_or_none(model)
    if masking is None:
        return {}
    state: dict[str, Any] = {}
    if numbers := masking.strategy.state():
        state["strategy"] = numbers
    if masking.teacher is not None:
        state["teacher"] = masking.teacher.state()
    return state


def load_masking_state(model: nn.Module, state: Mapping[str, Any]) -> None:
    """Restore what `masking_state` returned; call it after `load_state_dict`.

    Loading weights into a model makes its teacher start from them, so that the other order would
    lose the teacher.

    Args:
        model: A model masked by the same strategy, also wrapped.
        state: What `masking_state` returned. An empty one changes nothing.

    Raises:
        ValueError: If the state is that of another masking.
    """
    if not state:
        return
    masking = tower_masking(model)
    if unknown := set(state) - {"strategy", "teacher"}:
        raise ValueError(f"a masking's state has no part {', '.join(sorted(unknown))}")
    if "teacher" in state:
        if masking.teacher is None:
            raise ValueError(
                f"the state holds a teacher, and {type(masking.strategy).__name__} has none"
            )
        masking.teacher.load_state(state["teacher"])
    if "strategy" in state:
        masking.strategy.load_state(state["strategy"])
