"""The course of a training run: its phases and epochs, and what follows each."""

from __future__ import annotations

import logging
from datetime import timedelta
from pathlib import Path

import torch

from clip_pgs.training.build import build_model
from clip_pgs.training.checkpoints.checkpoint import restore
from clip_pgs.training.checkpoints.saving import RunSaver
from clip_pgs.training.distributed import Meeting
from clip_pgs.training.launch import load_start, open_sinks, say_what_changed
from clip_pgs.training.options import TrainOptions
from clip_pgs.training.phase_trainer import PhaseTrainer
from clip_pgs.training.phases import Phase, plan_phases, total_epochs
from clip_pgs.training.precision import create_scaler
from clip_pgs.training.record import describe_run
from clip_pgs.training.step import Batch
from clip_pgs.training.steps import Steps
from clip_pgs.training.survival.bad_steps import BadSteps
from clip_pgs.training.survival.exits import UnwrittenError
from clip_pgs.training.survival.gate import Gate
from clip_pgs.training.survival.interrupts import AskedToLeave, Interrupts
from clip_pgs.training.survival.signs import EVALUATING, EXPORTING
from clip_pgs.training.survival.watchdog import Watchdog
from clip_pgs.training.telemetry.lenient import Lenient
from clip_pgs.training.telemetry.skip_log import SkipLog
from clip_pgs.training.telemetry.telemetry import Cost, Telemetry
from clip_pgs.training.validation import (
    RESULTS_NAME,
    Evaluate,
    Validation,
    describe_metrics,
    save_results,
)
from clip_pgs.training.writer import RunWriter

_logger = logging.getLogger(__name__)


