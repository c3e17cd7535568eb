"""Epochs and steps of a training run."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Iterator
from datetime import timedelta
from itertools import islice
from pathlib import Path
from time import perf_counter

import torch
from open_clip import get_input_dtype
from open_clip_train.precision import get_autocast
from torch import Tensor

from clip_pgs.data.stream import build_train_stream
from clip_pgs.training.build import (
    build_loss,
    build_model,
    build_optimizer,
    build_schedule,
    count_steps,
)
from clip_pgs.training.checkpoint import restore
from clip_pgs.training.distributed import Meeting, parallelize
from clip_pgs.training.flops import count_flops
from clip_pgs.training.launch import load_start, open_sinks
from clip_pgs.training.masks import masks_of_run
from clip_pgs.training.meter import WindowMeter
from clip_pgs.training.precision import create_scaler
from clip_pgs.training.record import describe_run
from clip_pgs.training.seeding import derive_seed, seed_everything
from clip_pgs.training.step import Batch, StepResult, compute_gradients, update_weights
from clip_pgs.training.telemetry import Cost, Telemetry
from clip_pgs.training.validation import Evaluate, Validation, save_results
from clip_pgs.training.writer import RunWriter

_FLOP_SAMPLES = 2

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
        self._model = self._parts.model
        self._optimizer = build_optimizer(args, self._model)
        self._scaler = create_scaler(args.precision, device)
        checkpoint = load_start(args, folder, meeting)
        self._first_epoch = 0
        if checkpoint is not None:
            self._first_epoch = restore(
                checkpoint, model=self._model, optimizer=self._optimizer, scaler=self._scaler
            )
        earlier = (checkpoint or {}).get("clip_pgs", {}) if self._first_epoch > 0 else {}
        self._metrics: dict[str, float] = dict(earlier.get("metrics", {}))

        self._stream = build_train_stream(
            args,
            transform=self._parts.train_transform,
            tokenize=self._parts.tokenize,
            rank=args.rank,
            world_size=args.world_size,
        )
        self._steps_per_epoch = count_steps(args, num_batches=self._stream.num_batches)
        self._total_steps = self._steps_per_epoch * args.epochs
        self._schedule = build_schedule(
            args, self._optimizer, steps_per_epoch=self._steps_per_epoch
        )
        self._masks = masks_of_run(args, self._model)
        self._loss = build_loss(args, self._model)
        self._parallel = parallelize(self._model, args, device)
        self._autocast = get_autocast(args.precision, device_type=device.type)
        self._input_dtype = get_input_dtype(args.precision)
        self._validation = (
            Validation(args, self._parts, evaluate=evaluate) if self._is_main else None
        )
        self._telemetry = self._open_telemetry(Cost(**earlier.get("cost", {})))
        self._writer = None if self._folder is None else self._open_writer(self._folder)

    def _open_telemetry(self, cost: Cost) -> Telemetry:
        args = self._args
        first_step = self._first_epoch * self._steps_per_epoch
        return Telemetry(
            sinks=open_sinks(args, self._folder, first_step=first_step),
            cost=cost,
            meter=WindowMeter(
                num_patches=self._masks.num_patches if self._masks else 0,
                samples_per_step=args.batch_size * args.accum_freq * args.world_size,
            ),
            world_size=args.world_size,
            steps_per_epoch=self._steps_per_epoch,
            first_step=first_step,
            total_steps=self._total_steps,
            log_every=args.log_every_n_steps,
            is_active=self._is_main,
        )

    def _open_writer(self, folder: Path) -> RunWriter:
        return RunWriter(
            folder,
            self._args,
            model=self._model,
            optimizer=self._optimizer,
            scaler=self._scaler,
            record=describe_run(
                self._args, self._model, self._device, num_samples=self._stream.num_samples
            ),
        )

    def run(self) -> None:
        """Train the epochs that are left, then export the model."""
        _logger.debug("Model:\n%s", self._model)
        _logger.info(
            "Training epochs %d to %d of %d steps each",
            self._first_epoch,
            self._args.epochs,
            self._steps_per_epoch,
        )
        try:
            for epoch in range(self._first_epoch, self._args.epochs):
                self._train_epoch(epoch)
                self._finish_epoch(epoch + 1)
                # Nobody starts an epoch, or leaves, while rank 0 measures and saves.
                self._meeting.wait()
            if self._writer is not None:
                self._finish(self._writer)
        finally:
            self._telemetry.close()

    def _train_epoch(self, epoch: int) -> None:
        args = self._args
        seed_everything(derive_seed(args.seed, "epoch", epoch, args.rank))
        self._stream.set_epoch(epoch)
        self._model.train()
        self._telemetry.start_epoch()
        samples = iter(self._stream)
        for step_in_epoch in range(self._steps_per_epoch):
            started = perf_counter()
            batches = list(islice(self._on_device(samples), args.accum_freq))
            data_seconds = perf_counter() - started
            if len(batches) < args.accum_freq:
                raise RuntimeError(
                    f"the training data ended at step {step_in_epoch} of "
                    f"{self._steps_per_epoch} in epoch {epoch} on rank {args.rank}"
                )
            if epoch == self._first_epoch and step_in_epoch == 0 and self._is_main:
                self._look_at_first_batch(*batches[0])
            step = epoch * self._steps_per_epoch + step_in_epoch
            lr = self._schedule(step)
            result = self._train_step(batches, step)
            self._telemetry.step(
                result, model=self._model, epoch=epoch, step=step, lr=lr, data_seconds=data_seconds
            )

    def _on_device(self, samples: Iterator[Batch]) -> Iterator[Batch]:
        for images, texts in samples:
            yield (
                images.to(self._device, dtype=self._input_dtype, non_blocking=True),
                texts.to(self._device, non_blocking=True),
            )

    def _train_step(self, batches: list[Batch], step: int) -> StepResult:
        # Dropout draws from the global stream; keyed by the step, it survives a resume.
        torch.manual_seed(derive_seed(self._args.seed, "step", step, self._args.rank))
        if self._masks is not None:
            self._masks.start_step(step, total_steps=self._total_steps, device=self._device)
        losses = compute_gradients(
            self._parallel,
            batches,
            self._loss,
            before_forward=self._masks.give if self._masks else None,
            autocast=self._autocast,
            scaler=self._scaler,
        )
        grad_norm = update_weights(
            self._model,
            self._optimizer,
            scaler=self._scaler,
            grad_clip_norm=self._args.grad_clip_norm,
        )
        kept_counts = self._masks.finish_step() if self._masks else []
        return StepResult(losses, grad_norm, kept_counts)

    def _look_at_first_batch(self, images: Tensor, texts: Tensor) -> None:
        """Count what a sample costs, and draw the masks that training starts with."""
        self._telemetry.flops_per_sample = count_flops(
            self._model,
            images[:_FLOP_SAMPLES],
            texts[:_FLOP_SAMPLES],
            autocast=self._autocast,
            extra_forward=self._args.accum_freq > 1,
        )
        if self._writer is not None and self._masks is not None:
            self._writer.choose_images(images)
            self._draw_masks(self._first_epoch)

    def _draw_masks(self, epoch: int) -> None:
        picture = self._writer.draw_masks(epoch) if self._writer is not None else None
        if picture is not None:
            self._telemetry.picture("masks", picture)

    def _finish_epoch(self, epoch: int) -> None:
        """Draw, measure and save after `epoch` epochs; rank 0 alone has anything to do."""
        if self._validation is None:
            return
        self._draw_masks(epoch)
        metrics = self._validation.run(epoch=epoch, epochs=self._args.epochs)
        if metrics:
            self._metrics = metrics
            self._telemetry.validation(metrics, epoch=epoch)
            if self._folder is not None:
                save_results(metrics, self._folder / "checkpoints")
        if self._writer is not None:
            self._writer.save(epoch, cost=self._telemetry.cost, metrics=self._metrics)

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
