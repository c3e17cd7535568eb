"""The optimiser steps of one phase."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from time import perf_counter
from typing import Any

import torch
from open_clip import get_input_dtype
from open_clip_train.precision import get_autocast
from torch import Tensor

from clip_pgs.integrations.open_clip import remove_masking
from clip_pgs.training.build import ModelParts, build_loss, build_optimizer, build_schedule
from clip_pgs.training.distributed import parallelize
from clip_pgs.training.flops import SampleFlops, count_sample_flops
from clip_pgs.training.masks import masks_of_run
from clip_pgs.training.phases import Phase
from clip_pgs.training.seeding import derive_seed, seed_everything
from clip_pgs.training.step import Batch, StepResult, compute_gradients, update_weights

_FLOP_SAMPLES = 2


class PhaseTrainer:
    """Trains the model through one phase, whose model, optimiser and samples it sets up.

    Args:
        phase: The phase; where it masks nothing, the model's masking is removed for good.
        parts: The model, as the phase before left it.
        device: This process's device.
        scaler: The run's loss scaler, if there is one.
        checkpoint: A checkpoint out of this phase to go on from; None starts the phase.
    """

    def __init__(
        self,
        phase: Phase,
        parts: ModelParts,
        device: torch.device,
        *,
        scaler: torch.amp.GradScaler | None,
        checkpoint: dict[str, Any] | None,
    ) -> None:
        args = phase.args
        self.phase = phase
        self._args = args
        self._device = device
        self._model = parts.model
        self._scaler = scaler
        if phase.removes_masking:
            remove_masking(self._model)
        self.optimizer = build_optimizer(args, self._model)
        if checkpoint is not None:
            self.optimizer.load_state_dict(checkpoint["optimizer"])
        self.masks = masks_of_run(args, self._model)
        if self.masks is not None and checkpoint is not None:
            self.masks.load_state(checkpoint.get("masking_state", {}))
        self._schedule = build_schedule(args, self.optimizer, steps_per_epoch=phase.steps_per_epoch)
        self._loss = build_loss(args, self._model)
        self._parallel = parallelize(self._model, args, device)
        self._autocast = get_autocast(args.precision, device_type=device.type)
        self._input_dtype = get_input_dtype(args.precision)
        self._samples: Iterator[Batch] = iter(())
        self._epoch = 0
        self._next_step = 0

    def start_epoch(self, epoch: int) -> None:
        """Begin one of the phase's epochs, counted from the run's beginning."""
        seed_everything(derive_seed(self._args.seed, "epoch", epoch, self._args.rank))
        self.phase.stream.set_epoch(epoch)
        self._model.train()
        self._samples = self._on_device(iter(self.phase.stream))
        self._epoch = epoch
        self._next_step = self.phase.steps_before(epoch)

    def next_batches(self) -> tuple[list[Batch], float]:
        """Return the coming step's micro-batches, and the seconds it waited for them.

        Raises:
            RuntimeError: If the data ended before the epoch.
        """
        started = perf_counter()
        batches = list(islice(self._samples, self._args.accum_freq))
        if len(batches) < self._args.accum_freq:
            raise RuntimeError(
                f"the training data ended at step "
                f"{self._next_step - self.phase.steps_before(self._epoch)} of "
                f"{self.phase.steps_per_epoch} in epoch {self._epoch} on rank {self._args.rank}"
            )
        return batches, perf_counter() - started

    def follow_schedule(self) -> bool:
        """Set the coming step's mask ratio; return whether it changed."""
        return self.masks is not None and self.masks.follow_schedule(
            self._step_in_phase, total_steps=self.phase.num_steps
        )

    def train_step(self, batches: list[Batch]) -> tuple[StepResult, float]:
        """Take one optimiser step; return what it measured and its learning rate."""
        step, step_in_phase = self._next_step, self._step_in_phase
        num_steps, masks = self.phase.num_steps, self.masks
        self._next_step += 1
        lr = self._schedule(step_in_phase)
        # Dropout draws from the global stream; keyed by the step, it survives a resume.
        torch.manual_seed(derive_seed(self._args.seed, "step", step, self._args.rank))
        if masks is not None:
            masks.start_step(step_in_phase, total_steps=num_steps, device=self._device)
            masks.calibrate([images for images, _ in batches])
        losses = compute_gradients(
            self._parallel,
            batches,
            self._loss,
            before_forward=masks.give if masks else None,
            autocast=self._autocast,
            scaler=self._scaler,
        )
        grad_norm = update_weights(
            self._model,
            self.optimizer,
            scaler=self._scaler,
            grad_clip_norm=self._args.grad_clip_norm,
        )
        if masks is not None:
            masks.follow_weights(step_in_phase, total_steps=num_steps)
        kept_counts = masks.finish_step() if masks else []
        return StepResult(losses, grad_norm, kept_counts), lr

    def count_flops(self, images: Tensor, texts: Tensor) -> SampleFlops:
        """Count what one sample of this phase costs, at the mask ratio of the coming step."""
        return count_sample_flops(
            self._model,
            images[:_FLOP_SAMPLES],
            texts[:_FLOP_SAMPLES],
            is_masked=self.masks is not None,
            autocast=self._autocast,
            extra_forward=self._args.accum_freq > 1,
        )

    @property
    def _step_in_phase(self) -> int:
        return self._next_step - self.phase.first_step

    def _on_device(self, samples: Iterator[Batch]) -> Iterator[Batch]:
        for images, texts in samples:
            yield (
                images.to(self._device, dtype=self._input_dtype, non_blocking=True),
                texts.to(self._device, non_blocking=True),
            )