class Trainer:
    """A run in one process.

    Args:
        args: Options, with `rank`, `world_size` and `distributed`.
        device: This process's device.
        folder: The run's folder; rank 0 alone writes there, but for what is skipped. None keeps
            nothing.
        meeting: Where processes wait for each other.
        interrupts: Signals to this process.
        watchdog: Is told where this process is.
        evaluate: Measures more than OpenCLIP does.

    Raises:
        ValueError: If the data does not fill one step, or the checkpoint does not fit.
    """

    def __init__(
        self,
        args: TrainOptions,
        device: torch.device,
        folder: Path | None,
        meeting: Meeting,
        *,
        interrupts: Interrupts,
        watchdog: Watchdog,
        evaluate: Evaluate | None,
    ) -> None:
        self._args = args
        self._device = device
        self._interrupts = interrupts
        self._watchdog = watchdog
        self._is_main = args.rank == 0
        self._folder = folder if self._is_main else None

        self._parts = build_model(args, device)
        self._scaler = create_scaler(args.precision, device)
        self._checkpoint = load_start(args, folder, meeting)
        self._first_epoch = self._first_position = 0
        if self._checkpoint is not None:
            self._first_epoch = restore(
                self._checkpoint, model=self._parts.model, scaler=self._scaler
            )
            self._first_position = self._checkpoint.get("position", 0)
        has_begun = (self._first_epoch, self._first_position) > (0, 0)
        earlier = (self._checkpoint or {}).get("clip_pgs", {}) if has_begun else {}
        self._metrics: dict[str, float] = dict(earlier.get("metrics", {}))

        self._lenient = Lenient(RESULTS_NAME)
        self._skips = SkipLog(folder, rank=args.rank)
        self._phases = plan_phases(args, self._parts, on_skip=self._skips)
        if self._checkpoint is not None and has_begun:
            is_ordered = self._phases[0].stream.is_ordered
            say_what_changed(args, self._checkpoint, is_ordered=is_ordered)
        self._validation = (
            Validation(args, self._parts, evaluate=evaluate) if self._is_main else None
        )
        self._telemetry = self._open_telemetry(Cost(**earlier.get("cost", {})))
        self._writer = None if self._folder is None else self._open_writer(self._folder)
        self._saver = RunSaver(
            self._writer,
            args,
            telemetry=self._telemetry,
            metrics=self._metrics,
            is_measured=any((args.val_data, args.imagenet_val, args.imagenet_v2, evaluate)),
        )
        self._saver.start_from(self._first_epoch, self._first_position)
        self._gate = Gate(meeting, interrupts, self._saver)
        self._steps = Steps(
            self._gate,
            interrupts,
            watchdog,
            telemetry=self._telemetry,
            saver=self._saver,
            skips=self._skips,
            on_first_batch=self._draw_first_masks,
        )

    def _open_telemetry(self, cost: Cost) -> Telemetry:
        if cost.steps == 0 and self._first_epoch > 0:
            # OpenCLIP's checkpoints do not say how many steps they took.
            begun = [phase for phase in self._phases if phase.first_epoch < self._first_epoch]
            cost.steps = begun[-1].steps_before(self._first_epoch)
        self._skips.open(step=cost.steps)
        return Telemetry(
            sinks=open_sinks(self._args, self._folder, first_step=cost.steps),
            cost=cost,
            world_size=self._args.world_size,
            bad_steps=BadSteps(self._device, max_in_row=self._args.max_bad_steps),
            total_steps=sum(phase.num_steps for phase in self._phases),
            log_every=self._args.log_every_n_steps,
            is_active=self._is_main,
        )

    def _open_writer(self, folder: Path) -> RunWriter:
        return RunWriter(
            folder,
            self._args,
            model=self._parts.model,
            scaler=self._scaler,
            record=describe_run(
                self._args,
                self._parts.model,
                self._device,
                num_samples=self._phases[0].stream.num_samples,
            ),
            keep_last=self._args.keep_checkpoints,
        )

    def run(self) -> None:
        """Train the epochs that are left, then export the model.

        Raises:
            StoppedError: If a signal asked the run to leave; it has saved where it is.
            UnusableDataError, StalledDataError: If the data lets it down.
            BadNumbersError: If no step changes the weights any more.
            OtherProcessError: If another process raised one of these.
        """
        _logger.debug("Model:\n%s", self._parts.model)
        try:
            for phase in self._phases:
                if self._first_epoch < phase.end_epoch:
                    self._train_phase(phase)
            if self._writer is not None:
                self._finish(self._writer)
        except BaseException:
            # What is being saved is finished, whatever ended the run.
            if self._writer is not None:
                self._writer.close()
            raise
        finally:
            for phase in self._phases:
                phase.stream.close()
            if self._validation is not None:
                self._validation.close()
            self._telemetry.close()

    def _train_phase(self, phase: Phase) -> None:
        first_epoch = max(phase.first_epoch, self._first_epoch)
        _logger.info(
            "Training %sepochs %d to %d of %d steps each",
            "" if phase.name == "masked" else f"{phase.name} ",
            first_epoch,
            phase.end_epoch,
            phase.steps_per_epoch,
        )
        # A checkpoint at a phase's beginning holds the optimiser of the phase before.
        has_begun = phase.begins_before(self._first_epoch, self._first_position)
        trainer = PhaseTrainer(
            phase,
            self._parts,
            self._device,
            scaler=self._scaler,
            checkpoint=self._checkpoint if has_begun else None,
        )
        self._checkpoint = None
        self._telemetry.start_phase(
            num_patches=trainer.masks.num_patches if trainer.masks else 0,
            samples_per_step=phase.samples_per_step,
            steps_per_epoch=phase.steps_per_epoch,
        )
        self._steps.start_phase()
        for epoch in range(first_epoch, phase.end_epoch):
            position = self._first_position if epoch == self._first_epoch else 0
            self._steps.train_epoch(trainer, epoch, position)
            self._finish_epoch(trainer, epoch)

    def _draw_first_masks(self, trainer: PhaseTrainer, batch: Batch, epoch: int) -> None:
        if self._writer is not None and trainer.masks is not None:
            self._writer.choose_images(batch[0])
            self._draw_masks(epoch)

    def _draw_masks(self, epoch: int) -> None:
        picture = self._writer.draw_masks(epoch) if self._writer is not None else None
        if picture is not None:
            self._telemetry.picture("masks", picture)

    def _finish_epoch(self, trainer: PhaseTrainer, epoch: int) -> None:
        """Draw, measure and save after an epoch; nobody goes on, or leaves, before rank 0 has."""
        self._watchdog.let(self._telemetry.next_step, EVALUATING)
        place = (epoch, trainer.position)
        self._gate.go_through(trainer, place)
        self._telemetry.finish_epoch(epoch + 1, total_epochs(self._args))
        is_done = True
        if self._validation is not None:
            try:
                with self._interrupts.breakable():
                    self._measure(self._validation, trainer, epoch + 1)
                self._saver.save_epoch(trainer, epoch + 1)
            except AskedToLeave:
                is_done = False
        place = (epoch + 1, 0) if is_done else place
        is_last = epoch + 1 == total_epochs(self._args)
        self._gate.go_through(trainer, place, is_done=is_done and is_last)

    def _measure(self, validation: Validation, trainer: PhaseTrainer, epoch: int) -> None:
        if trainer.masks is not None:
            self._draw_masks(epoch)
        metrics = validation.run(epoch=epoch, epochs=total_epochs(self._args))
        if metrics:
            self._metrics.clear()
            self._metrics.update(metrics)
            for line in describe_metrics(metrics):
                _logger.info("After epoch %d: %s", epoch, line)
            self._telemetry.validation(metrics, epoch=epoch)
            if self._folder is not None:
                with self._lenient:
                    save_results(metrics, self._folder / "checkpoints")

    def _finish(self, writer: RunWriter) -> None:
        cost = self._telemetry.cost
        self._watchdog.let(cost.steps, EXPORTING)
        try:
            export = writer.export(cost=cost, metrics=self._metrics)
        except OSError as error:
            cure = f"python -m clip_pgs.training.export {self._folder} makes it from the checkpoint"
            if not writer.wait():
                cure = "nor could the last checkpoint be; --resume latest makes both"
            raise UnwrittenError(f"the export cannot be written: {error}; {cure}") from error
        if not writer.close():
            raise UnwrittenError(
                f"the last checkpoint could not be written or is gone; the export is in {export}"
            )
        _logger.info(
            "Done: %d steps, %d samples, %.3g FLOPs in %s",
            cost.steps,
            cost.samples,
            cost.flops,
            timedelta(seconds=round(cost.seconds)),
        )
        _logger.info("Checkpoints, curves and mask pictures are in %s", self._folder)
        _logger.info("OpenCLIP opens the model as local-dir:%s", export)
