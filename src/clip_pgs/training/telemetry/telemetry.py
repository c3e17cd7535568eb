"""What a run says about itself while it trains, on rank 0: log lines, curves, progress bar."""

from __future__ import annotations

import logging
import math
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import timedelta

from open_clip import CLIP
from torch import Tensor
from tqdm import tqdm

from clip_pgs.integrations.open_clip.flops import SampleFlops
from clip_pgs.training.step import StepResult
from clip_pgs.training.survival.bad_steps import BadSteps
from clip_pgs.training.telemetry.meter import WindowMeter
from clip_pgs.training.telemetry.sinks import Sink

_logger = logging.getLogger(__name__)


@dataclass
class Cost:
    """What a run has spent since its very beginning, resumed launches included.

    Args:
        steps: Optimiser steps.
        samples: Image-caption pairs over all ranks.
        flops: Floating-point operations over all ranks.
        selection_flops: Of these, what choosing patches took.
        seconds: Wall time.
        skipped_steps: Steps that changed nothing, as their numbers were not finite.
        skipped_samples: Samples that could not be used.
    """

    steps: int = 0
    samples: int = 0
    flops: float = 0.0
    selection_flops: float = 0.0
    seconds: float = 0.0
    skipped_steps: int = 0
    skipped_samples: int = 0


