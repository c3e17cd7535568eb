"""When a run saves between its epochs, and what it saves to go on from there."""

from __future__ import annotations

from collections.abc import Mapping
from time import monotonic

from clip_pgs.training.options import TrainOptions
from clip_pgs.training.phase_trainer import PhaseTrainer
from clip_pgs.training.telemetry.telemetry import Telemetry
from clip_pgs.training.writer import RunWriter


class RunSaver:
    """Saves on rank 0; on the others, and without a run folder, it does nothing.

    Args:
        writer: Writes into the run's folder; None where nothing is written.
        args: Options.
        telemetry: Says what the run has spent.
        metrics: The last measurements; changed by others.
        is_measured: Whether something is measured between an epoch's last step and its save.
    """

    def __init__(
        self,
        writer: RunWriter | None,
        args: TrainOptions,
        *,
        telemetry: Telemetry,
        metrics: Mapping[str, float],
        is_measured: bool = True,
    ) -> None:
        self._writer = writer
        self._is_measured = is_measured
        self._every_steps = args.save_every_steps or 0
        self._every_seconds = 60 * (args.save_every_minutes or 0)
        self._telemetry = telemetry
        self._metrics = metrics
        self._saved_at = monotonic()
        # A place that is saved needs no file of its own.
        self._saved_place: tuple[int, int] | None = None

    def start_from(self, epoch: int, position: int) -> None:
        """Note the place that the run goes on from, which is saved, or was never trained."""
        self._saved_place = (epoch, position)

    def save_due(self, trainer: PhaseTrainer, *, step: int) -> None:
        """Save after `step` steps of the run if that is due.

        Raises:
            BadNumbersError: If the last steps were not good enough to be saved.
        """
        if self._writer is None:
            return
        is_due = bool(self._every_steps) and step % self._every_steps == 0
        if self._every_seconds and monotonic() - self._saved_at >= self._every_seconds:
            # One that is late by the disk's fault does not hold the run up.
            is_due = is_due or not self._writer.is_saving
        if is_due and not self._is_saved_next(trainer):
            self._telemetry.check_numbers()
            self.save(trainer, trainer.epoch, trainer.position)

    def _is_saved_next(self, trainer: PhaseTrainer) -> bool:
        """Return whether the epoch is over, and its own save follows at once."""
        phase, writer = trainer.phase, self._writer
        if self._is_measured or writer is None:
            return False
        is_over = trainer.position == phase.steps_per_epoch * phase.samples_per_step
        epoch = trainer.epoch + 1
        return is_over and writer.saves_epoch(epoch, is_phase_end=epoch == phase.end_epoch)

    def save(self, trainer: PhaseTrainer, epoch: int, position: int) -> None:
        """Save a place in the run: `position` samples of the epoch after `epoch` completed ones."""
        if self._writer is None or self._saved_place == (epoch, position):
            return
        cost = self._telemetry.cost
        self._writer.save_step(
            epoch,
            step=cost.steps,
            position=position,
            optimizer=trainer.optimizer,
            masking_state=trainer.masking_state(),
            cost=cost,
            metrics=self._metrics,
        )
        self._note(epoch, position)

    def save_epoch(self, trainer: PhaseTrainer, epoch: int) -> None:
        """Save what is due after `epoch` epochs."""
        if self._writer is None:
            return
        cost = self._telemetry.cost
        is_saved = self._writer.save_epoch(
            epoch,
            step=cost.steps,
            optimizer=trainer.optimizer,
            masking_state=trainer.masking_state(),
            is_phase_end=epoch == trainer.phase.end_epoch,
            cost=cost,
            metrics=self._metrics,
        )
        if is_saved:
            self._note(epoch, 0)

    def wait(self) -> bool:
        """Wait until what was saved is on the disk; return whether it is."""
        return self._writer is None or self._writer.wait()

    def _note(self, epoch: int, position: int) -> None:
        self._saved_at = monotonic()
        self._saved_place = (epoch, position)
