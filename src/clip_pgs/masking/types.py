"""What a masking strategy is given, what it returns, and what it is."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor, nn

from clip_pgs.masking.grid import patch_grid, patch_sides
from clip_pgs.masking.ratios import check_mask_ratio


@dataclass
class PatchInputs:
    """Everything a strategy may look at to choose patches.

    Args:
        pixels: Images as the model receives them (normalised). Shape (B, 3, H, W), any float dtype.
        patch_size: Side of a patch in pixels, or (height, width). It must divide H and W.
        tokens: Patch embeddings before positions are added, raster order. Shape (B, N, D).
        progress: Completed share of the masked training steps, in [0, 1].
        noise: Uniform numbers in [0, 1) that replace the strategy's own draw, so that a caller
            decides which sample sees which mask. Shape (B, N), float32.
        attention: How much a teacher attends to each patch, in any scale. Shape (B, N), float32.

    Attributes:
        grid_size: Patches per column and per row, (h, w).

    Raises:
        ValueError: If a shape, the patch size or the progress breaks a rule above.
    """

    pixels: Tensor
    patch_size: int | tuple[int, int]
    tokens: Tensor | None = None
    progress: float = 0.0
    noise: Tensor | None = None
    attention: Tensor | None = None
    grid_size: tuple[int, int] = field(init=False)

    def __post_init__(self) -> None:
        if self.pixels.ndim != 4:
            raise ValueError(f"pixels must have shape (B, 3, H, W), got {tuple(self.pixels.shape)}")
        if not self.pixels.is_floating_point():
            raise ValueError(f"pixels must be floating point, got {self.pixels.dtype}")
        self.patch_size = patch_sides(self.patch_size)
        height, width = self.pixels.shape[-2:]
        self.grid_size = patch_grid((height, width), self.patch_size)
        if not 0.0 <= self.progress <= 1.0:
            raise ValueError(f"progress must be in [0, 1], got {self.progress}")
        expected = (self.batch_size, self.num_patches)
        if self.tokens is not None and (
            self.tokens.ndim != 3 or tuple(self.tokens.shape[:2]) != expected
        ):
            raise ValueError(
                f"tokens must have shape (B, N, D) with (B, N) = {expected}, "
                f"got {tuple(self.tokens.shape)}"
            )
        for name, values in (("noise", self.noise), ("attention", self.attention)):
            if values is not None and tuple(values.shape) != expected:
                raise ValueError(
                    f"{name} must have shape (B, N) = {expected}, got {tuple(values.shape)}"
                )

    @property
    def batch_size(self) -> int:
        """Number of images, B."""
        return self.pixels.shape[0]

    @property
    def num_patches(self) -> int:
        """Number of patches per image, N = h * w."""
        return self.grid_size[0] * self.grid_size[1]

    @property
    def device(self) -> torch.device:
        """Device of the pixels, on which a strategy draws and computes."""
        return self.pixels.device


@dataclass
class PatchSelection:
    """The patches that stay.

    Args:
        index: Positions of kept patches in raster order, ascending. Shape (B, K), int64.
        valid: True where `index` holds a kept patch, False where a slot is padding. Valid slots
            come first. None means that every slot is valid. Shape (B, K), bool. A padding slot
            repeats the last kept patch of its row, so that gathering it reads no masked patch.
        similar: True where a kept patch resembles a candidate. It serves the attention bias of
            `pgs-released` alone, and is None elsewhere. Shape (B, K), bool.
    """

    index: Tensor
    valid: Tensor | None = None
    similar: Tensor | None = None

    def kept_counts(self) -> Tensor:
        """Return the number of kept patches of each image, shape (B,), int64."""
        if self.valid is None:
            return self.index.new_full((self.index.shape[0],), self.index.shape[1])
        return self.valid.sum(dim=1)


class MaskingStrategy(nn.Module):
    """Choose the patches of each image that a vision transformer will see.

    A strategy has no parameter and no buffer, never tests `self.training` and never moves
    devices. The shape of what it returns depends on its options and on N alone.

    Attributes:
        requires: Optional inputs it reads: "tokens" once `progress` > 0, "attention" always.
        keeps_all: True for the strategy that masks nothing; a tower then skips masking.
        attention_bias: True asks the tower for the attention bias of the released CLIP-PGS code.
        mask_ratio: Share of patches dropped, in [0, 1), where the strategy has such an option.
        mask_ratio_min: Lower bound of an adaptive share, where the strategy has such an option.
    """

    requires: ClassVar[frozenset[str]] = frozenset()
    keeps_all: ClassVar[bool] = False
    attention_bias: bool = False

    mask_ratio: float
    mask_ratio_min: float

    def __init__(self) -> None:
        super().__init__()
        self._min_share: float | None = None

    def set_mask_ratio(self, mask_ratio: float) -> None:
        """Change the mask ratio between two steps, as a schedule does.

        A lower bound follows: `mask_ratio_min / mask_ratio` stays what it was before the first
        change.

        Args:
            mask_ratio: Share of patches dropped from now on, in [0, 1).

        Raises:
            ValueError: If the strategy has no mask ratio, or the ratio is out of its range.
        """
        if not hasattr(self, "mask_ratio"):
            raise ValueError(f"{type(self).__name__} has no mask ratio, got {mask_ratio}")
        check_mask_ratio(mask_ratio)
        if hasattr(self, "mask_ratio_min"):
            # Kept from the first call on, since a schedule may pass through 0.
            if self._min_share is None:
                self._min_share = self.mask_ratio_min / self.mask_ratio if self.mask_ratio else 1.0
            self.mask_ratio_min = mask_ratio * self._min_share
        self.mask_ratio = mask_ratio

    def state(self) -> dict[str, float | list[float]]:
        """Return what training found and a resumed run needs, as plain numbers."""
        return {}

    def load_state(self, state: Mapping[str, float | list[float]]) -> None:
        """Restore what `state` returned.

        Args:
            state: The numbers; empty for a strategy that finds none.

        Raises:
            ValueError: If the numbers belong to another strategy.
        """
        if set(state) != set(self.state()):
            raise ValueError(
                f"the state of {type(self).__name__} must hold {sorted(self.state())}, "
                f"got {sorted(state)}"
            )

    def needs_calibration(self, progress: float) -> bool:
        """Return whether `calibrate` should see the coming batch.

        Args:
            progress: Completed share of the masked training steps, in [0, 1].
        """
        return False

    def calibrate(
        self, inputs: PatchInputs, *, average: Callable[[float], float] | None = None
    ) -> None:
        """Fit the strategy to a batch; called in eager mode, outside the training step.

        It alone may look across images and synchronise with the host.

        Args:
            inputs: What the coming batch gives to look at.
            average: Takes this process's number and returns the mean over all of them. None
                stands for one process.
        """

    def forward(
        self, inputs: PatchInputs, *, generator: torch.Generator | None = None
    ) -> PatchSelection:
        """Choose patches; see the class that implements it.

        Args:
            inputs: What there is to look at.
            generator: Source of randomness on the device of the pixels; None draws from the
                global stream. `inputs.noise` takes its place where given.
        """
        raise NotImplementedError
