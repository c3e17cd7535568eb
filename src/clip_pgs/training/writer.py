"""What rank 0 leaves in the run's folder while it trains: mask pictures, checkpoints, export."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import open_clip
import torch
from torch import Tensor

from clip_pgs.training.checkpoint import pack_checkpoint, save_checkpoint
from clip_pgs.training.export import FOLDER_NAME, write_export
from clip_pgs.training.overlays import draw_masks, fixed_images, save_picture
from clip_pgs.training.phases import total_epochs
from clip_pgs.training.record import with_results
from clip_pgs.training.telemetry import Cost


class RunWriter:
    """Writes into a run's folder.

    Args:
        folder: The run's folder.
        args: Options.
        model: The plain model.
        scaler: The loss scaler, if there is one.
        record: From `describe_run`.
    """

    def __init__(
        self,
        folder: Path,
        args: argparse.Namespace,
        *,
        model: open_clip.CLIP,
        scaler: torch.amp.GradScaler | None,
        record: Mapping[str, Any],
    ) -> None:
        self._folder = folder
        self._args = args
        self._model = model
        self._scaler = scaler
        self._record = record
        self._images: Tensor | None = None

    def choose_images(self, candidates: Tensor) -> None:
        """Draw masks on these training images, of shape (B, 3, H, W), from now on."""
        self._images = fixed_images(self._folder / "masks", candidates)

    def draw_masks(self, epoch: int) -> Tensor | None:
        """Save and return a picture of what is kept; None where no images were chosen."""
        if self._images is None:
            return None
        picture = draw_masks(self._model, self._images, seed=self._args.seed)
        save_picture(picture, self._folder / "masks" / f"epoch_{epoch}.png")
        return picture

    def save(
        self,
        epoch: int,
        *,
        optimizer: torch.optim.Optimizer,
        masking_state: dict[str, Any],
        is_phase_end: bool,
        cost: Cost,
        metrics: Mapping[str, float],
    ) -> None:
        """Write the checkpoints that are due after `epoch` epochs; a phase's last always is."""
        frequency = self._args.save_frequency
        checkpoint = pack_checkpoint(
            epoch=epoch,
            name=self._args.name,
            model=self._model,
            optimizer=optimizer,
            scaler=self._scaler,
            masking_state=masking_state,
            record=with_results(self._record, cost=cost, metrics=metrics),
        )
        save_checkpoint(
            checkpoint,
            self._folder / "checkpoints",
            is_numbered=is_phase_end or (frequency > 0 and epoch % frequency == 0),
            is_latest=self._args.save_most_recent,
            delete_previous=self._args.delete_previous_checkpoint,
        )

    def export(self, *, cost: Cost, metrics: Mapping[str, float]) -> Path:
        """Write the finished model as OpenCLIP's files and return their folder."""
        checkpoint = pack_checkpoint(
            epoch=total_epochs(self._args),
            name=self._args.name,
            model=self._model,
            record=with_results(self._record, cost=cost, metrics=metrics),
        )
        return write_export(checkpoint, self._folder / FOLDER_NAME)
