"""The course of a training run: its phases and epochs, and what follows each."""

from __future__ import annotations

import argparse
import logging
from datetime import timedelta
from pathlib import Path

import torch

from clip_pgs.training.build import build_model
from clip_pgs.training.checkpoint import restore
from clip_pgs.training.distributed import Meeting
from clip_pgs.training.launch import load_start, open_sinks
from clip_pgs.training.phase_trainer import PhaseTrainer
from clip_pgs.training.phases import Phase, plan_phases, total_epochs
from clip_pgs.training.precision import create_scaler
from clip_pgs.training.record import describe_run
from clip_pgs.training.step import Batch
from clip_pgs.training.telemetry import Cost, Telemetry
from clip_pgs.training.validation import Evaluate, Validation, save_results
from clip_pgs.training.writer import RunWriter

_logger = logging.getLogger(__name__)


class Trainer:
    """A run in one process.

    Args:
        args: Options, with `rank`, `world_size` and `distributed`.
        device: This process's device.
        folder: The run's folder; rank 0 alone writes there. None keeps nothing.
        meeting: Where processes wait for each other.
        evaluate: Measures more than OpenCLIP does.

    Raises:
        ValueError: If the data does not fill one step.
    """

    def __init__(
        self,
        args: argparse.Namespace,
        device: torch.device,
        folder: Path | None,
        meeting: Meeting,
        *,
        evaluate: Evaluate | None,
    ) -> None:
        self._args = args
        self._device = device
        self._meeting = meeting
        self._is_main = args.rank == 0
        self._folder = folder if self._is_main else None

        self._parts = build_model(args, device)
        self._scaler = create_scaler(args.precision, device)
        self._checkpoint = load_start(args, folder, meeting)
        self._first_epoch = 0
        if self._checkpoint is not None:
            self._first_epoch = restore(
                self._checkpoint, model=self._parts.model, scaler=self._scaler
            )
        earlier = (self._checkpoint or {}).get("clip_pgs", {}) if self._first_epoch > 0 else {}
        self._metrics: dict[str, float] = dict(earlier.get("metrics", {}))

        self._phases = plan_phases(args, self._parts)
        self._validation = (
            Validation(args, self._parts, evaluate=evaluate) if self._is_main else None
        )
        self._telemetry = self._open_telemetry(Cost(**earlier.get("cost", {})))
        self._writer = None if self._folder is None else self._open_writer(self._folder)

    def _open_telemetry(self, cost: Cost) -> Telemetry:
        begun = [phase for phase in self._phases if phase.first_epoch <= self._first_epoch]
        first_step = begun[-1].steps_before(self._first_epoch)
        return Telemetry(
            sinks=open_sinks(self._args, self._folder, first_step=first_step),
            cost=cost,
            world_size=self._args.world_size,
            first_step=first_step,
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
        )

    def run(self) -> None:
        """Train the epochs that are left, then export the model."""
        _logger.debug("Model:\n%s", self._parts.model)
        try:
            for phase in self._phases:
                if self._first_epoch < phase.end_epoch:
                    self._train_phase(phase)
            if self._writer is not None:
                self._finish(self._writer)
        finally:
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
        has_begun = phase.first_epoch < self._first_epoch
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
        for epoch in range(first_epoch, phase.end_epoch):
            self._train_epoch(trainer, epoch, is_first=epoch == first_epoch)
            self._finish_epoch(trainer, epoch + 1)
            # Nobody starts an epoch, or leaves, while rank 0 measures and saves.
            self._meeting.wait()

    def _train_epoch(self, trainer: PhaseTrainer, epoch: int, *, is_first: bool) -> None:
        trainer.start_epoch(epoch)
        self._telemetry.start_epoch()
        for step_in_epoch in range(trainer.phase.steps_per_epoch):
            batches, data_seconds = trainer.next_batches()
            is_new = is_first and step_in_epoch == 0
            if (trainer.follow_schedule() or is_new) and self._is_main:
                self._telemetry.flops = trainer.count_flops(*batches[0])
                self._telemetry.report_flops()
            if is_new:
                self._draw_first_masks(trainer, batches[0], epoch)
            result, lr = trainer.train_step(batches)
            self._telemetry.step(
                result,
                model=self._parts.model,
                epoch=epoch,
                step_in_epoch=step_in_epoch,
                lr=lr,
                data_seconds=data_seconds,
            )

    def _draw_first_masks(self, trainer: PhaseTrainer, batch: Batch, epoch: int) -> None:
        if self._writer is not None and trainer.masks is not None:
            self._writer.choose_images(batch[0])
            self._draw_masks(epoch)

    def _draw_masks(self, epoch: int) -> None:
        picture = self._writer.draw_masks(epoch) if self._writer is not None else None
        if picture is not None:
            self._telemetry.picture("masks", picture)

    def _finish_epoch(self, trainer: PhaseTrainer, epoch: int) -> None:
        """Draw, measure and save after `epoch` epochs; rank 0 alone has anything to do."""
        if self._validation is None:
            return
        if trainer.masks is not None:
            self._draw_masks(epoch)
        metrics = self._validation.run(epoch=epoch, epochs=total_epochs(self._args))
        if metrics:
            self._metrics = metrics
            self._telemetry.validation(metrics, epoch=epoch)
            if self._folder is not None:
                save_results(metrics, self._folder / "checkpoints")
        if self._writer is not None:
            self._writer.save(
                epoch,
                optimizer=trainer.optimizer,
                masking_state=trainer.masks.state() if trainer.masks else {},
                is_phase_end=epoch == trainer.phase.end_epoch,
                cost=self._telemetry.cost,
                metrics=self._metrics,
            )

    def _finish(self, writer: RunWriter) -> None:
        cost = self._telemetry.cost
        export = writer.export(cost=cost, metrics=self._metrics)
        _logger.info(
            "Done: %d steps, %d samples, %.3g FLOPs in %s",
            cost.steps,
            cost.samples,
            cost.flops,
            timedelta(seconds=round(cost.seconds)),
        )
        _logger.info("Checkpoints, curves and mask pictures are in %s", self._folder)
        _logger.info("OpenCLIP opens the model as local-dir:%s", export)
