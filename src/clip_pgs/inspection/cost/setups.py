"""The models that are compared: plain CLIP as OpenCLIP runs it, and masked ones."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from open_clip.loss import ClipLoss
from open_clip.model import CLIP, CustomTextCLIP
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from clip_pgs.inspection.strategies import StrategySpec
from clip_pgs.integrations.open_clip import (
    CaptionGroups,
    CaptionTrimmer,
    allow_short_text,
    apply_masking,
    caption_trimmer,
    set_masking_progress,
)
from clip_pgs.integrations.open_clip.apply import masking_or_none
from clip_pgs.integrations.open_clip.text import GROUP_SHARES

PLAIN_TITLE = "plain CLIP"


@dataclass(frozen=True)
class Conditions:
    """What all setups share.

    Args:
        images: Shape (B, 3, H, W), on the device.
        captions: Padded token ids (B, T), on the CPU.
        autocast: Context of a forward pass.
        progress: Share of training that strategies are told.
        trims: Whether masked models get trimmed captions.
        pack_tokens: As `apply_masking` takes it.
        compiles: Whether models go through `torch.compile`.
    """

    images: Tensor
    captions: Tensor
    autocast: Callable[[], AbstractContextManager]
    progress: float = 0.0
    trims: bool = True
    pack_tokens: bool | None = None
    compiles: bool = False


class Setup:
    """One model of a comparison, which shares its weights with the others.

    Args:
        title: What it is called.
        model: A plain model; a copy of it is made that owns everything but the weights.
        conditions: What all setups share.
        spec: The strategy; None leaves the model and its captions as OpenCLIP has them.
        mask_ratio: For a strategy that takes one.
    """

    def __init__(
        self,
        title: str,
        model: CLIP | CustomTextCLIP,
        conditions: Conditions,
        *,
        spec: StrategySpec | None = None,
        mask_ratio: float | None = None,
    ) -> None:
        self.title = title
        self.conditions = conditions
        self.model = copy.deepcopy(model, {id(p): p for p in model.parameters()}).train()
        self._trim: CaptionTrimmer | None = None
        if spec is not None:
            strategy = spec.build(mask_ratio=mask_ratio)
            apply_masking(
                allow_short_text(self.model), strategy, pack_tokens=conditions.pack_tokens
            )
            set_masking_progress(self.model, conditions.progress)
            if conditions.trims:
                # As training does: groups of several lengths are compiled for each combination.
                shares = (1.0,) if conditions.compiles else GROUP_SHARES
                self._trim = caption_trimmer(self.model, shares=shares)
        self.texts: Tensor | CaptionGroups
        self.read(conditions.captions)
        self.runnable: nn.Module = self.model
        if conditions.compiles:
            self.runnable = torch.compile(self.model)  # type: ignore[assignment]
        self._loss = ClipLoss()

    def read(self, captions: Tensor) -> None:
        """Go on with other captions, trimmed as the setup trims them.

        Args:
            captions: Padded token ids (B, T), on the CPU.
        """
        texts = captions if self._trim is None else self._trim(captions)
        self.texts = texts.to(self.conditions.images.device)

    def share_steps(self, *, rank: int, world_size: int) -> None:
        """Take steps together with the other processes of the default group.

        Features of all processes are compared, each process's own with all others, which is how
        OpenCLIP's trainer runs on many (`--local-loss --gather-with-grad`).
        """
        device = self.conditions.images.device
        # DDP raises when it is given the CPU.
        device_ids = [device] if device.type == "cuda" else None
        self.runnable = DistributedDataParallel(self.runnable, device_ids=device_ids)
        self._loss = ClipLoss(
            local_loss=True, gather_with_grad=True, rank=rank, world_size=world_size
        )

    def forward(self) -> Tensor:
        """Run the model and the loss."""
        with self.conditions.autocast():
            image_features, text_features, logit_scale = self.runnable(
                self.conditions.images, self.texts
            )[:3]
            return self._loss(image_features, text_features, logit_scale)

    def selection(self) -> Callable[[], object] | None:
        """Return what chooses patches, by itself and ready to run; None where nothing does."""
        masking = masking_or_none(self.model)
        if masking is None or not masking.is_active(training=True):
            return None
        tower = self.model.visual
        with torch.no_grad(), self.conditions.autocast():
            tokens = tower.embed_patches(self.conditions.images)

        def select() -> object:
            with torch.no_grad(), self.conditions.autocast():
                return masking.select(self.conditions.images, tokens)

        return select

    def text_tokens(self) -> float:
        """Return how many tokens the text tower reads per caption, on average."""
        if isinstance(self.texts, CaptionGroups):
            return self.texts.mean_length()
        return float(self.texts.shape[1])


def build_setups(
    model: CLIP | CustomTextCLIP,
    specs: Sequence[StrategySpec],
    conditions: Conditions,
    *,
    mask_ratio: float | None,
) -> list[Setup]:
    """Build plain CLIP and a model for each strategy, over one set of weights.

    Raises:
        ValueError: If the model cannot be masked.
    """
    setups = [Setup(PLAIN_TITLE, model, conditions)]
    for spec in specs:
        setups.append(Setup(spec.title, model, conditions, spec=spec, mask_ratio=mask_ratio))
    return setups
