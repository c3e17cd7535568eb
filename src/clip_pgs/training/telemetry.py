"""What a run measures of itself while it trains, on rank 0: averages, costs, progress."""

from __future__ import annotations

import logging
import math
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict
from datetime import timedelta

import torch
from open_clip import CLIP
from torch import Tensor
from tqdm import tqdm

from clip_pgs.integrations.open_clip.flops import SampleFlops
from clip_pgs.tables import counted, duration
from clip_pgs.training.checkpoint import Cost
from clip_pgs.training.loggers import MetricLoggers
from clip_pgs.training.options import TrainOptions
from clip_pgs.training.phases import total_epochs
from clip_pgs.training.step import StepResult
from clip_pgs.training.stop import BadNumbersError

_BOUNDS = ("fewest kept", "most kept")

_logger = logging.getLogger(__name__)


class SkippedSteps:
    """Counts skipped steps without making any of them wait.

    The counts are the same on every rank, as the decision to skip is.

    Args:
        device: Where the decisions are made.
        max_in_row: So many skipped steps without one good one between them end the run.
        earlier: Skipped steps of earlier launches, which are counted on.
    """

    def __init__(self, device: torch.device, *, max_in_row: int, earlier: int = 0) -> None:
        self._max_in_row = max_in_row
        self._earlier = earlier
        self._total = torch.zeros((), device=device)
        self._in_row = torch.zeros((), device=device)
        self._most_in_row = torch.zeros((), device=device)

    def add(self, is_bad: Tensor) -> None:
        """Take in a step's decision, a scalar of 0 or 1."""
        self._total += is_bad
        self._in_row = (self._in_row + is_bad) * is_bad
        torch.maximum(self._most_in_row, self._in_row, out=self._most_in_row)

    def count(self) -> int:
        """Return the number of steps skipped so far; it waits for the device."""
        return self._earlier + int(self._total)

    def check(self) -> None:
        """Refuse too many skipped steps in a row; it waits for the device.

        Raises:
            BadNumbersError: If there were.
        """
        most = int(self._most_in_row)
        if most >= self._max_in_row:
            raise BadNumbersError(
                f"the loss or its gradient was not finite in {counted(most, 'step')} in a row "
                f"(--max-bad-steps {self._max_in_row}); no weight was changed by them"
            )


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
        self._num_timed = 0
        self._data_seconds = 0.0
        self._started = time.perf_counter()

    def state(self) -> dict[str, Tensor]:
        """Return what the window measured up to now, as `restore` takes it: scalars."""
        bounds = dict(zip(_BOUNDS, self._kept_bounds or (), strict=False))
        counts = {"patches": self.num_patches, "steps": self.num_steps, "good": self._num_good}
        sums = {f"sum/{name}": total for name, total in self._sums.items()}
        return {**sums, **bounds, **{name: torch.as_tensor(n) for name, n in counts.items()}}

    def restore(self, state: Mapping[str, Tensor], device: torch.device) -> None:
        """Go on with a window that an earlier launch began; its time is not counted.

        That of a run which masked other patches, or none, is left.

        Args:
            state: From `state`, wherever it lies.
            device: Where steps measure.
        """
        if int(state["patches"]) != self.num_patches:
            return
        here = {name: value.to(device) for name, value in state.items()}
        self.num_steps, self._num_good = int(state["steps"]), here["good"]
        self._sums = {n.removeprefix("sum/"): v for n, v in here.items() if n.startswith("sum/")}
        if here.keys() >= set(_BOUNDS):
            self._kept_bounds = (here[_BOUNDS[0]], here[_BOUNDS[1]])

    def add(self, result: StepResult, *, data_seconds: float) -> None:
        """Add one step.

        Args:
            result: What the step returned.
            data_seconds: How long it waited for its samples.
        """
        self.num_steps += 1
        self._num_timed += 1
        self._data_seconds += data_seconds
        values = {**result.losses, "grad_norm": result.grad_norm}
        if result.kept_counts:
            kept = torch.cat(result.kept_counts)
            values["tokens_kept"] = kept.float().mean()
            low, high = kept.min(), kept.max()
            if self._kept_bounds is not None:
                low = torch.minimum(low, self._kept_bounds[0])
                high = torch.maximum(high, self._kept_bounds[1])
            self._kept_bounds = (low, high)
        # What a skipped step measured would be all that a mean shows.
        is_bad = result.is_bad > 0
        values = {name: value.masked_fill(is_bad, 0.0) for name, value in values.items()}
        self._num_good += 1.0 - result.is_bad
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
        values["data_time"] = self._data_seconds / self._num_timed
        values["batch_time"] = seconds / self._num_timed
        values["data_wait_share"] = self._data_seconds / seconds
        values["samples_per_second"] = self._num_timed * self.samples_per_step / seconds
        values["samples_per_second_per_gpu"] = values["samples_per_second"] / world_size
        self.start()
        return values