class Telemetry:
    """Measures steps and hands the measurements to sinks.

    Args:
        sinks: Where measurements go; empty where nothing is kept.
        cost: What earlier launches spent; counted on from there.
        world_size: Processes.
        bad_steps: Counts the steps that are skipped.
        total_steps: Optimiser steps in the run.
        log_every: Steps in a logging window.
        is_active: False on ranks that say nothing.

    Attributes:
        flops: What a sample costs at present.
        is_active: As above.
    """

    def __init__(
        self,
        *,
        sinks: list[Sink],
        cost: Cost,
        world_size: int,
        bad_steps: BadSteps,
        total_steps: int,
        log_every: int,
        is_active: bool,
    ) -> None:
        self.flops = SampleFlops()
        self._sinks = sinks
        self._cost = cost
        self._meter = WindowMeter(num_patches=0, samples_per_step=0)
        self._world_size = world_size
        self._bad_steps = bad_steps
        self._earlier_skipped_steps = cost.skipped_steps
        self._samples_per_epoch = 0
        self._epoch_losses: list[float] = []
        self._log_every = log_every
        self.is_active = is_active
        self._started = time.perf_counter() - cost.seconds
        self._epoch_started = time.perf_counter()
        self._bar = tqdm(
            total=total_steps,
            initial=cost.steps,
            unit="step",
            disable=not (is_active and sys.stderr.isatty()),
        )

    @property
    def next_step(self) -> int:
        """The steps that the run has behind it."""
        return self._cost.steps

    @property
    def cost(self) -> Cost:
        """What was spent up to now."""
        self._cost.seconds = time.perf_counter() - self._started
        return self._cost

    def start_phase(self, *, num_patches: int, samples_per_step: int, steps_per_epoch: int) -> None:
        """Begin a phase of the run.

        Args:
            num_patches: Patches per image; 0 without masking.
            samples_per_step: Samples of one step over all ranks.
            steps_per_epoch: Optimiser steps in an epoch.
        """
        self._meter = WindowMeter(num_patches=num_patches, samples_per_step=samples_per_step)
        self._samples_per_epoch = steps_per_epoch * samples_per_step

    def report_flops(self) -> None:
        """Say what a sample costs from now on."""
        share = self.flops.selection / self.flops.total
        masks = f", {100 * share:.1f} % of them to choose its patches" if share > 0 else ""
        _logger.info("One sample takes %.4g FLOPs%s", self.flops.total, masks)

    def skip_samples(self, number: int) -> None:
        """Count samples that all ranks together could not use."""
        self._cost.skipped_samples += number

    def start_epoch(self) -> None:
        """Begin a logging window, leaving out what happened between epochs."""
        self._epoch_losses = []
        self._epoch_started = time.perf_counter()
        self._meter.start()

    def finish_epoch(self, epoch: int, epochs: int) -> None:
        """Say what the training of an epoch brought, the `epoch`-th of `epochs`."""
        if self._epoch_losses:
            _logger.info(
                "Epoch %d of %d: mean loss %.4f, trained in %s",
                epoch,
                epochs,
                sum(self._epoch_losses) / len(self._epoch_losses),
                timedelta(seconds=round(time.perf_counter() - self._epoch_started)),
            )

    def step(
        self,
        result: StepResult,
        *,
        model: CLIP,
        epoch: int,
        done: int,
        is_last: bool,
        lr: float,
        data_seconds: float,
    ) -> None:
        """Take in one step, and report at the end of each window.

        Args:
            result: What the step returned.
            model: The plain model.
            epoch: Completed epochs.
            done: Samples of this one, over all ranks, that the run has behind it.
            is_last: Whether the step ends the epoch.
            lr: The step's learning rate.
            data_seconds: How long the step waited for its samples.

        Raises:
            BadNumbersError: If too many steps in a row were skipped.
        """
        samples = self._meter.samples_per_step
        self._cost.steps += 1
        self._cost.samples += samples
        self._cost.flops += samples * self.flops.total
        self._cost.selection_flops += samples * self.flops.selection
        if not self.is_active:
            return
        if result.is_bad is not None:
            self._bad_steps.add(result.is_bad)
        self._meter.add(result, data_seconds=data_seconds)
        self._bar.update()
        step_in_epoch = done // samples - 1
        if step_in_epoch % self._log_every == 0 or is_last:
            self._report_window(model, epoch=epoch, done=done, lr=lr)

    def _report_window(self, model: CLIP, *, epoch: int, done: int, lr: float) -> None:
        num_steps = self._meter.num_steps
        values = self._meter.read(world_size=self._world_size)
        if math.isfinite(values["loss"]):
            self._epoch_losses += num_steps * [values["loss"]]
        values = {name: value for name, value in values.items() if math.isfinite(value)}
        values["lr"] = lr
        values["scale"] = model.logit_scale.exp().mean().item()
        if model.logit_bias is not None:
            values["bias"] = model.logit_bias.mean().item()
        values["samples"] = self._cost.samples
        values["flops"] = self._cost.flops
        values["seconds"] = self.cost.seconds
        masks = ""
        skipped = self._read_skipped(values)
        if "mask_ratio_mean" in values:
            values["selection_flops_share"] = self.flops.selection / self.flops.total
            masks = (
                f"Masked: {values['mask_ratio_mean']:.3f} "
                f"({values['mask_ratio_min']:.3f}-{values['mask_ratio_max']:.3f}) "
            )
        for sink in self._sinks:
            sink.train(values, epoch=epoch, step=self._cost.steps - 1)
        losses = " ".join(
            f"{name.capitalize()}: {value:#.5g}"
            for name, value in values.items()
            if name.endswith("loss")
        )
        _logger.info(
            "Train Epoch: %d [%d/%d (%.0f%%)] Data (t): %.3f (%.0f%% of the time) "
            "Batch (t): %.3f, %.4g/s LR: %.3g Logit Scale: %.3f Grad Norm: %.3g %sFLOPs: %.3g "
            "%s%s",
            epoch,
            done,
            self._samples_per_epoch,
            100 * done / self._samples_per_epoch,
            values["data_time"],
            100 * values["data_wait_share"],
            values["batch_time"],
            values["samples_per_second"],
            lr,
            values["scale"],
            values.get("grad_norm", math.nan),
            masks,
            self._cost.flops,
            losses,
            skipped,
        )
        self.check_numbers()

    def _read_skipped(self, values: dict[str, float]) -> str:
        """Put what was skipped up to now into the values; return it in words."""
        values["skipped_samples"] = self._cost.skipped_samples
        before = self._cost.skipped_steps
        values["skipped_steps"] = self._count_skipped_steps()
        if self._cost.skipped_steps > before:
            _logger.warning(
                "%d steps were skipped since the last line: their loss or gradient is not finite",
                self._cost.skipped_steps - before,
            )
        parts = (("steps", self._cost.skipped_steps), ("samples", self._cost.skipped_samples))
        words = " ".join(f"{number} {name}" for name, number in parts if number)
        return f" Skipped: {words}" if words else ""

    def _count_skipped_steps(self) -> int:
        self._cost.skipped_steps = self._earlier_skipped_steps + self._bad_steps.count()
        return self._cost.skipped_steps

    def check_numbers(self) -> None:
        """Refuse to go on where no step has been good for too long; it waits for the device.

        Raises:
            BadNumbersError: If too many steps in a row were skipped.
        """
        self._count_skipped_steps()
        self._bad_steps.check()

    def validation(self, values: Mapping[str, float], *, epoch: int) -> None:
        """Hand on what was measured on held-out data after `epoch` epochs."""
        for sink in self._sinks:
            sink.validation(values, epoch=epoch, cost=asdict(self.cost))

    def picture(self, name: str, pixels: Tensor) -> None:
        """Hand on a picture of shape (3, H, W) in [0, 1]."""
        for sink in self._sinks:
            sink.picture(name, pixels, step=self._cost.steps)

    def close(self) -> None:
        """Close the bar and the sinks."""
        self._bar.close()
        for sink in self._sinks:
            sink.close()
