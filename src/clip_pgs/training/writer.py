"""What rank 0 leaves in the run's folder while it trains: mask pictures, checkpoints, export."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import open_clip
import torch
from torch import Tensor

from clip_pgs.training.checkpoints.checkpoint import pack_checkpoint
from clip_pgs.training.checkpoints.checkpoint_store import CheckpointStore
from clip_pgs.training.export import FOLDER_NAME, write_export
from clip_pgs.training.options import TrainOptions
from clip_pgs.training.phases import total_epochs
from clip_pgs.training.record import with_results
from clip_pgs.training.telemetry.lenient import Lenient
from clip_pgs.training.telemetry.overlays import draw_masks, fixed_images, save_picture
from clip_pgs.training.telemetry.telemetry import Cost


class RunWriter:
    """Writes into a run's folder.

    Args:
        folder: The run's folder.
        args: Options.
        model: The plain model.
        scaler: The loss scaler, if there is one.
        record: From `describe_run`.
        keep_last: How many checkpoints of steps to keep; None keeps all.
    """

    def __init__(
        self,
        folder: Path,
        args: TrainOptions,
        *,
        model: open_clip.CLIP,
        scaler: torch.amp.GradScaler | None,
        record: Mapping[str, Any],
        keep_last: int | None = None,
    ) -> None:
        self._folder = folder
        self._args = args
        self._model = model
        self._scaler = scaler
        self._record = record
        self._images: Tensor | None = None
        self._lenient = Lenient("masks")
        self._store = CheckpointStore(
            folder / "checkpoints",
            keep_last=keep_last,
            delete_previous=args.delete_previous_checkpoint,
        )

    def choose_images(self, candidates: Tensor) -> None:
        """Draw masks on these training images, of shape (B, 3, H, W), from now on."""
        with self._lenient:
            self._images = fixed_images(self._folder / "masks", candidates)

    def draw_masks(self, epoch: int) -> Tensor | None:
        """Save and return a picture of what is kept; None where no images were chosen."""
        if self._images is None:
            return None
        picture = draw_masks(self._model, self._images, seed=self._args.seed)
        with self._lenient:
            save_picture(picture, self._folder / "masks" / f"epoch_{epoch}.png")
        return picture

    def save_epoch(
        self,
        epoch: int,
        *,
        step: int,
        optimizer: torch.optim.Optimizer,
        masking_state: dict[str, Any],
        is_phase_end: bool,
        cost: Cost,
        metrics: Mapping[str, float],
    ) -> float:
        """Save what is due after `epoch` epochs; a phase's last always is.

        Returns:
            The seconds that it held the run; the disk is waited for by `wait`.
        """
        content = self._pack(
            epoch,
            step=step,
            position=0,
            optimizer=optimizer,
            masking_state=masking_state,
            record=with_results(self._record, cost=cost, metrics=metrics),
        )
        return self._store.save(
            content,
            as_epoch=self._keeps_epoch(epoch, is_phase_end=is_phase_end),
            as_most_recent=self._args.save_most_recent,
        )

    def saves_epoch(self, epoch: int, *, is_phase_end: bool) -> bool:
        """Return whether `save_epoch` would write anything."""
        return self._args.save_most_recent or self._keeps_epoch(epoch, is_phase_end=is_phase_end)

    def _keeps_epoch(self, epoch: int, *, is_phase_end: bool) -> bool:
        frequency = self._args.save_frequency
        return is_phase_end or (frequency > 0 and epoch % frequency == 0)

    def save_step(
        self,
        epoch: int,
        *,
        step: int,
        position: int,
        optimizer: torch.optim.Optimizer,
        masking_state: dict[str, Any],
        cost: Cost,
        metrics: Mapping[str, float],
    ) -> float:
        """Save after `step` optimiser steps, `position` samples into the epoch after `epoch`.

        Returns:
            The seconds that it held the run; the disk is waited for by `wait`.
        """
        content = self._pack(
            epoch,
            step=step,
            position=position,
            optimizer=optimizer,
            masking_state=masking_state,
            record=with_results(self._record, cost=cost, metrics=metrics),
        )
        return self._store.save(content, as_step=True)

    def _pack(self, epoch: int, **state: Any) -> dict[str, Any]:
        return pack_checkpoint(
            epoch=epoch, name=self._args.name or "", model=self._model, scaler=self._scaler, **state
        )

    @property
    def is_saving(self) -> bool:
        """Whether a checkpoint is being written, so that the next one would wait for it."""
        return self._store.is_busy

    def wait(self) -> bool:
        """Wait until the last checkpoint is on the disk; return whether it could be written."""
        return self._store.wait()

    def close(self) -> bool:
        """Wait as `wait` does; nothing is saved after it."""
        return self._store.close()

    def export(self, *, cost: Cost, metrics: Mapping[str, float]) -> Path:
        """Write the finished model as OpenCLIP's files and return their folder.

        Checkpoints are on the disk when the export is there.

        Raises:
            ValueError: If a weight is NaN or infinite.
            OSError: If it cannot be written.
        """
        self._store.wait()
        checkpoint = pack_checkpoint(
            epoch=total_epochs(self._args),
            name=self._args.name or "",
            model=self._model,
            record=with_results(self._record, cost=cost, metrics=metrics),
        )
        return write_export(checkpoint, self._folder / FOLDER_NAME)