class Telemetry:
    """Measures steps and hands the measurements to loggers.

    Args:
        options: The run's: `rank`, of which 0 alone says anything, `world_size`,
            `log_every_n_steps`, `max_bad_steps`.
        loggers: Where measurements go.
        cost: What earlier launches spent; counted on from there.
        device: Where steps measure.
        steps_left: Optimizer steps that the run still has to take.

    Attributes:
        is_active: Whether this rank says anything.
    """

    def __init__(
        self,
        options: TrainOptions,
        loggers: MetricLoggers,
        cost: Cost,
        *,
        device: torch.device,
        steps_left: int,
    ) -> None:
        self._flops = SampleFlops()
        self._loggers = loggers
        self._cost = cost
        self._meter = WindowMeter(num_patches=0, samples_per_step=0)
        self._options = options
        self._skipped_steps = SkippedSteps(
            device, max_in_row=options.max_bad_steps, earlier=cost.skipped_steps
        )
        self._epoch_loss, self._epoch_steps = 0.0, 0
        self._note = ""
        self.is_active = options.rank == 0
        self._started = time.perf_counter() - cost.seconds
        self._epoch_started = time.perf_counter()
        # Those of a run that was resumed with another batch size are of both sizes.
        self._total_steps = cost.steps + steps_left
        self._device = device
        # Steps and seconds after this launch's first window, whose step compiles.
        self._timed_from: tuple[int, float] | None = None
        self._bar = tqdm(
            total=self._total_steps,
            initial=cost.steps,
            unit="step",
            disable=not (self.is_active and sys.stderr.isatty()),
        )

    @property
    def cost(self) -> Cost:
        """What was spent up to now."""
        self._cost.seconds = time.perf_counter() - self._started
        return self._cost

    def start_phase(self, *, num_patches: int, samples_per_step: int) -> None:
        """Begin a phase of the run.

        Args:
            num_patches: Patches per image; 0 without masking.
            samples_per_step: Samples of one step over all ranks.
        """
        self._meter = WindowMeter(num_patches=num_patches, samples_per_step=samples_per_step)

    def report_flops(self, flops: SampleFlops) -> None:
        """Say, and count, what a sample costs from now on."""
        self._flops = flops
        share = flops.selection / flops.total
        masks = f", {100 * share:.1f} % of them to choose its patches" if share > 0 else ""
        _logger.info("One sample takes %.4g FLOPs%s", flops.total, masks)

    @property
    def window(self) -> dict[str, Tensor]:
        """What the epoch and the window under way measured up to now, as `start_epoch` takes it."""
        epoch = {"loss": self._epoch_loss, "steps": self._epoch_steps}
        tensors = {f"epoch/{n}": torch.tensor(v, dtype=torch.float64) for n, v in epoch.items()}
        return {**self._meter.state(), **tensors}

    def start_epoch(
        self, *, is_resumed: bool = False, window: Mapping[str, Tensor] | None = None
    ) -> None:
        """Begin a logging window, leaving out what happened between epochs.

        Args:
            is_resumed: Whether an earlier launch has taken the epoch's first steps.
            window: What that one measured; None where it does not say.
        """
        self._epoch_loss, self._epoch_steps, self._note = 0.0, 0, ""
        self._epoch_started = time.perf_counter()
        self._meter.start()
        if is_resumed:
            self._note = " (both since the run was resumed)"
        if is_resumed and window:
            self._meter.restore(window, self._device)
            self._epoch_loss = float(window["epoch/loss"])
            self._epoch_steps = int(window["epoch/steps"])
            self._note = " since the run was resumed"

    def finish_epoch(self, epoch: int, epochs: int) -> None:
        """Say what the training of an epoch brought, the `epoch`-th of `epochs`."""
        if self._epoch_steps:
            _logger.info(
                "Epoch %d of %d: mean loss %.4f, trained in %s%s",
                epoch,
                epochs,
                self._epoch_loss / self._epoch_steps,
                timedelta(seconds=round(time.perf_counter() - self._epoch_started)),
                self._note,
            )

    def step(
        self,
        result: StepResult,
        *,
        model: CLIP,
        epoch: int,
        done: int,
        steps_left: int,
        data_seconds: float,
    ) -> None:
        """Take in one step, and report at the end of each window.

        Args:
            result: What the step returned.
            model: The plain model.
            epoch: Completed epochs.
            done: Samples of this one, over all ranks, that the run has behind it.
            steps_left: Steps of it after this one.
            data_seconds: How long the step waited for its samples.

        Raises:
            BadNumbersError: If too many steps in a row were skipped.
        """
        samples = self._meter.samples_per_step
        self._cost.steps += 1
        self._cost.samples += samples
        self._cost.flops += samples * self._flops.total
        self._cost.selection_flops += samples * self._flops.selection
        if not self.is_active:
            return
        self._skipped_steps.add(result.is_bad)
        self._meter.add(result, data_seconds=data_seconds)
        self._bar.update()
        step_in_epoch = done // samples - 1
        if step_in_epoch % self._options.log_every_n_steps == 0 or not steps_left:
            # After a resume with another batch size, not what an epoch of such steps alone takes.
            share = done / (done + steps_left * samples)
            self._report_window(model, epoch=epoch, share=share, lr=result.lr)

    def _report_window(self, model: CLIP, *, epoch: int, share: float, lr: float) -> None:
        num_steps = self._meter.num_steps
        values = self._meter.read(world_size=self._options.world_size)
        if math.isfinite(values["loss"]):
            self._epoch_loss += num_steps * values["loss"]
            self._epoch_steps += num_steps
        values = {name: value for name, value in values.items() if math.isfinite(value)}
        values["lr"] = lr
        if model.logit_scale is not None:
            values["scale"] = model.logit_scale.exp().mean().item()
        if model.logit_bias is not None:
            values["bias"] = model.logit_bias.mean().item()
        values["samples"] = self._cost.samples
        values["flops"] = self._cost.flops
        values["seconds"] = self.cost.seconds
        skipped = self._read_skipped(values)
        if "mask_ratio_mean" in values:
            values["selection_flops_share"] = self._flops.selection / self._flops.total
        step = self._cost.steps - 1
        self._loggers.each(lambda logger: logger.train(values, epoch=epoch, step=step))
        epochs = total_epochs(self._options)
        parts = [f"Epoch {epoch + 1}/{epochs} {share:4.0%}", f"lr {lr:.2g}"]
        if "loss" in values:
            parts.insert(1, f"loss {values['loss']:#.4g}")
        if "mask_ratio_mean" in values:
            bounds = [f"{values[f'mask_ratio_{end}']:.2f}" for end in ("min", "max")]
            parts.append(f"mask {'-'.join(dict.fromkeys(bounds))}")
        rate = values["samples_per_second"]
        parts.append(f"{rate:.4g} img/s" if rate < 1e6 else f"{rate / 1e6:.2g}M img/s")
        parts.append(f"wait {values['data_wait_share']:.0%}")
        parts += [*self._time_left(), *skipped]
        _logger.info("%s", "  ".join(parts))
        self.check_numbers()

    def _time_left(self) -> list[str]:
        """Return what is left at this launch's pace, measurements between epochs included."""
        steps, now = self._cost.steps, time.perf_counter()
        if self._timed_from is None:
            self._timed_from = (steps, now)
            return []
        first_step, started = self._timed_from
        seconds = (now - started) / (steps - first_step) * (self._total_steps - steps)
        return [f"{duration(seconds).replace(' ', '')} left"]

    def _read_skipped(self, values: dict[str, float]) -> list[str]:
        """Put what was skipped up to now into the values; return it in words."""
        values["skipped_samples"] = self._cost.skipped_samples
        before = self._cost.skipped_steps
        self._cost.skipped_steps = self._skipped_steps.count()
        values["skipped_steps"] = self._cost.skipped_steps
        if self._cost.skipped_steps > before:
            _logger.warning(
                "Skipped %s since the last line: loss or gradient not finite",
                counted(self._cost.skipped_steps - before, "step"),
            )
        parts = (("step", self._cost.skipped_steps), ("sample", self._cost.skipped_samples))
        return [f"{counted(number, name)} skipped" for name, number in parts if number]

    def check_numbers(self) -> None:
        """Refuse to go on where no step has been good for too long; it waits for the device.

        Raises:
            BadNumbersError: If too many steps in a row were skipped.
        """
        self._cost.skipped_steps = self._skipped_steps.count()
        self._skipped_steps.check()

    def validation(
        self, values: Mapping[str, float], *, epoch: int, data: Mapping[str, str]
    ) -> None:
        """Hand on what was measured on held-out data after `epoch` epochs."""
        cost = asdict(self.cost)
        self._loggers.each(
            lambda logger: logger.validation(values, epoch=epoch, cost=cost, data=data)
        )

    def picture(self, name: str, pixels: Tensor) -> None:
        """Hand on a picture of shape (3, H, W) in [0, 1]."""
        step = self._cost.steps
        self._loggers.each(lambda logger: logger.picture(name, pixels, step=step))

    def close(self) -> None:
        """Close the bar and the loggers."""
        self._bar.close()
        self._loggers.each(lambda logger: logger.close())
