"""What a masked image tower carries: its strategy, and what the caller sets between steps."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from clip_pgs.integrations.open_clip.teacher import Teacher
from clip_pgs.masking.strategy import MaskingStrategy, PatchInputs, PatchSelection

WHEN = ("train", "always")


@dataclass(frozen=True)
class PatchGrid:
    """How an image tower cuts its images.

    Args:
        size: Patches per column and per row, (h, w).
        patch_size: (height, width) of a patch in pixels.
    """

    size: tuple[int, int]
    patch_size: tuple[int, int]

    @property
    def num_patches(self) -> int:
        """Number of patches, h * w."""
        return self.size[0] * self.size[1]


def check_when(when: str) -> None:
    """Refuse a `when` that is none of `WHEN`.

    Raises:
        ValueError: If it is.
    """
    if when not in WHEN:
        raise ValueError(f"when must be one of {', '.join(WHEN)}, got {when!r}")


class TowerMasking(nn.Module):
    """The masking of one image tower; it holds no parameter and no buffer.

    Args:
        strategy: Chooses the patches.
        grid: How the tower cuts its images.
        when: "train" masks in train mode, "always" in eval mode as well.
        teacher: Scores the patches of a strategy that requires attention.
        pack_tokens: Whether tokens of adaptive selections are packed; see `apply_masking`.

    Attributes:
        progress: Completed share of the masked training steps, in [0, 1].
        noise: Uniform numbers in [0, 1) for the coming forward passes, shape (B, N); None draws
            from the global stream.
        forced_selection: Takes the strategy's place where set.
        last_selection: What the latest masked forward pass kept.
        load_hook: Hands weights that are loaded into the tower to the teacher, where there is one.

    Raises:
        ValueError: If `when` is neither.
    """

    def __init__(
        self,
        strategy: MaskingStrategy,
        grid: PatchGrid,
        *,
        when: str = "train",
        teacher: Teacher | None = None,
        pack_tokens: bool | None = None,
    ) -> None:
        super().__init__()
        check_when(when)
        self.strategy = strategy
        self.grid = grid
        self.when = when
        self.teacher = teacher
        self.pack_tokens = pack_tokens
        self.progress = 0.0
        self.noise: Tensor | None = None
        self.forced_selection: PatchSelection | None = None
        self.last_selection: PatchSelection | None = None
        self.load_hook: RemovableHandle | None = None

    def is_active(self, *, training: bool) -> bool:
        """Return whether a forward pass in train mode, or in eval mode, drops patches."""
        return not self.strategy.keeps_all and (training or self.when == "always")

    @torch.no_grad()
    def inputs(self, pixels: Tensor, tokens: Tensor) -> PatchInputs:
        """Gather what the strategy may look at.

        Args:
            pixels: Images as the tower receives them. Shape (B, 3, H, W).
            tokens: Patch embeddings without positions. Shape (B, N, D).
        """
        # A convolution with a stride never sees the last pixels where the patch leaves a rest.
        (rows, columns), (height, width) = self.grid.size, self.grid.patch_size
        pixels = pixels[:, :, : rows * height, : columns * width]
        return PatchInputs(
            pixels,
            self.grid.patch_size,
            tokens=tokens,
            progress=self.progress,
            noise=self.noise,
            attention=None if self.teacher is None else self.teacher.scores(pixels),
        )

    @torch.no_grad()
    def select(self, pixels: Tensor, tokens: Tensor) -> PatchSelection:
        """Choose the patches of a batch; see `inputs` for the arguments."""
        selection = self.forced_selection
        if selection is None:
            selection = self.strategy(self.inputs(pixels, tokens))
        self.last_selection = selection
        return selection

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        # Every move of the model passes here; the teacher is no submodule, and follows.
        if self.teacher is not None:
            self.teacher.follow(fn)
        return super()._apply(fn, recurse)
