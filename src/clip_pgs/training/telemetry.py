"""What a run says about itself while it trains, on rank 0: log lines, curves, progress bar."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass

from open_clip import CLIP
from torch import Tensor
from tqdm import tqdm

from clip_pgs.training.flops import SampleFlops
from clip_pgs.training.meter import WindowMeter
from clip_pgs.training.sinks import Sink
from clip_pgs.training.step import StepResult

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
    """

    steps: int = 0
    samples: int = 0
    flops: float = 0.0
    selection_flops: float = 0.0
    seconds: float = 0.0


class Telemetry:
    """Measures steps and hands the measurements to sinks.

    Args:
        sinks: Where measurements go; empty where nothing is kept.
        cost: What earlier launches spent; counted on from there.
        world_size: Processes.
        first_step: The step this launch starts at.
        total_steps: Optimiser steps in the run.
        log_every: Steps in a logging window.
        is_active: False on ranks that say nothing.

    Attributes:
        flops: What a sample costs at present.
    """

    def __init__(
        self,
        *,
        sinks: list[Sink],
        cost: Cost,
        world_size: int,
        first_step: int,
        total_steps: int,
        log_every: int,
        is_active: bool,
    ) -> None:
        self.flops = SampleFlops()
        self._sinks = sinks
        self._cost = cost
        self._meter = WindowMeter(num_patches=0, samples_per_step=0)
        self._world_size = world_size
        self._steps_per_epoch = 0
        self._next_step = first_step
        self._log_every = log_every
        self._is_active = is_active
        self._started = time.perf_counter() - cost.seconds
        self._bar = tqdm(
            total=total_steps,
            initial=first_step,
            unit="step",
            disable=not (is_active and sys.stderr.isatty()),
        )

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
        self._steps_per_epoch = steps_per_epoch

    def report_flops(self) -> None:
        """Say what a sample costs from now on."""
        share = self.flops.selection / self.flops.total
        masks = f", {100 * share:.1f} % of them to choose its patches" if share > 0 else ""
        _logger.info("One sample takes %.4g FLOPs%s", self.flops.total, masks)

    def start_epoch(self) -> None:
        """Begin a logging window, leaving out what happened between epochs."""
        self._meter.start()

    def step(
        self,
        result: StepResult,
        *,
        model: CLIP,
        epoch: int,
        step_in_epoch: int,
        lr: float,
        data_seconds: float,
    ) -> None:
        """Take in one step, and report at the end of each window.

        Args:
            result: What the step returned.
            model: The plain model.
            epoch: Completed epochs.
            step_in_epoch: Completed steps of this one.
            lr: The step's learning rate.
            data_seconds: How long the step waited for its samples.
        """
        samples = self._meter.samples_per_step
        self._next_step += 1
        self._cost.steps += 1
        self._cost.samples += samples
        self._cost.flops += samples * self.flops.total
        self._cost.selection_flops += samples * self.flops.selection
        if not self._is_active:
            return
        self._meter.add(result, data_seconds=data_seconds)
        self._bar.update()
        is_last = step_in_epoch == self._steps_per_epoch - 1
        if step_in_epoch % self._log_every == 0 or is_last:
            self._report_window(model, epoch=epoch, done=step_in_epoch + 1, lr=lr)

    def _report_window(self, model: CLIP, *, epoch: int, done: int, lr: float) -> None:
        values = self._meter.read(world_size=self._world_size)
        values["lr"] = lr
        values["scale"] = model.logit_scale.exp().mean().item()
        if model.logit_bias is not None:
            values["bias"] = model.logit_bias.mean().item()
        values["samples"] = self._cost.samples
        values["flops"] = self._cost.flops
        masks = ""
        if "mask_ratio_mean" in values:
            values["selection_flops_share"] = self.flops.selection / self.flops.total
            masks = (
                f"Masked: {values['mask_ratio_mean']:.3f} "
                f"({values['mask_ratio_min']:.3f}-{values['mask_ratio_max']:.3f}) "
            )
        for sink in self._sinks:
            sink.train(values, epoch=epoch, step=self._next_step - 1)
        per_step = self._meter.samples_per_step
        losses = " ".join(
            f"{name.capitalize()}: {value:#.5g}"
            for name, value in values.items()
            if name.endswith("loss")
        )
        _logger.info(
            "Train Epoch: %d [%d/%d (%.0f%%)] Data (t): %.3f (%.0f%% of the time) "
            "Batch (t): %.3f, %.4g/s LR: %.3g Logit Scale: %.3f %sFLOPs: %.3g %s",
            epoch,
            done * per_step,
            self._steps_per_epoch * per_step,
            100 * done / self._steps_per_epoch,
            values["data_time"],
            100 * values["data_wait_share"],
            values["batch_time"],
            values["samples_per_second"],
            lr,
            values["scale"],
            masks,
            self._cost.flops,
            losses,
        )

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
