"""Measurements of one logging window, added up on the device and read once."""

from __future__ import annotations

import time

import torch
from torch import Tensor

from clip_pgs.training.step import StepResult


class WindowMeter:
    """Average what the steps of a window measured, without making any step wait.

    Args:
        num_patches: Patches per image; 0 without masking.
        samples_per_step: Samples of one step over all ranks.

    Attributes:
        num_steps: Steps of the window up to now.
    """

    def __init__(self, *, num_patches: int, samples_per_step: int) -> None:
        self.num_patches = num_patches
        self.samples_per_step = samples_per_step
        self.start()

    def start(self) -> None:
        """Begin an empty window now."""
        self._sums: dict[str, Tensor] = {}
        self._kept_bounds: tuple[Tensor, Tensor] | None = None
        self.num_steps = 0
        self._num_good: Tensor | float = 0.0
        self._data_seconds = 0.0
        self._started = time.perf_counter()

    def add(self, result: StepResult, *, data_seconds: float) -> None:
        """Add one step.

        Args:
            result: What the step returned.
            data_seconds: How long it waited for its samples.
        """
        self.num_steps += 1
        self._data_seconds += data_seconds
        values = dict(result.losses)
        if result.grad_norm is not None:
            values["grad_norm"] = result.grad_norm
        if result.kept_counts:
            kept = torch.cat(result.kept_counts)
            values["tokens_kept"] = kept.float().mean()
            low, high = kept.min(), kept.max()
            if self._kept_bounds is not None:
                low = torch.minimum(low, self._kept_bounds[0])
                high = torch.maximum(high, self._kept_bounds[1])
            self._kept_bounds = (low, high)
        # What a skipped step measured would be all that a mean shows.
        if result.is_bad is not None:
            is_bad = result.is_bad > 0
            values = {name: value.masked_fill(is_bad, 0.0) for name, value in values.items()}
        self._num_good += 1.0 if result.is_bad is None else 1.0 - result.is_bad
        for name, value in values.items():
            self._sums[name] = self._sums[name] + value if name in self._sums else value

    def read(self, *, world_size: int) -> dict[str, float]:
        """Return the window's values by name and begin the next; waits for the device once.

        Losses, gradient norm and patches kept are means over the window's steps on this rank, less
        those that were skipped, NaN where all were;
        `mask_ratio_min` and `mask_ratio_max` are over its images.
        """
        tensors = [total.float() / self._num_good for total in self._sums.values()]
        if self._kept_bounds is not None:
            tensors += [bound.float() for bound in self._kept_bounds]
        numbers = torch.stack(tensors).tolist()
        values = dict(zip(self._sums, numbers, strict=False))
        if self._kept_bounds is not None:
            fewest, most = numbers[-2:]
            values["mask_ratio_mean"] = 1 - values["tokens_kept"] / self.num_patches
            values["mask_ratio_min"] = 1 - most / self.num_patches
            values["mask_ratio_max"] = 1 - fewest / self.num_patches
        seconds = max(time.perf_counter() - self._started, 1e-9)
        values["data_time"] = self._data_seconds / self.num_steps
        values["batch_time"] = seconds / self.num_steps
        values["data_wait_share"] = self._data_seconds / seconds
        values["samples_per_second"] = self.num_steps * self.samples_per_step / seconds
        values["samples_per_second_per_gpu"] = values["samples_per_second"] / world_size
        self.start()
        return values
