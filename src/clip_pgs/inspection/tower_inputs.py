"""What an image tower shows to a strategy: its patch embeddings and its attention."""

from __future__ import annotations

import copy
from collections.abc import Callable

from torch import Tensor, nn

from clip_pgs.integrations.open_clip import (
    apply_masking,
    calibrate_masking,
    remove_masking,
    set_masking_progress,
)
from clip_pgs.integrations.open_clip.apply import image_tower
from clip_pgs.masking import MaskingStrategy, PatchInputs


def tower_inputs(
    model: nn.Module, pixels: Tensor, strategy: MaskingStrategy, *, progress: float
) -> PatchInputs:
    """Gather what a model's image tower would show to a strategy in training.

    Args:
        model: An OpenCLIP model, also masked or wrapped; it stays as it is.
        pixels: Images as the model receives them. Shape (B, 3, H, W).
        strategy: One that requires attention sees that of the tower, in the place of a teacher.
        progress: Completed share of the masked training steps, in [0, 1].

    Raises:
        ValueError: If the tower cannot be masked by the strategy.
    """
    tower = _TowerAlone(model)
    recorder = _Recorder(strategy)
    apply_masking(tower, recorder)
    set_masking_progress(tower, progress)
    calibrate_masking(tower, pixels)
    assert recorder.seen is not None
    return recorder.seen


class _TowerAlone(nn.Module):
    """A copy of a model's image tower on the CPU, in float32, without masking."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.visual = copy.deepcopy(image_tower(model)[0]).cpu().float().eval()
        remove_masking(self)


class _Recorder(MaskingStrategy):
    """Keeps what a masked tower shows to a strategy."""

    def __init__(self, strategy: MaskingStrategy) -> None:
        super().__init__()
        self.requires = strategy.requires  # type: ignore[misc]
        # An image tower builds its teacher by this.
        self.resolution = getattr(strategy, "resolution", 1.0)
        self.seen: PatchInputs | None = None

    def needs_calibration(self, progress: float) -> bool:
        return True

    def calibrate(
        self, inputs: PatchInputs, *, average: Callable[[float], float] | None = None
    ) -> None:
        self.seen = inputs
