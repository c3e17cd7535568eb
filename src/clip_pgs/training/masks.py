"""The masks of a step: which sample sees which, on any number of ranks and micro-batches."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from clip_pgs.integrations.open_clip import (
    calibrate_masking,
    last_selection,
    load_masking_state,
    masking_state,
    num_patches,
    set_mask_ratio,
    set_masking_noise,
    set_masking_progress,
    update_masking,
)
from clip_pgs.masking import masking_options
from clip_pgs.masking.schedule import scheduled_ratio
from clip_pgs.training.distributed import mean_over_ranks
from clip_pgs.training.options import TrainOptions
from clip_pgs.training.seeding import micro_batch_rows, step_noise


def masks_of_run(args: TrainOptions, model: nn.Module) -> StepMasks | None:
    """Return the masks of a run's steps, None where nothing is masked."""
    if args.masking == "none":
        return None
    return StepMasks(
        model,
        seed=args.seed,
        batch_size=args.batch_size,
        accum_freq=args.accum_freq,
        rank=args.rank,
        world_size=args.world_size,
        ratio_at=ratio_schedule(args),
    )


def ratio_schedule(args: TrainOptions) -> Callable[..., float] | None:
    """Return the mask ratio by `progress` in [0, 1], None where it stays what it is."""
    if args.mask_schedule == "constant":
        return None
    assert args.mask_ratio_end is not None
    defaults = masking_options(args.masking)
    return partial(
        scheduled_ratio,
        args.masking_options.get("mask_ratio", defaults["mask_ratio"]),
        args.mask_ratio_end,
        kind=args.mask_schedule,
        num_levels=args.mask_schedule_steps,
    )


class StepMasks:
    """Gives each micro-batch its own rows of the step's random numbers, as often as asked.

    Args:
        model: The plain masked model.
        seed: The run's seed.
        batch_size: Samples of a micro-batch on one rank.
        accum_freq: Micro-batches of a step.
        rank: This process.
        world_size: Processes.
        ratio_at: Gives the mask ratio at a `progress` in [0, 1]; None leaves it alone.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        seed: int,
        batch_size: int,
        accum_freq: int,
        rank: int,
        world_size: int,
        ratio_at: Callable[..., float] | None = None,
    ) -> None:
        self.num_patches = num_patches(model)
        self._model = model
        self._seed = seed
        self._batch_size = batch_size
        self._accum_freq = accum_freq
        self._rank = rank
        self._world_size = world_size
        self._ratio_at = ratio_at
        self._ratio: float | None = None
        self._noise: Tensor | None = None
        self._kept: dict[int, Tensor] = {}
        self._current: int | None = None

    def follow_schedule(self, step: int, *, total_steps: int) -> bool:
        """Set the ratio of a step, where a schedule asks for another; return whether it did."""
        if self._ratio_at is None:
            return False
        ratio = self._ratio_at(progress=min(step / total_steps, 1.0))
        if ratio == self._ratio:
            return False
        set_mask_ratio(self._model, ratio)
        self._ratio = ratio
        return True

    def start_step(self, step: int, *, total_steps: int, device: torch.device) -> None:
        """Draw a step's numbers and tell the strategy how far the run is."""
        set_masking_progress(self._model, min(step / total_steps, 1.0))
        self._noise = step_noise(
            self._seed,
            step,
            num_samples=self._batch_size * self._accum_freq * self._world_size,
            num_patches=self.num_patches,
            device=device,
        )
        self._kept, self._current = {}, None

    def calibrate(self, images: list[Tensor]) -> None:
        """Let the strategy look at a step's images, one (B, 3, H, W) per micro-batch, if it asks.

        The strategy sees the first micro-batch of every rank and takes the mean over ranks.
        """
        set_masking_noise(self._model, self._rows(0))
        average = partial(mean_over_ranks, device=images[0].device)
        calibrate_masking(self._model, images[0], average=average)

    def give(self, micro_batch: int) -> None:
        """Make the coming forward pass choose patches by this micro-batch's numbers."""
        self._remember_kept()
        self._current = micro_batch
        set_masking_noise(self._model, self._rows(micro_batch))

    def finish_step(self) -> list[Tensor]:
        """Return how many patches each image kept, one (B,) per micro-batch; forget the numbers."""
        self._remember_kept()
        set_masking_noise(self._model, None)
        self._noise, self._current = None, None
        return list(self._kept.values())

    def follow_weights(self, step: int, *, total_steps: int) -> None:
        """Let what follows the weights, such as a teacher, take a step after them."""
        update_masking(self._model, step=step, total_steps=total_steps)

    def state(self) -> dict[str, Any]:
        """Return what a resumed run needs beside the weights, as tensors and plain types."""
        return masking_state(self._model)

    def load_state(self, state: dict[str, Any]) -> None:
        """Restore what `state` returned."""
        load_masking_state(self._model, state)

    def _rows(self, micro_batch: int) -> Tensor:
        assert self._noise is not None
        rows = micro_batch_rows(
            micro_batch=micro_batch,
            rank=self._rank,
            world_size=self._world_size,
            batch_size=self._batch_size,
        )
        return self._noise[rows]

    def _remember_kept(self) -> None:
        if self._current is not None:
            selection = last_selection(self._model)
            assert selection is not None
            self._kept[self._current] = selection.kept_counts()
