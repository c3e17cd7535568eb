"""What a strategy may look at: pixels alone, or a model's embeddings and attention as well."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from clip_pgs.inspection.model_input import ModelInput
from clip_pgs.masking import MaskingStrategy, PatchInputs


@dataclass
class View:
    """How strategies see images, on the CPU.

    Args:
        model_input: Image size, patch size and normalisation.
        model: An OpenCLIP model, also masked or wrapped, whose image tower gives embeddings and,
            in the place of a teacher, attention. It is copied where it is needed. None has
            strategies look at pixels alone.
        progress: Completed share of the masked training steps, in [0, 1].

    Raises:
        ValueError: If the progress is out of its range.
    """

    model_input: ModelInput = field(default_factory=ModelInput)
    model: nn.Module | None = None
    progress: float = 0.0

    def __post_init__(self) -> None:
        if not 0.0 <= self.progress <= 1.0:
            raise ValueError(f"progress must be in [0, 1], got {self.progress}")

    def needs_model(self, strategy: MaskingStrategy) -> bool:
        """Return whether a strategy reads more than pixels at this progress."""
        reads_tokens = "tokens" in strategy.requires and self.progress > 0
        return "attention" in strategy.requires or reads_tokens

    def inputs(self, pixels: Tensor, strategy: MaskingStrategy) -> PatchInputs:
        """Gather what a strategy may look at, without random numbers.

        Args:
            pixels: Images as the model receives them. Shape (B, 3, H, W).
            strategy: It alone decides what is computed.

        Raises:
            ValueError: If the strategy needs a model and there is none, or none that fits.
        """
        if not self.needs_model(strategy):
            return PatchInputs(pixels, self.model_input.patch_size, progress=self.progress)
        if self.model is None:
            reason = (
                "reads the attention of an image tower"
                if "attention" in strategy.requires
                else f"compares patch embeddings at progress {self.progress}"
            )
            raise ValueError(
                f"{type(strategy).__name__} {reason}; give a trained model, as --model RUN does"
            )
        # open_clip takes seconds to import.
        from clip_pgs.inspection.tower_inputs import tower_inputs

        return tower_inputs(self.model, pixels, strategy, progress=self.progress)


def seeded_noise(num_images: int, num_patches: int, *, seed: int) -> Tensor:
    """Return the random numbers of a seed, shape (B, N), float32."""
    generator = torch.Generator().manual_seed(seed)
    return torch.rand((num_images, num_patches), generator=generator)


def fit_strategy(
    strategy: MaskingStrategy, batches: Iterable[PatchInputs], *, progress: float
) -> MaskingStrategy:
    """Return a strategy fitted to images, where it is one that training would calibrate.

    Args:
        strategy: It stays as it is.
        batches: The images with their noise; it is fitted to the mean over all batches.
        progress: That of the batches.
    """
    fitted = copy.deepcopy(strategy)
    if fitted.needs_calibration(progress):
        for inputs in batches:
            fitted.calibrate(inputs)
    return fitted
