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

from clip_pgs.data.decoding import pixel_normalizer
from clip_pgs.data.plan import stable_seed
from clip_pgs.data.skips import StalledDataError
from clip_pgs.integrations.open_clip import CaptionGroups, remove_masking
from clip_pgs.integrations.open_clip.flops import SampleFlops, count_sample_flops, few_texts
from clip_pgs.training.build import (
    ModelParts,
    build_loss,
    build_optimizer,
    build_schedule,
    build_trimmer,
)
from clip_pgs.training.distributed import parallelize
from clip_pgs.training.masks import masks_of_run
from clip_pgs.training.phases import Phase
from clip_pgs.training.seeding import seed_everything
from clip_pgs.training.step import Batch, StepResult, Texts, compute_gradients, update_weights

# Images may keep different counts, whose mean a few tell well enough.
_FLOP_SAMPLES = 16


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
        self.model = parts.model
        self._scaler = scaler
        if phase.removes_masking:
            remove_masking(self.model)
        self.optimizer = build_optimizer(args, self.model)
        if checkpoint is not None:
            _restore_optimizer(self.optimizer, checkpoint["optimizer"])
        self.masks = masks_of_run(args, self.model)
        if self.masks is not None and checkpoint is not None:
            self.masks.load_state(checkpoint.get("masking_state", {}))
        self._schedule = build_schedule(args, self.optimizer, steps_per_epoch=phase.steps_per_epoch)
        self._loss = build_loss(args, self.model)
        self._trim = build_trimmer(args, self.model)
        self._parallel = parallelize(self.model, args, device)
        self._autocast = get_autocast(args.precision, device_type=device.type)
        self._input_dtype = get_input_dtype(args.precision)
        self._normalize = pixel_normalizer(parts.train_transform, device=device)
        self._samples: Iterator[Batch] = iter(())
        self._next_step = 0
        self.epoch = 0
        self.position = 0

    def start_epoch(self, epoch: int, position: int = 0) -> int:
        """Begin one of the phase's epochs, or go on in it.

        Args:
            epoch: Counted from the run's beginning.
            position: Samples of it, over all ranks, that the run has behind it.

        Returns:
            The steps that are left of it.
        """
        seed_everything(stable_seed(self._args.seed, "epoch", epoch, self._args.rank))
        self.phase.stream.start_at(epoch, position)
        self.model.train()
        self._samples = self._on_device(iter(self.phase.stream))
        self.epoch, self.position = epoch, position
        self._next_step = self.phase.steps_before(epoch, position)
        return (self.phase.stream.num_batches_left or 0) // self._args.accum_freq

    def next_batches(self) -> tuple[list[Batch], float]:
        """Return the coming step's micro-batches, and the seconds it waited for them.

        Raises:
            StalledDataError: If no sample comes, or if the data ended before the epoch.
            UnusableDataError: If too many samples, or all, cannot be used.
        """
        started = perf_counter()
        batches = list(islice(self._samples, self._args.accum_freq))
        if len(batches) < self._args.accum_freq:
            raise StalledDataError(
                f"the training data ended at sample {self.position} of epoch {self.epoch}, at step "
                f"{self._next_step - self.phase.steps_before(self.epoch)} of "
                f"{self.phase.steps_per_epoch}"
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
        self.position += self.phase.samples_per_step
        lr = self._schedule(step_in_phase)
        # Dropout draws from the global stream; keyed by the step, it survives a resume.
        torch.manual_seed(stable_seed(self._args.seed, "step", step, self._args.rank))
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
        grad_norm, is_bad = update_weights(
            self.model,
            self.optimizer,
            scaler=self._scaler,
            grad_clip_norm=self._args.grad_clip_norm,
        )
        if masks is not None:
            masks.follow_weights(step_in_phase, total_steps=num_steps)
        kept_counts = masks.finish_step() if masks else []
        return StepResult(losses, grad_norm, kept_counts, is_bad), lr

    def masking_state(self) -> dict[str, Any]:
        """Return what a resumed run needs beside weights and optimiser."""
        return self.masks.state() if self.masks is not None else {}

    def count_flops(self, images: Tensor, texts: Texts) -> SampleFlops:
        """Count what one sample of such a batch costs, at the mask ratio of the coming step."""
        some_texts = few_texts(texts, _FLOP_SAMPLES)
        return count_sample_flops(
            self.model,
            images[: len(some_texts)],
            some_texts,
            is_masked=self.masks is not None,
            autocast=self._autocast,
            extra_forward=self._args.accum_freq > 1,
        )

    @property
    def _step_in_phase(self) -> int:
        return self._next_step - self.phase.first_step

    def _on_device(self, samples: Iterator[tuple[Tensor, Tensor]]) -> Iterator[Batch]:
        for images, texts in samples:
            # It reads lengths, which on a device would wait for it.
            trimmed = texts if self._trim is None else self._trim(texts)
            pixels = images.to(self._device, non_blocking=True)
            if self._normalize is not None:
                pixels = self._normalize(pixels)
            yield (
                pixels.to(dtype=self._input_dtype),
                self._copy_texts(trimmed),
            )

    def _copy_texts(self, texts: Texts) -> Texts:
        # What was trimmed is no longer in pinned memory, and the copy would wait for the device.
        if self._device.type == "cuda":
            texts = _pinned(texts)
        return texts.to(self._device, non_blocking=True)


def _pinned(texts: Texts) -> Texts:
    if isinstance(texts, Tensor):
        return texts.pin_memory()
    return CaptionGroups(tuple(t.pin_memory() for t in texts.tokens), texts.order.pin_memory())


def _restore_optimizer(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Load an optimiser's state, also that of one with the same numbers that was not fused."""
    now = optimizer.state_dict()["param_groups"]
    groups = [
        {**group, "fused": fresh["fused"]} if "fused" in fresh else group
        for group, fresh in zip(state["param_groups"], now, strict=False)
    ]
    optimizer.load_state_dict({**state, "param_groups": groups})
