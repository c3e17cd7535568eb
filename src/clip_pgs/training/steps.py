"""The steps of an epoch, each taken by all processes or by none."""

from __future__ import annotations

from collections.abc import Callable

from clip_pgs.data.skips import StalledDataError, UnusableDataError
from clip_pgs.training.checkpoints.saving import RunSaver
from clip_pgs.training.phase_trainer import PhaseTrainer
from clip_pgs.training.step import Batch
from clip_pgs.training.survival.exits import BadNumbersError
from clip_pgs.training.survival.gate import Gate
from clip_pgs.training.survival.interrupts import AskedToLeave, Interrupts
from clip_pgs.training.survival.signs import FETCHING, SAVING, TRAINING, VOTING
from clip_pgs.training.survival.watchdog import Watchdog
from clip_pgs.training.telemetry.skip_log import SkipLog
from clip_pgs.training.telemetry.telemetry import Telemetry

# The first step compiles, and finds the fastest convolutions.
_FIRST_STEP_PATIENCE = 4.0
# A signal to all processes may reach those that load data first.
_SIGNAL_SECONDS = 1.0
# Samples that are longer in coming are not waited for by who is asked to leave.
_BATCH_SECONDS = 5.0


class Steps:
    """Takes steps, measures them and saves after them.

    Args:
        gate: Where processes agree to take a step.
        interrupts: Signals to this process.
        watchdog: Is told where this process is.
        telemetry: Is told what each step measured.
        saver: Saves after steps.
        skips: Counts samples that could not be used.
        on_first_batch: Called with a phase's trainer, its first batch in this launch and the epoch.
    """

    def __init__(
        self,
        gate: Gate,
        interrupts: Interrupts,
        watchdog: Watchdog,
        *,
        telemetry: Telemetry,
        saver: RunSaver,
        skips: SkipLog,
        on_first_batch: Callable[[PhaseTrainer, Batch, int], object],
    ) -> None:
        self._gate = gate
        self._interrupts = interrupts
        self._watchdog = watchdog
        self._telemetry = telemetry
        self._saver = saver
        self._skips = skips
        self._on_first_batch = on_first_batch
        self._is_first = True

    def start_phase(self) -> None:
        """Begin a phase, of which a sample has a cost of its own."""
        self._is_first = True

    def train_epoch(self, trainer: PhaseTrainer, epoch: int, position: int) -> None:
        """Take the steps that are left of an epoch.

        Args:
            trainer: The phase's.
            epoch: Counted from the run's beginning.
            position: Samples of it that the run has behind it.

        Raises:
            StoppedError, UnusableDataError, StalledDataError, BadNumbersError, OtherProcessError:
                See `Trainer.run`.
        """
        num_steps = trainer.start_epoch(epoch, position)
        self._telemetry.start_epoch()
        for number in range(num_steps):
            is_first, self._is_first = self._is_first, False
            patience = _FIRST_STEP_PATIENCE if is_first else 1.0
            batches, data_seconds = self._fetch(trainer, patience=patience)
            if (trainer.follow_schedule() or is_first) and self._telemetry.is_active:
                self._telemetry.flops = trainer.count_flops(*batches[0])
                self._telemetry.report_flops()
            if is_first:
                self._on_first_batch(trainer, batches[0], epoch)
            result, lr = trainer.train_step(batches)
            self._watchdog.note(self._telemetry.next_step, SAVING)
            try:
                self._telemetry.step(
                    result,
                    model=trainer.model,
                    epoch=epoch,
                    done=trainer.position,
                    is_last=number == num_steps - 1,
                    lr=lr,
                    data_seconds=data_seconds,
                )
                self._saver.save_due(trainer, step=self._telemetry.next_step)
            except BadNumbersError as error:
                # Rank 0 alone looks; the others hear of it before the next step.
                self._gate.error = error

    def _fetch(self, trainer: PhaseTrainer, *, patience: float) -> tuple[list[Batch], float]:
        """Return a step's batches once all processes have theirs, or leave together."""
        step = self._telemetry.next_step
        self._skips.step = step
        self._watchdog.note(step, FETCHING, patience=patience)
        batches: list[Batch] = []
        seconds = 0.0
        try:
            with self._interrupts.breakable(patience=_BATCH_SECONDS):
                batches, seconds = trainer.next_batches()
        except AskedToLeave:
            pass
        except (UnusableDataError, StalledDataError) as error:
            self._interrupts.wait(_SIGNAL_SECONDS)
            if not self._interrupts.code:
                self._gate.error = error
        self._watchdog.note(step, VOTING, patience=patience)
        num_skipped = self._gate.go_through(
            trainer, (trainer.epoch, trainer.position), num_skipped=self._skips.take_count()
        )
        self._telemetry.skip_samples(num_skipped)
        self._watchdog.note(step, TRAINING, patience=patience)
        return batches, seconds
