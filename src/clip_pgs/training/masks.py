"""The masks of a step: which sample sees which, on any number of ranks and micro-batches."""

from __future__ import annotations

import argparse

import torch
from torch import Tensor, nn

from clip_pgs.integrations.open_clip import (
    last_selection,
    num_patches,
    set_masking_noise,
    set_masking_progress,
)
from clip_pgs.training.seeding import micro_batch_rows, step_noise


def masks_of_run(args: argparse.Namespace, model: nn.Module) -> StepMasks | None:
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
    ) -> None:
        self.num_patches = num_patches(model)
        self._model = model
        self._seed = seed
        self._batch_size = batch_size
        self._accum_freq = accum_freq
        self._rank = rank
        self._world_size = world_size
        self._noise: Tensor | None = None
        self._kept: dict[int, Tensor] = {}
        self._current: int | None = None

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

    def give(self, micro_batch: int) -> None:
        """Make the coming forward pass choose patches by this micro-batch's numbers."""
        assert self._noise is not None
        self._remember_kept()
        self._current = micro_batch
        rows = micro_batch_rows(
            micro_batch=micro_batch,
            rank=self._rank,
            world_size=self._world_size,
            batch_size=self._batch_size,
        )
        set_masking_noise(self._model, self._noise[rows])

    def finish_step(self) -> list[Tensor]:
        """Return how many patches each image kept, one (B,) per micro-batch; forget the numbers."""
        self._remember_kept()
        set_masking_noise(self._model, None)
        self._noise, self._current = None, None
        return list(self._kept.values())

    def _remember_kept(self) -> None:
        if self._current is not None:
            selection = last_selection(self._model)
            assert selection is not None
            self._kept[self._current] = selection.kept_counts()
